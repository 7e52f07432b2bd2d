"""The same command again: gone on with, finished, refused, or extended."""

import dataclasses
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2x.command_line import parse_recipe
from gpt2x.config import PreparationRecipe, Recipe, SourceSection, TokenizerSection, to_yaml
from gpt2x.errors import UserError
from gpt2x.preflight import describe
from gpt2x.runs.changes import as_table, changes_between, plain
from gpt2x.runs.directory import open_run_directory


def test_a_new_run_lies_under_its_name_or_the_recipes(recipe, changed, tmp_path):
    assert open_run_directory(recipe, name="recipe").path == tmp_path / "runs" / "tiny"
    assert open_run_directory(changed(recipe, run={"name": None}), name="recipe").path == tmp_path / "runs" / "recipe"


def test_an_unfinished_run_with_the_same_recipe_is_gone_on_with(recipe, pretrain, start):
    pretrain(recipe, stop_after=6)
    _, progress = start(recipe)
    assert (progress.step, progress.tokens) == (6, 6 * 128)


def test_a_run_is_finished_when_its_numbers_are_written(finished, recipe, pretrain):
    stopped = pretrain(recipe, stop_after=6)
    assert not stopped.job.run.is_finished()
    assert open_run_directory(finished.job.recipe, name="recipe").is_finished()


def test_a_changed_recipe_is_refused_with_each_field_old_and_new(recipe, changed, pretrain):
    pretrain(recipe, stop_after=1)
    other = changed(recipe, optimizer={"learning_rate": 0.01}, run={"seed": 7}, evaluation={"prompts": ["def"]})
    message = (
        r"runs/tiny was run with another recipe; start a new run with --run.name NAME, or go on with this one and "
        r"these changes by --resume\.\n"
        r"field                    was    is\n"
        r"optimizer.learning_rate  0.003  0.01\n"
        r"evaluation.prompts       \[\]     \[def\]\n"
        r"run.seed                 1337   7$"
    )
    with pytest.raises(UserError, match=message):
        pretrain(other)


def test_of_many_differences_ten_are_shown_in_the_words_of_yaml_and_the_rest_counted():
    changes = {f"data.field_{number}": (None, number % 2 == 0) for number in range(13)}
    changes["data.field_1"] = (["x" * 50, "y" * 50], {"rope_theta": 10000.0})
    table = as_table(changes)
    assert table[0].split() == ["field", "was", "is"]
    assert table[1].split() == ["data.field_0", "null", "true"]
    assert re.fullmatch(r"data.field_1  \[x{26} \.\.\. y{27}\]  \{rope_theta: 10000.0\}", table[2])
    assert table[3].split() == ["data.field_2", "null", "true"]
    assert (len(table), table[-1]) == (12, "and 3 more")


def test_one_changed_source_of_a_mixture_is_one_row(recipe):
    recorded = plain(recipe) | {"data": {"sources": [{"path": "a", "weight": 1.0}, {"path": "b"}]}}
    other = {"sources": [SourceSection(path="a", weight=2.0), SourceSection(path="b")]}
    changes = changes_between(recorded, replace(recipe, data=replace(recipe.data, path=None, **other)))
    assert changes["data.sources[0].weight"] == (1.0, 2.0)
    assert not {"data.sources", "data.sources[1].path"} & set(changes)


def test_a_changed_recipe_is_gone_on_with_where_that_is_asked_for(recipe, changed, pretrain):
    pretrain(recipe, stop_after=6)
    other = changed(recipe, optimizer={"learning_rate": 0.01}, resume=True)
    run = pretrain(other)
    assert run.progress.step == 20
    assert run.records()[6]["learning_rate"] > 2 * run.records()[5]["learning_rate"]
    assert pretrain(changed(other, resume=False)).progress.step == 20


def test_where_a_run_writes_and_whom_it_tells_is_no_part_of_the_recipe(recipe, changed, pretrain, start):
    pretrain(recipe, stop_after=6)
    _, progress = start(changed(recipe, run={"report_to": []}, resume=False))
    assert progress.step == 6


def test_what_is_gone_on_with_although_it_has_changed_is_told(recipe, changed, pretrain, start):
    """Fault 14."""
    pretrain(recipe, stop_after=6)
    changes = {"optimizer": {"learning_rate": 0.01}, "train": {"save_steps": 5}, "data": {"num_workers": 0}}
    plan = describe(start(changed(recipe, **changes, resume=True))[0])
    lines = plan.splitlines()
    start_of_table = lines.index("changed:   field                    was    is")
    assert lines[start_of_table + 1 : start_of_table + 4] == [
        "           data.num_workers         1      0",
        "           train.save_steps         10     5",
        "           optimizer.learning_rate  0.003  0.01",
    ]


def test_another_model_is_refused_even_where_resuming_is_forced(recipe, changed, pretrain):
    pretrain(recipe, stop_after=1)
    message = (
        r"runs/tiny cannot go on with another model, which its weights would not fit; set back what is listed below, "
        r"or start a new run with --run.name NAME\.\nfield .*was .*is\nmodel.num_hidden_layers +2 +3\n"
    )
    other = changed(recipe, model={"num_hidden_layers": 3, "tie_word_embeddings": False}, resume=True)
    with pytest.raises(UserError, match=message):
        pretrain(other)


def test_dropout_may_change_on_the_way(recipe, changed, pretrain):
    pretrain(recipe, stop_after=1)
    assert pretrain(changed(recipe, model={"hidden_dropout": 0.1}, resume=True), stop_after=2).progress.step == 2


def test_a_run_recorded_before_an_option_existed_is_the_same_run(recipe, pretrain):
    stopped = pretrain(recipe, stop_after=3)
    content = yaml.safe_load((stopped.path / "config.yaml").read_text())
    del content["train"]["on_non_finite"], content["train"]["keep_steps"]
    (stopped.path / "config.yaml").write_text(yaml.safe_dump(content))
    assert pretrain(recipe, stop_after=4).progress.step == 4


def test_a_larger_budget_extends_a_finished_run(recipe, changed, pretrain):
    first = pretrain(changed(recipe, train={"max_steps": 10}))
    first.job.run.stats_file.write_text("{}")
    extended = pretrain(changed(recipe, train={"max_steps": 20}))
    assert (first.progress.step, extended.progress.step) == (10, 20)
    steps = [record["step"] for record in extended.records() if "train/loss" in record]
    assert steps == list(range(1, 21))


def test_an_extension_that_is_stopped_is_not_finished(recipe, changed, pretrain):
    longer = changed(recipe, train={"max_steps": 20})
    first = pretrain(changed(recipe, train={"max_steps": 10}))
    first.job.run.stats_file.write_text("{}")
    pretrain(longer, stop_after=13)
    assert not open_run_directory(longer, name="recipe").is_finished()
    assert pretrain(longer).progress.step == 20


def test_a_smaller_budget_is_a_changed_recipe(recipe, changed, pretrain):
    pretrain(recipe, stop_after=2)
    with pytest.raises(UserError, match=r"another recipe; (?s:.*)train.max_steps  20   10$"):
        pretrain(changed(recipe, train={"max_steps": 10}))


def test_what_a_run_without_a_checkpoint_recorded_is_cleared(recipe, pretrain):
    directory = recipe.run.dir / "tiny"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.yaml").write_text(to_yaml(recipe))
    (directory / "metrics.jsonl").write_text('{"step": 1, "train/loss": 99.0}\n')
    assert pretrain(recipe).records()[0]["train/loss"] < 10


def test_a_finished_run_leaves_every_file_that_is_promised(finished):
    names = {"config.yaml", "metrics.jsonl", "losses.npy", "stats.json", "samples.jsonl", "checkpoints", "final"}
    assert names | {"plots"} == {path.name for path in finished.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in (finished.path / "final").iterdir()
    }
    assert len(list((finished.path / "plots").glob("*.png"))) >= 2


def test_the_curve_of_losses_is_what_was_recorded(finished):
    recorded = [record["train/loss"] for record in finished.records() if "train/loss" in record]
    assert np.load(finished.path / "losses.npy", allow_pickle=False).tolist() == recorded
    assert len(recorded) == 20


def test_the_numbers_of_a_finished_run_are_its_own(finished):
    stats = json.loads((finished.path / "stats.json").read_text())
    assert (stats["steps"], stats["tokens"], stats["model_type"]) == (20, 2560, "gpt2")
    assert stats["parameters"] == sum(parameter.numel() for parameter in finished.job.plain_model.parameters())
    assert stats["val/bits_per_byte"] == finished.validation.bits_per_byte
    assert stats["tokens_per_s"] == pytest.approx(2560 / stats["elapsed_s"])


def test_the_recorded_recipe_reads_back_to_the_same_one(recipe, pretrain):
    run = pretrain(recipe, stop_after=1)
    parsed, _ = parse_recipe(Recipe, ["--config", str(run.path / "config.yaml")], script="pretrain.py")
    assert parsed == recipe
    assert yaml.safe_load((run.path / "config.yaml").read_text())["train"]["max_steps"] == 20


def test_the_samples_are_those_of_every_prompt_and_validation_document(recipe, changed, pretrain):
    run = pretrain(changed(recipe, evaluation={"prompts": ["def", ""], "sample_steps": 10, "eval_steps": None}))
    lines = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10] * 3 + [20] * 3
    assert [line["prompt"] for line in lines[:2]] == ["def", ""]
    assert all(isinstance(line["text"], str) for line in lines)


# --- what is refused before step 1 -----------------------------------------------------------------------------------


def test_tokens_per_step_that_do_not_divide_are_refused(recipe, changed, start):
    message = (
        r"train.tokens_per_step \(100\) must be a multiple of micro_batch_size x .* = 8 x 16 x 1 = 128; set it to"
    )
    with pytest.raises(UserError, match=message):
        start(changed(recipe, train={"tokens_per_step": 100}))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(recipe, changed, start):
    message = r"model.vocab_size \(100\) must be at least the tokenizer's 280 tokens; leave it out"
    with pytest.raises(UserError, match=message):
        start(changed(recipe, model={"vocab_size": 100}))


def test_a_model_to_go_on_from_with_fewer_ids_than_the_tokenizer_is_refused(recipe, start, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "small")
    message = r"^init_from \(.*small\) has 100 token ids, and the data's tokenizer has 280; prepare the data with"
    with pytest.raises(UserError, match=message):
        start(dataclasses.replace(recipe, init_from=str(tmp_path / "small")))


def test_a_step_of_more_text_than_there_is_is_refused(recipe, changed, start):
    message = r"the data has \d+ sequences.*, fewer than the 100000 of one step; set train.tokens_per_step to"
    with pytest.raises(UserError, match=message):
        start(changed(recipe, train={"tokens_per_step": 1_600_000}))


def test_shards_that_are_not_there_are_refused(recipe, changed, start, tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; give a directory of token shards, "):
        start(changed(recipe, data={"path": tmp_path / "nowhere"}))


def test_shards_that_the_preparation_writes_elsewhere_are_not_prepared_for_nothing(recipe, changed, start, tmp_path):
    preparation = PreparationRecipe(
        output_dir=tmp_path / "shards", tokenizer=TokenizerSection(path=str(tmp_path / "tokenizer"), vocab_size=4096)
    )
    with pytest.raises(UserError, match=r"nowhere does not exist; "):
        start(changed(recipe, data={"path": tmp_path / "nowhere", "preparation": preparation}))
    assert not (tmp_path / "tokenizer").exists()


def test_shards_of_another_tokenizer_are_refused(recipe, changed, start, shards_dir, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(shards_dir, copy)
    tokenizer = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the tokenizer at .* is not the one that made .*; prepare the shards again"):
        start(changed(recipe, data={"path": copy}))


def test_sequences_longer_than_the_continued_model_are_refused(recipe, changed, pretrain, start):
    first = pretrain(recipe, stop_after=1)
    model = first.path / "checkpoints" / "step-000001" / "model"
    longer = changed(recipe, init_from=str(model), data={"sequence_length": 64}, run={"name": "longer"})
    longer = changed(longer, train={"tokens_per_step": 512})
    message = r"data.sequence_length \(64\) must not exceed the model's max_position_embeddings \(32\); shorten it."
    with pytest.raises(UserError, match=message):
        start(longer)


def test_half_precision_without_a_gpu_is_refused(recipe, changed, start):
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"train.mixed_precision \(fp16\) needs a GPU, and this run is on the CPU;"):
        start(changed(recipe, train={"mixed_precision": "fp16"}))


def test_a_run_goes_on_from_a_stock_model(recipe, changed, pretrain, start, assert_equal_tensors):
    first = pretrain(recipe)
    model = first.path / "checkpoints" / "step-000020" / "model"
    job, progress = start(changed(recipe, init_from=str(model), run={"name": "second"}))
    assert progress.step == 0
    assert_equal_tensors(job.plain_model.state_dict(), first.job.plain_model.state_dict())
