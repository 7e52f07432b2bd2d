"""FSDP2 on two processes reaches what one process reaches: real processes, talking by gloo."""

import dataclasses
import shutil

import pytest
import sharded_losses
import torch
from ranks import launch
from safetensors.torch import load_file, save_file
from sharded_losses import without_shards
from sharded_runs import cut_back
from test_two_processes import read
from torch import nn
from transformers import AutoModelForCausalLM

from gpt2x.checkpoints.state import load_optimizer_tensors, optimizer_tensors, parameter_names
from gpt2x.config import to_yaml
from gpt2x.distributed.devices import make_accelerator, make_fsdp_plugin
from gpt2x.distributed.sharding import gather, is_sharded, whole_weights
from gpt2x.errors import UserError
from gpt2x.training.optimizers import Muon
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

SHAPE = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MUON = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}

MUON_ON_SHARDS = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from gpt2x.training.optimizers import Muon
from gpt2x.distributed.sharding import gather
from ranks import leave
from sharded_losses import write_steps
from sharded_runs import run_recipes

directory = Path(sys.argv[1])
run_recipes(directory, ["adamw", "muon", "from_one"])
write_steps(directory)
accelerator = Accelerator(cpu=True)
mesh = init_device_mesh("cpu", (2,))
given = load_file(directory / "muon.safetensors")
weights = [torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in given["weights"]]
optimizer = Muon(weights, lr=0.05, momentum=0.9, weight_decay=0.1)
for gradients in given["gradients"]:
    for weight, gradient in zip(weights, gradients):
        weight.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    optimizer.step()
tensors = {str(number): weight for number, weight in enumerate(weights)} | {"plain": torch.ones(2)}
wholes = gather(tensors, is_writer=accelerator.is_main_process)
assert bool(wholes) == accelerator.is_main_process
if wholes:
    assert wholes.pop("plain").data_ptr() != tensors["plain"].data_ptr()
    save_file(wholes, directory / "muon_found.safetensors")
leave()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, finished):
    """The directory of what two processes were given and left, and the recipes by name."""
    directory = tmp_path_factory.mktemp("sharded")
    base = finished.job.recipe
    recipes = {}
    for name in ("adamw", "muon", "from_one"):
        # odd sizes are cut unevenly; gradients of two micro-batches add up
        size = {} if name == "from_one" else {"intermediate_size": 67, "tie_word_embeddings": name == "adamw"}
        recipes[name] = dataclasses.replace(
            base,
            run=dataclasses.replace(base.run, name=name, dir=directory / "runs"),
            model=dataclasses.replace(base.model, **size),
            train=dataclasses.replace(base.train, micro_batch_size=2),
            optimizer=dataclasses.replace(base.optimizer, name="muon" if name == "muon" else "adamw"),
            resume=name == "from_one",
        )
        (directory / f"{name}.yaml").write_text(to_yaml(recipes[name]))
    shutil.copytree(finished.path, directory / "runs" / "from_one")
    cut_back(directory / "runs" / "from_one")
    torch.manual_seed(0)
    tensors = {"weights": torch.randn(3, 33, 16), "gradients": torch.randn(4, 3, 33, 16)}
    save_file(tensors, directory / "muon.safetensors")
    (directory / "rank.py").write_text(MUON_ON_SHARDS)
    finished = launch("fsdp2.yaml", "--num_processes=2", directory / "rank.py", directory)
    assert finished.returncode == 0, finished.stderr
    return directory, recipes


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-6), ("muon", 1e-5), ("from_one", 1e-6)])
def test_shards_on_two_processes_train_as_one_process_does(two_ranks, pretrain, changed, tmp_path, name, tolerance):
    directory, recipes = two_ranks
    one = read(pretrain(changed(recipes[name], run={"dir": tmp_path})).path)
    two = read(directory / "runs" / name)
    assert len(two["train/loss"]) == 20
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=tolerance)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=100 * tolerance)
    assert two["val/loss"] == pytest.approx(one["val/loss"], rel=tolerance)
    assert two["data/checksum"] == one["data/checksum"]


def test_one_process_goes_on_from_the_checkpoint_of_two_with_shards(two_ranks, pretrain, changed, tmp_path):
    directory, recipes = two_ranks
    shutil.copytree(directory / "runs" / "adamw", tmp_path / "adamw")
    cut_back(tmp_path / "adamw")
    resumed = pretrain(changed(recipes["adamw"], run={"dir": tmp_path}, resume=True))
    assert resumed.progress.step == 20
    two = read(directory / "runs" / "adamw")
    assert read(resumed.path)["train/loss"] == pytest.approx(two["train/loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_checkpoint_and_final_model_of_shards_are_stock_models(two_ranks, name):
    directory, _ = two_ranks
    final = AutoModelForCausalLM.from_pretrained(directory / "runs" / name / "final")
    checkpoint = AutoModelForCausalLM.from_pretrained(directory / "runs" / name / "checkpoints/step-000020/model")
    assert type(final).__module__.startswith("transformers.")
    torch.testing.assert_close(final.state_dict(), checkpoint.state_dict(), rtol=0, atol=0)


def test_muon_on_shards_makes_the_very_steps_of_muon_on_whole_matrices(two_ranks):
    directory, _ = two_ranks
    given = load_file(directory / "muon.safetensors")
    weights = [nn.Parameter(weight.clone()) for weight in given["weights"]]
    optimizer = Muon(weights, **MUON)
    for gradients in given["gradients"]:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    found = load_file(directory / "muon_found.safetensors")
    for number, weight in enumerate(weights):
        torch.testing.assert_close(found[str(number)], weight.data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-6), ("bf16", 2e-5), ("fp16", 1e-3)])
def test_loss_and_gradient_on_shards_are_those_of_one_process_however_many_tokens_are_predicted(
    two_ranks, precision, tolerance
):
    """bfloat16 holds no such number of tokens, float16 nothing so large; on shards both were divided by."""
    directory, _ = two_ranks
    found = load_file(directory / f"step_{precision}.safetensors")
    num_targets, loss, gradients = without_shards(precision)
    per_rank = torch.tensor(num_targets / 2)
    assert per_rank.bfloat16() != per_rank
    assert precision != "fp16" or per_rank.half().isinf()
    assert found.pop("loss").item() == pytest.approx(loss, rel=min(tolerance, 2e-5))
    assert found.keys() == gradients.keys()
    one, two = (torch.cat([tensors[name].flatten() for name in gradients]) for tensors in (gradients, found))
    assert (two - one).norm() <= tolerance * one.norm()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_whose_texts_end_at_different_lengths_write_what_one_process_writes(two_ranks, rank):
    """transformers sees to it that the first computes its shards until the second has ended, which waits for them."""
    directory, _ = two_ranks
    found = load_file(directory / f"generated_{rank}.safetensors")["ids"]
    assert found.shape == (1, 3 + 2 + 6 * rank)
    assert torch.equal(found, sharded_losses.generated(sharded_losses.make_model(1024), rank))


def make_model():
    torch.manual_seed(0)
    return GPT2XForCausalLM(GPT2XConfig(**SHAPE, tie_word_embeddings=True))


def test_weights_that_are_not_sharded_are_given_as_they_are_and_not_copied():
    model = make_model()
    weights = whole_weights(model, is_writer=True)
    assert not is_sharded(model)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert {name: tensor.data_ptr() for name, tensor in weights.items()} == places
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_optimizer_state_that_is_not_sharded_goes_out_and_in_unchanged():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    saved = gather(optimizer_tensors([optimizer], parameter_names(model)), is_writer=True)
    other = torch.optim.AdamW(model.parameters())
    load_optimizer_tensors([other], parameter_names(model), saved)
    found = optimizer_tensors([other], parameter_names(model))
    torch.testing.assert_close(found, saved, rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_shards_are_computed_with_in_the_recipes_precision_and_added_up_in_float32(precision, dtype):
    policy = make_fsdp_plugin(precision).mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, torch.float32, None)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is not refused where there is an accelerator")
def test_shards_in_host_memory_without_a_gpu_are_refused(recipe, monkeypatch):
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(
        UserError, match=r"fsdp_offload_params \(true\) needs a GPU, and this run is on the CPU; set it to false"
    ):
        make_accelerator(recipe, {"ACCELERATE_USE_FSDP": "true"})
