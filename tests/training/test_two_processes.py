"""Two processes reach what one reaches: real processes, talking by gloo."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from ranks import launch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from gpt2x.batches.validation import HeldOut, ValidationBatches
from gpt2x.config import to_yaml
from gpt2x.evaluation.validation import validate
from gpt2x.shards.index import load_index
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

CONFIG = "cpu_2_processes.yaml"
SHAPE = {"vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

# What each of the two processes runs: the gradient of its half of the rows, and its share of the validation.
RANK = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from gpt2x.batches.validation import HeldOut, ValidationBatches
from gpt2x.evaluation.validation import validate
from gpt2x.shards.index import load_index
from gpt2x.distributed.ranks import Vote, agree
from gpt2x.training.steps import accumulate_losses, clip_gradients
from modeling_gpt2x import GPT2XForCausalLM
from ranks import leave

directory, shards_dir = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
model = accelerator.prepare(GPT2XForCausalLM.from_pretrained(directory / "model"))
rows = {name: tensor.chunk(2)[rank] for name, tensor in load_file(directory / "rows.safetensors").items()}
ids, labels = rows["ids"].split(4), rows["labels"].split(4)
losses = accumulate_losses(accelerator, model, [{"input_ids": i, "labels": t} for i, t in zip(ids, labels)])
loss = accelerator.reduce(losses.shares.sum(), reduction="mean")
gradients = {name: p.grad.clone() for name, p in accelerator.unwrap_model(model).named_parameters()}
norm = clip_gradients(accelerator, model, 1e9)
batches = ValidationBatches(
    HeldOut.of(load_index(shards_dir)),
    sequence_length=16,
    batch_size=3,
    rank=rank,
    num_processes=accelerator.num_processes,
)
validation = validate(model, batches, num_bytes=batches.num_bytes, accelerator=accelerator)
own = Vote(seconds=10.0 + rank, stops=rank == 1, is_spike=rank == 1, waits=rank == 1, checksum=2**40 + rank)
stop = list(vars(agree(accelerator, own)).values())
found = [loss.item(), norm, validation.metrics(), validation.num_tokens, stop, accelerator.num_processes]
(directory / f"rank{rank}.json").write_text(json.dumps(found))
if rank == 0:
    save_file(gradients, directory / "gradients.safetensors")
leave()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, shards_dir):
    """(directory of what was given and found, what rank 0 and rank 1 found)."""
    directory = tmp_path_factory.mktemp("two_ranks")
    torch.manual_seed(0)
    GPT2XForCausalLM(GPT2XConfig(**SHAPE, max_position_embeddings=16, initializer_range=0.1)).save_pretrained(
        directory / "model"
    )
    ids = torch.randint(280, (16, 16))
    labels = ids.clone()
    for row in range(16):
        labels[row, : row + 1] = -100
    save_file({"ids": ids, "labels": labels}, directory / "rows.safetensors")
    (directory / "rank.py").write_text(RANK)
    finished = launch(CONFIG, directory / "rank.py", directory, shards_dir)
    assert finished.returncode == 0, finished.stderr
    return directory, *(json.loads((directory / f"rank{rank}.json").read_text()) for rank in (0, 1))


def test_both_processes_know_the_same(two_ranks):
    _, rank0, rank1 = two_ranks
    assert rank0 == rank1
    assert rank0[5] == 2


def test_ragged_samples_over_two_ranks_give_the_gradient_of_their_mean(two_ranks):
    directory, (loss, norm, *_), _ = two_ranks
    model = GPT2XForCausalLM.from_pretrained(directory / "model")
    rows = load_file(directory / "rows.safetensors")
    logits = model.double()(input_ids=rows["ids"], use_cache=False).logits
    expected_loss = F.cross_entropy(logits[:, :-1].reshape(-1, 280), rows["labels"][:, 1:].reshape(-1))
    expected_loss.backward()
    expected = torch.cat([parameter.grad.flatten() for _, parameter in sorted(model.named_parameters())])
    gradients = load_file(directory / "gradients.safetensors")
    found = torch.cat([gradients[name].flatten() for name, _ in sorted(model.named_parameters())])
    assert loss == pytest.approx(expected_loss.item(), rel=1e-6)
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert norm == pytest.approx(expected.norm().item(), rel=1e-6)


def test_validation_over_two_ranks_is_that_of_one(two_ranks, shards_dir):
    directory, (_, _, metrics, num_tokens, *_), _ = two_ranks
    batches = ValidationBatches(HeldOut.of(load_index(shards_dir)), sequence_length=16, batch_size=7)
    model = GPT2XForCausalLM.from_pretrained(directory / "model")
    expected = validate(model, batches, num_bytes=batches.num_bytes, accelerator=Accelerator(cpu=True))
    assert metrics == pytest.approx(expected.metrics(), rel=1e-6)
    assert num_tokens == expected.num_tokens == load_index(shards_dir).total("validation", "num_tokens")


def test_the_clock_and_the_spikes_are_rank_zeros_and_anyone_may_ask_to_stop(two_ranks):
    assert two_ranks[1][4] == two_ranks[2][4] == [10.0, True, False, False, True, False, 2**41 + 1]


def read(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "grad_norm", "learning_rate", "val/loss", "data/checksum")
    return {key: [line[key] for line in lines if key in line] for key in keys}


def test_two_processes_train_as_one_does_and_one_goes_on_from_them(recipe, changed, pretrain, tmp_path):
    recipe = changed(recipe, train={"micro_batch_size": 4})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    finished = launch(CONFIG, "tests/training/ranks.py", "scripts/pretrain.py", "--config", tmp_path / "recipe.yaml")
    assert finished.returncode == 0, finished.stderr
    # a group that outlives the run may keep a process from ending, or abort it
    assert finished.stdout.count(" leaves []") == 2
    assert "128 tokens = 4 sequences x 16 tokens x 2 processes x 1 accumulation steps" in finished.stdout
    two = read(recipe.run.dir / "tiny")
    one = read(pretrain(changed(recipe, run={"dir": tmp_path / "one"})).path)
    assert len(two["train/loss"]) == 20
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert two["val/loss"] == pytest.approx(one["val/loss"], rel=1e-5)
    assert two["learning_rate"] == one["learning_rate"]
    assert two["data/checksum"] == one["data/checksum"]
    shutil.rmtree(recipe.run.dir / "tiny" / "checkpoints" / "step-000020")
    resumed = pretrain(recipe)
    assert len(read(resumed.path)["train/loss"]) == 20
    assert read(resumed.path)["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
