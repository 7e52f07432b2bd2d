"""Matrices cut across two processes make what one process makes: real processes, talking by gloo."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from ranks import launch
from sharded_runs import cut_back
from test_two_processes import read
from transformers import AutoModelForCausalLM

from gpt2x.config import to_yaml
from gpt2x.distributed.ranks import data_rank
from gpt2x.distributed.tensor_parallel import TensorParallelism, check_sizes, check_version, cut_weights
from gpt2x.errors import UserError
from gpt2x.training.anomalies import suspects
from gpt2x.training.steps import StepLosses
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

# Everything that is not cut evenly, or is tied, or has an own gradient on each device.
MODELS = {
    "gpt2": {"intermediate_size": 67, "hidden_dropout": 0.1},
    "qwen3": {
        "position_embedding": "rope",
        "norm": "rms_norm",
        "hidden_act": "silu",
        "gated_mlp": True,
        "attention_bias": False,
        "mlp_bias": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "qk_norm": "weight",
        "tie_word_embeddings": False,
    },
    "from_one": {},
}
NUM_STEPS = 8


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, finished):
    """The directory of what a group of two processes was given and left, and the recipes by name."""
    directory = tmp_path_factory.mktemp("cut")
    base, recipes = finished.job.recipe, {}
    for name, options in MODELS.items():
        short = {} if name == "from_one" else {"max_steps": NUM_STEPS, "save_steps": NUM_STEPS // 2}
        recipes[name] = dataclasses.replace(
            base,
            run=dataclasses.replace(base.run, name=name, dir=directory / "runs"),
            model=dataclasses.replace(base.model, **options),
            train=dataclasses.replace(base.train, micro_batch_size=4, gradient_checkpointing=name == "qwen3", **short),
            optimizer=dataclasses.replace(base.optimizer, name="muon" if name == "qwen3" else "adamw"),
            evaluation=dataclasses.replace(base.evaluation, **({"eval_steps": NUM_STEPS // 2} if short else {})),
            resume=name == "from_one",
        )
        (directory / f"{name}.yaml").write_text(to_yaml(recipes[name]))
    shutil.copytree(finished.path, directory / "runs" / "from_one")
    cut_back(directory / "runs" / "from_one")
    sizes = ("--num_processes=2", "--parallelism_config_dp_shard_size=1")
    script = "tests/training/sharded_runs.py"
    found = launch("fsdp2_tp.yaml", *sizes, script, directory, *MODELS)
    assert found.returncode == 0, found.stderr
    return directory, recipes, found.stdout + found.stderr


@pytest.mark.parametrize(("name", "tolerance"), [("gpt2", 1e-6), ("qwen3", 1e-5), ("from_one", 1e-6)])
def test_a_group_of_two_processes_trains_as_one_process_does(two_ranks, pretrain, changed, tmp_path, name, tolerance):
    directory, recipes, _ = two_ranks
    plain = {"run": {"dir": tmp_path}, "train": {"gradient_checkpointing": False}, "resume": False}
    one = read(pretrain(changed(recipes[name], **plain)).path)
    two = read(directory / "runs" / name)
    assert len(two["train/loss"]) == recipes[name].train.max_steps
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=tolerance)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=100 * tolerance)
    assert two["val/loss"] == pytest.approx(one["val/loss"], rel=tolerance)
    assert two["data/checksum"] == one["data/checksum"]


def test_a_sum_over_the_documents_counts_them_once(two_ranks, finished):
    directory, _, _ = two_ranks
    two = json.loads((directory / "runs" / "from_one" / "stats.json").read_text())
    one = json.loads((finished.path / "stats.json").read_text())
    assert two["val/bits_per_byte"] == pytest.approx(one["val/bits_per_byte"], rel=1e-6)


def test_the_group_samples_what_one_process_samples(two_ranks, finished):
    directory, _, _ = two_ranks
    texts = [
        [json.loads(line)["text"] for line in (path / "samples.jsonl").read_text().splitlines()]
        for path in (directory / "runs" / "from_one", finished.path)
    ]
    assert texts[0] == texts[1]
    assert texts[0]


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_one_process_goes_on_from_the_checkpoint_of_a_group(two_ranks, pretrain, changed, tmp_path, name):
    directory, recipes, _ = two_ranks
    shutil.copytree(directory / "runs" / name, tmp_path / name)
    cut_back(tmp_path / name, num_steps=NUM_STEPS)
    plain = {"run": {"dir": tmp_path}, "train": {"gradient_checkpointing": False}, "resume": True}
    resumed = pretrain(changed(recipes[name], **plain))
    assert resumed.progress.step == NUM_STEPS
    tolerance = 5e-5 if name == "qwen3" else 1e-6
    two = read(directory / "runs" / name)
    assert read(resumed.path)["train/loss"] == pytest.approx(two["train/loss"], rel=tolerance)


@pytest.mark.parametrize(("name", "model_type"), [("gpt2", "gpt2"), ("qwen3", "qwen3")])
def test_checkpoint_and_final_model_of_a_group_are_stock_models(two_ranks, name, model_type):
    directory, _, _ = two_ranks
    final = AutoModelForCausalLM.from_pretrained(directory / "runs" / name / "final")
    checkpoint = AutoModelForCausalLM.from_pretrained(directory / "runs" / name / "checkpoints/step-000008/model")
    assert final.config.model_type == model_type
    assert type(final).__module__.startswith("transformers.")
    torch.testing.assert_close(final.state_dict(), checkpoint.state_dict(), rtol=0, atol=0)


def test_torch_says_nothing_of_views_and_collectives(two_ranks):
    _, _, said = two_ranks
    assert "returned a view tensor" not in said
    assert "While redistributing" not in said


def at(process, *, num_processes, **sizes):
    parallelism = TensorParallelism(**sizes) if sizes else None
    return data_rank(
        SimpleNamespace(process_index=process, num_processes=num_processes, parallelism_config=parallelism)
    )


def test_processes_of_a_group_have_the_rank_of_their_rows():
    found = [at(process, num_processes=8, tp_size=2, dp_shard_size=4) for process in range(8)]
    assert [place.rank for place in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [place.is_first_copy for place in found] == [True, False] * 4
    assert {(place.num_ranks, place.num_copies) for place in found} == {(4, 2)}


def test_without_groups_every_process_has_its_own_rows():
    assert [at(process, num_processes=3).rank for process in range(3)] == [0, 1, 2]
    assert {at(process, num_processes=3).is_first_copy for process in range(3)} == {True}


def test_the_mesh_has_a_dimension_for_shards_even_where_it_is_one():
    parallelism = TensorParallelism(tp_size=2, dp_shard_size=1)
    assert parallelism._get_mesh() == (("dp_shard", "tp"), (1, 2))
    assert ParallelismConfig(tp_size=2)._get_mesh() == (("tp",), (2,))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 12}, r"tp_size \(8\) must divide num_attention_heads \(12\); use fewer devices"),
        ({"num_attention_heads": 16, "num_key_value_heads": 4}, r"\(8\) must divide num_key_value_heads \(4\)"),
    ],
)
def test_heads_that_cannot_be_shared_evenly_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        check_sizes(config, 8)
    check_sizes(config, 2)


def test_an_older_transformers_is_refused():
    with pytest.raises(UserError, match=r"transformers \(5\.17\.0\) must be at least 5\.23 for tensor parallelism"):
        check_version("5.17.0")
    check_version("5.23.1.dev0")
    check_version("6.0.0")


def test_a_loss_that_is_not_finite_is_reported_with_the_rows_that_its_group_read():
    means_of_ranks = [[1.0, 1.0], [1.0, 1.0], [1.0, float("nan")], [1.0, float("nan")]]  # two groups of two
    accelerator = SimpleNamespace(
        gather=lambda _means: torch.tensor(means_of_ranks).flatten(),
        process_index=0,
        num_processes=4,
        parallelism_config=TensorParallelism(tp_size=2, dp_shard_size=2),
    )
    job = SimpleNamespace(accelerator=accelerator, recipe=SimpleNamespace(train=SimpleNamespace(micro_batch_size=3)))
    losses = StepLosses(torch.ones(2), torch.tensor([10, 10]), torch.tensor(10.0))
    (found,) = suspects(job, losses)
    assert (found.rank, found.first, found.last) == (1, 9, 11)


def test_a_model_that_does_not_say_how_it_is_cut_is_refused():
    model = GPT2XForCausalLM(
        GPT2XConfig(
            vocab_size=8, bos_token_id=0, eos_token_id=0, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    model.tp_plan = None
    accelerator = SimpleNamespace(
        parallelism_config=TensorParallelism(tp_size=2, dp_shard_size=1),
        torch_device_mesh={"tp": SimpleNamespace(size=lambda: 2)},
    )
    with pytest.raises(UserError, match=r"tp_size \(2\) needs a model that says how it is cut, and GPT2XForCausalLM"):
        cut_weights(model, accelerator)
