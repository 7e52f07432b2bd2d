"""HellaSwag beside the validations of a run: what it records, and that the run is otherwise as it was."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import launch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2x.adapters import add_adapters
from gpt2x.command_line import parse_recipe
from gpt2x.config import LoraSection, to_yaml
from gpt2x.config.evaluation import HellaSwagRecipe
from gpt2x.errors import UserError
from gpt2x.evaluation.hellaswag import HellaSwagQuestions, evaluate_hellaswag, score_hellaswag
from gpt2x.evaluation.hellaswag_items import load_hellaswag
from gpt2x.models import load_for_inference
from gpt2x.tokenizers.bpe import load_tokenizer
from gpt2x.training.cpu_attention import register_chunked_causal
from gpt2x.training.loop import train
from gpt2x.training.signals import StopRequest
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

ROOT = Path(__file__).parents[2]
KEYS = {f"hellaswag/{name}" for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "items")}
ENDINGS = ["return self", "( value )", "if été :", "= 1", "for in", "def naïve", "self"]


def rows(count=18):
    """Every text varies on its own period."""
    return [
        {
            "activity_label": ["def", "for"][i % 2],
            "ctx_a": ["value = 1.", "naïve ( self ).", "if value in self."][i % 3],
            "ctx_b": ["the", "", "self", "Été"][i % 4],
            "endings": [ENDINGS[(i + 3 * j) % 7] for j in range(4)],
            "label": i % 4,
        }
        for i in range(count)
    ]


def write(file, made):
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def items_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hellaswag") / "rows.jsonl", rows())


@pytest.fixture
def scored(recipe, changed, items_file):
    """The recipe with nine of eighteen items: five batches of two, of which two processes make three each."""
    return changed(recipe, evaluation={"hellaswag": str(items_file), "hellaswag_items": 9})


def hellaswag_of(job):
    (evaluator,) = [evaluator for evaluator in job.evaluators if evaluator.name == "hellaswag"]
    return evaluator


def records_of(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines) if "hellaswag/acc" in record}


def scores_of(run_dir):
    return {step: {key: record[key] for key in KEYS} for step, record in records_of(run_dir).items()}


def evaluate_by_script(run_dir, *argv):
    spec = importlib.util.spec_from_file_location("eval_hellaswag_script", ROOT / "scripts" / "eval_hellaswag.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = [str(run_dir), *map(str, argv)]
    script.main(parse_recipe(HellaSwagRecipe, arguments, script="eval_hellaswag.py", positional="model")[0])
    return json.loads((run_dir / "stats.json").read_text())["evaluation"]


def test_every_validation_is_joined_by_the_scores_that_the_script_finds(scored, pretrain, items_file, capsys):
    run = pretrain(scored, finishes=True)
    assert [record["step"] for record in run.records() if "val/loss" in record] == list(records_of(run.path))
    assert [record["hellaswag/items"] for record in records_of(run.path).values()] == [9, 9]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 20: hellaswag")]
    last = records_of(run.path)[20]
    assert line == (
        f"step 20: hellaswag on 9 items, acc {last['hellaswag/acc']:.4f} ± {last['hellaswag/acc_stderr']:.4f}, "
        f"acc_norm {last['hellaswag/acc_norm']:.4f} ± {last['hellaswag/acc_norm_stderr']:.4f}"
    )
    own = json.loads((run.path / "stats.json").read_text())["evaluation"]
    (run.path / "stats.json").write_text("{}")
    assert own == evaluate_by_script(run.path, f"--data={items_file}", "--num_items=9")
    assert {f"hellaswag/{key}" for key in own["hellaswag_9_items"]} == KEYS - {"hellaswag/items"} | {
        "hellaswag/num_items"
    }


def test_the_log_probabilities_are_those_of_the_saved_model(scored, pretrain, items_file):
    run = pretrain(scored)
    directory = run.path / "checkpoints" / "step-000020" / "model"
    model = load_for_inference(str(directory), dtype=torch.float32)
    items = load_hellaswag(items_file, num_items=9)
    expected = evaluate_hellaswag(model, load_tokenizer(directory), items, batch_size=9)
    found = hellaswag_of(run.job).latest
    assert np.ptp(found.log_probs) > 1
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-5)
    assert (found.acc, found.acc_norm) == (expected.acc, expected.acc_norm)


def test_the_training_is_bit_for_bit_that_without(scored, pretrain, finished, changed, assert_equal_tensors):
    run = pretrain(changed(scored, evaluation={"eval_steps": 5}))
    assert len(records_of(run.path)) == 4
    assert_equal_tensors(run.saved(), finished.saved())


def test_it_leaves_random_numbers_and_mode_alone(scored, start):
    job, _ = start(scored)
    job.model.train()
    before = torch.get_rng_state()
    hellaswag_of(job).run(job.model, job.accelerator, lambda: False)
    assert torch.equal(torch.get_rng_state(), before)
    assert job.model.training
    assert job.plain_model.config._attn_implementation == register_chunked_causal()


def test_by_default_nothing_is_scored(finished):
    assert [evaluator.name for evaluator in finished.job.evaluators] == ["validation", "samples"]
    assert records_of(finished.path) == {}
    assert "evaluation" not in json.loads((finished.path / "stats.json").read_text())


class StopOnceValidated(StopRequest):
    """A request to stop that comes when the first validation has just been recorded."""

    def __init__(self, metrics_file):
        super().__init__()
        self.metrics_file, self.times_asked = metrics_file, 0

    def is_asked(self):
        is_validated = self.metrics_file.exists() and "val/loss" in self.metrics_file.read_text()
        self.times_asked += is_validated
        return self.times_asked >= 2


def test_a_stop_among_the_items_ends_the_run_which_makes_them_all_when_it_goes_on(scored, start, pretrain, changed):
    job, progress = start(scored)
    stop = StopOnceValidated(job.run.metrics_file)
    with job.recorder:
        assert train(replace(job, stop=stop)) is None
    assert (progress.step, stop.times_asked) == (10, 2)
    assert records_of(job.run.path) == {}
    assert job.model.training
    resumed = pretrain(scored)
    whole = pretrain(changed(scored, run={"name": "whole"}))
    assert scores_of(resumed.path) == scores_of(whole.path)
    assert [record["step"] for record in resumed.records()] == [record["step"] for record in whole.records()]


def test_the_recipes_mixed_precision_is_used_and_named(scored, changed, pretrain):
    recipe = changed(scored, train={"mixed_precision": "bf16", "max_steps": 1}, evaluation={"eval_steps": None})
    run = pretrain(recipe, finishes=True)
    assert set(json.loads((run.path / "stats.json").read_text())["evaluation"]) == {"hellaswag_9_items_mixed_bf16"}
    questions, plain = hellaswag_of(run.job).questions, GPT2XForCausalLM(run.job.plain_model.config)
    plain.load_state_dict(run.job.plain_model.state_dict())
    in_float32 = score_hellaswag(plain, questions).log_probs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = score_hellaswag(plain, questions).log_probs
    found = hellaswag_of(run.job).latest.log_probs
    assert np.abs(found - in_float32).max() > 1e-4
    np.testing.assert_allclose(found, mixed, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at it
def test_compiled_layers_are_not_compiled_once_more(items_file, shards_dir):
    torch.manual_seed(0)
    shape = {"vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GPT2XForCausalLM(GPT2XConfig(**shape, max_position_embeddings=32, initializer_range=0.2))
    model.set_attn_implementation(register_chunked_causal())
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend, dynamic=False)
    ids = torch.arange(32)[None]
    questions = HellaSwagQuestions.of(load_tokenizer(shards_dir / "tokenizer"), load_hellaswag(items_file))

    def step():
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return len(graphs)

    before = step()
    assert before > 0
    first = score_hellaswag(model, questions).log_probs
    assert step() == before
    assert np.array_equal(score_hellaswag(model, questions).log_probs, first)


def test_adapters_are_scored_with_their_base(items_file, shards_dir):
    torch.manual_seed(0)
    shape = {"vocab_size": 280, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    base = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3))
    questions = HellaSwagQuestions.of(load_tokenizer(shards_dir / "tokenizer"), load_hellaswag(items_file))
    without = score_hellaswag(base, questions).log_probs
    model = add_adapters(base, LoraSection(), seed=0)
    np.testing.assert_allclose(score_hellaswag(model, questions).log_probs, without, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted = score_hellaswag(model, questions).log_probs
    assert np.abs(adapted - without).max() > 0.1
    np.testing.assert_allclose(score_hellaswag(model.merge_and_unload(), questions).log_probs, adapted, rtol=1e-4)


def test_a_pass_holds_no_more_tokens_than_one_of_the_validation(scored, changed, start):
    found = hellaswag_of(start(scored)[0])
    longest = max(found.questions.num_tokens)
    assert found.batch_size == 16 * 16 // longest > 1
    small = changed(scored, run={"name": "small"}, evaluation={"batch_size": 1})
    assert hellaswag_of(start(small)[0]).batch_size == 1


@pytest.mark.parametrize(
    ("source", "count", "line"),
    [
        ("gone.jsonl", 9, r"gone.jsonl does not exist; give HellaSwag's validation split as a .jsonl file, or hub"),
        (
            "rows.jsonl",
            19,
            r"evaluation.hellaswag_items \(19\) must not exceed the 18 items of .*rows.jsonl; lower it",
        ),
        ("long.jsonl", 1, r"an ending of .* has 4\d tokens, and the model takes 32; give items with shorter"),
        ("hub", 9, r"Rowan/hellaswag could not be read from the Hub .*; give its validation split as a .jsonl file"),
    ],
)
def test_what_is_wrong_with_the_items_is_said_before_the_first_step(
    scored, changed, start, tmp_path, monkeypatch, source, count, line
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    write(tmp_path / "rows.jsonl", rows())
    write(tmp_path / "long.jsonl", [rows()[0] | {"endings": ["0123456789" * 4, "b", "c", "d"]}])
    place = source if source == "hub" else str(tmp_path / source)
    with pytest.raises(UserError, match=line):
        start(changed(scored, evaluation={"hellaswag": place, "hellaswag_items": count}))
    assert not (scored.run.dir / "tiny").exists()


RANK = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from gpt2x.evaluation.hellaswag import HellaSwagQuestions, score_hellaswag
from gpt2x.evaluation.hellaswag_items import load_hellaswag
from gpt2x.tokenizers.bpe import load_tokenizer
from gpt2x.distributed.ranks import Vote, agree
from modeling_gpt2x import GPT2XForCausalLM
from ranks import leave

directory, model_dir, items_file = map(Path, sys.argv[1:])
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
rank, asked = accelerator.process_index, 0
model = accelerator.prepare(GPT2XForCausalLM.from_pretrained(model_dir))
sharded = GPT2XForCausalLM.from_pretrained(model_dir)
for part in (*sharded.model.layers, sharded):
    fully_shard(part)
questions = HellaSwagQuestions.of(load_tokenizer(model_dir), load_hellaswag(items_file, num_items=9))
found = [
    score_hellaswag(each, questions, batch_size=2, accelerator=accelerator).log_probs.tolist()
    for each in (model, sharded)
]

def is_stopped():
    global asked
    asked += 1
    return agree(accelerator, Vote(stops=rank == 1 and asked == 2)).stops

stopped = score_hellaswag(model, questions, batch_size=2, accelerator=accelerator, is_stopped=is_stopped)
(directory / f"rank{rank}.json").write_text(json.dumps([found, stopped is None, asked]))
leave()
"""


@pytest.mark.trial
def test_two_processes_find_the_log_probabilities_of_one_and_stop_together(finished, tmp_path, items_file):
    model_dir = finished.path / "final"
    (tmp_path / "rank.py").write_text(RANK)
    ended = launch("cpu_2_processes.yaml", tmp_path / "rank.py", tmp_path, model_dir, items_file)
    assert ended.returncode == 0, ended.stderr
    (replicated, sharded), *stops = json.loads((tmp_path / "rank0.json").read_text())
    assert json.loads((tmp_path / "rank1.json").read_text()) == [[replicated, sharded], *stops]
    assert stops == [True, 2]
    questions = HellaSwagQuestions.of(load_tokenizer(model_dir), load_hellaswag(items_file, num_items=9))
    expected = score_hellaswag(GPT2XForCausalLM.from_pretrained(model_dir), questions)
    np.testing.assert_allclose(replicated, expected.log_probs, rtol=1e-5)
    np.testing.assert_allclose(sharded, expected.log_probs, rtol=1e-5)


@pytest.mark.trial
@pytest.mark.parametrize(
    ("config", "options"), [("fsdp2.yaml", []), ("fsdp2_tp.yaml", ["--parallelism_config_dp_shard_size=1"])]
)
def test_shards_on_two_processes_score_what_one_process_scores(scored, changed, pretrain, tmp_path, config, options):
    recipe = changed(scored, run={"name": "sharded"}, train={"micro_batch_size": 2, "save_steps": None})
    (tmp_path / "sharded.yaml").write_text(to_yaml(recipe))
    ended = launch(config, "--num_processes=2", *options, "tests/training/sharded_runs.py", tmp_path, "sharded")
    assert ended.returncode == 0, ended.stderr
    two = scores_of(recipe.run.dir / "sharded")
    assert two == scores_of(pretrain(changed(recipe, run={"name": "alone"})).path)
    assert set(two) == {10, 20}
