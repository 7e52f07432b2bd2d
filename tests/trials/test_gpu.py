"""The same runs on a GPU and on the CPU: every precision, both optimizers, FSDP2, compiled layers, flash attention.

Without a GPU what does not need one runs on the CPU, so that nothing here waits for its first GPU to be wrong.
"""

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

pytestmark = pytest.mark.trial

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "pretrain.py"
WORDS = ["def", "return", "(", ")", ":", "\n", "self", "value", "=", "1", "naïve", "if"]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]

# How far a loss may lie from that of float32 on the CPU, relatively.
TOLERANCES = {"no": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64},
    "124M": {"max_position_embeddings": 64, "vocab_size": 50304},
}
# So small for the larger one that 20 steps of so few tokens do not make much of every rounding.
RATES = {
    "tiny": {"learning_rate": 1e-3, "muon_learning_rate": 2e-2},
    "124M": {"learning_rate": 1e-4, "muon_learning_rate": 2e-3},
}
OPTIMIZERS = ["adamw", "muon"]


def cases():
    """(shape, optimizer, precision, device): everything on a GPU, what is quick on the CPU."""
    for shape, optimizer, precision in itertools.product(SHAPES, OPTIMIZERS, TOLERANCES):
        yield pytest.param(shape, optimizer, precision, "cuda", marks=NEEDS_GPU)
    for optimizer in OPTIMIZERS:
        yield "tiny", optimizer, "bf16", "cpu"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The recipe of 20 steps of two micro-batches, and its data.

    The rate rises over half of the run: a step that the scaler of fp16 leaves out at its beginning changes little.
    """
    directory, generator = tmp_path_factory.mktemp("gpu"), random.Random(0)
    texts = directory / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number:03d}.txt").write_text(" ".join(generator.choices(WORDS, k=generator.randint(100, 400))))
    shards = {
        "output_dir": str(directory / "shards"),
        "corpus": {"kind": "files", "paths": [f"{texts}/*.txt"], "validation_fraction": 0.1},
        "tokenizer": {"path": str(directory / "tokenizer"), "vocab_size": 280},
    }
    recipe = {
        "data": {"preparation": shards, "sequence_length": 64},
        "train": {"max_steps": 20, "tokens_per_step": 256, "micro_batch_size": 2},
        "optimizer": {"warmup_steps": 10, "lr_scheduler_type": "wsd", "decay_ratio": 0},
        "evaluation": {"eval_steps": None, "num_validation_prompts": 0, "prompts": ["def"], "max_new_tokens": 4},
    }
    for shape, model in SHAPES.items():
        own = {"model": model, "optimizer": recipe["optimizer"] | RATES[shape]}
        (directory / f"{shape}.yaml").write_text(yaml.safe_dump(recipe | own))
    return directory


def run(config, runs_dir, *options, device, launch=None):
    """Trains on a device, under a launch configuration or on its own: (the run's directory, what it printed)."""
    launcher = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", *launch] if launch else []
    command = [sys.executable, *launcher, str(SCRIPT), "--config", str(config), "--run.dir", str(runs_dir), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=540)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return runs_dir / config.stem, finished.stdout


def training_records(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if "train/loss" in line]
    assert [record["step"] for record in records] == list(range(1, 21))
    return records


def losses(run_dir):
    return [record["train/loss"] for record in training_records(run_dir)]


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """Losses of a shape and an optimizer in float32 on the CPU; each is computed once."""
    known = {}

    def find(shape, optimizer):
        if (shape, optimizer) not in known:
            options = (f"--optimizer.name={optimizer}", "--train.mixed_precision=no")
            run_dir, _ = run(base / f"{shape}.yaml", tmp_path_factory.mktemp("reference"), *options, device="cpu")
            known[shape, optimizer] = losses(run_dir)
        return known[shape, optimizer]

    return find


@pytest.mark.parametrize(("shape", "optimizer", "precision", "device"), list(cases()))
def test_the_losses_are_those_of_float32_on_the_cpu(base, reference, tmp_path, shape, optimizer, precision, device):
    options = (f"--optimizer.name={optimizer}", f"--train.mixed_precision={precision}")
    run_dir, said = run(base / f"{shape}.yaml", tmp_path, *options, device=device)
    expected, records = reference(shape, optimizer), training_records(run_dir)
    assert ("1 x cpu" in said) == (device == "cpu")
    assert [record["train/loss"] for record in records] == pytest.approx(expected, rel=TOLERANCES[precision])
    assert expected[-1] < expected[0] - 0.1  # the comparison is one of runs that learn
    scales = [record["train/loss_scale"] for record in records if "train/loss_scale" in record]
    assert len(scales) == (20 if precision == "fp16" else 0)
    assert records[-1].get("train/scaler_skipped_steps", 0) <= 5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("precision", "device"),
    [("no", "cpu"), ("bf16", "cpu"), *(pytest.param(name, "cuda", marks=NEEDS_GPU) for name in TOLERANCES)],
)
def test_shards_on_one_device_have_the_losses_of_float32_on_the_cpu(
    base, reference, tmp_path, optimizer, precision, device
):
    """FSDP2 at world size 1."""
    launch = (str(ROOT / "accelerate_configs" / "fsdp2.yaml"), "--num_processes=1")
    options = (f"--optimizer.name={optimizer}", f"--train.mixed_precision={precision}")
    run_dir, said = run(base / "tiny.yaml", tmp_path, *options, device=device, launch=launch)
    assert "of the main process's host memory" in said  # the weights are in shards
    assert losses(run_dir) == pytest.approx(reference("tiny", optimizer), rel=TOLERANCES[precision])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_layers_have_the_losses_of_float32_on_the_cpu(base, reference, tmp_path, optimizer, device):
    options = (f"--optimizer.name={optimizer}", "--train.mixed_precision=bf16", "--train.torch_compile=true")
    run_dir, said = run(base / "tiny.yaml", tmp_path, *options, device=device)
    assert ", compiled" in said
    assert losses(run_dir) == pytest.approx(reference("tiny", optimizer), rel=TOLERANCES["bf16"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_that_was_begun_there_goes_on_on_the_cpu(base, reference, tmp_path, optimizer, device):
    options = (f"--optimizer.name={optimizer}", "--train.mixed_precision=no")
    run(base / "tiny.yaml", tmp_path, *options, "--train.max_steps=10", device=device)
    run_dir, said = run(base / "tiny.yaml", tmp_path, *options, device="cpu")
    assert "resumed at step 10" in said
    assert losses(run_dir) == pytest.approx(reference("tiny", optimizer), rel=TOLERANCES["no"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "count"), [("cpu", 1), ("cpu_2_processes", 2)])
def test_a_launch_configuration_of_the_cpu_trains_there_whatever_the_machine_has(
    base, reference, tmp_path, name, count, device
):
    """The device is one that the run may see."""
    launch = (str(ROOT / "accelerate_configs" / f"{name}.yaml"),)
    run_dir, said = run(base / "tiny.yaml", tmp_path, "--train.mixed_precision=no", device=device, launch=launch)
    assert f"{count} x cpu with" in said
    assert losses(run_dir) == pytest.approx(reference("tiny", "adamw"), rel=TOLERANCES["no"])


# What of a GPU's memory a script has used, when it has ended.
WATCHED = """
import runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0, file=sys.stderr)
"""
TURNS = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The directory of a run with a chat template."""
    options = ("--train.max_steps=2", "--train.mixed_precision=no")
    run_dir, _ = run(base / "tiny.yaml", tmp_path_factory.mktemp("trained"), *options, device="cpu")
    (run_dir / "final" / "chat_template.jinja").write_text(TURNS)
    return run_dir


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chat", ["false", "true"])
def test_generate_writes_on_the_accelerator_what_it_writes_on_the_cpu(trained, chat, device):
    arguments = [str(trained), "--prompt=def self", f"--chat={chat}", "--temperature=0", "--max_new_tokens=12"]
    command = [sys.executable, "-c", WATCHED, str(ROOT / "scripts" / "generate.py"), *arguments]
    found = {}
    for place in {"cpu", device}:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"ACCELERATE_USE_CPU": str(place == "cpu")}
        finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr.splitlines()[-1] == str(place != "cpu")
        found[place] = finished.stdout
    assert found[device] == found["cpu"] != ""


@pytest.mark.parametrize("device", DEVICES)
def test_the_check_for_a_gpu_is_right_about_everything(tmp_path, device):
    """Correctness and speed by gpu_check.py: on a GPU in its own sizes, which takes five minutes."""
    command = [sys.executable, str(Path(__file__).parent / "gpu_check.py"), str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    smoke = ["--smoke"] if device == "cpu" else []
    finished = subprocess.run([*command, *smoke], capture_output=True, text=True, env=environment, timeout=540)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1] == "ok"


# --- attention -------------------------------------------------------------------------------------------------------


def small_model(device):
    """Of heads as wide as those of GPT-2, with the attention that is used on GPUs."""
    torch.manual_seed(0)
    config = GPT2XConfig(
        vocab_size=96, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2XForCausalLM(config).to(device)


def step_in_bfloat16(model, device):
    """(The loss, the names of the operators that computed it and its gradient)."""
    ids = torch.arange(2 * 128, device=device).reshape(2, 128) % 96
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    return loss.item(), {event.key for event in profiled.key_averages()}


def flash_operators(names):
    return {name for name in names if name.startswith("aten::_scaled_dot_product_flash_attention")}


@pytest.mark.filterwarnings("ignore::UserWarning")  # the profiler's
@pytest.mark.parametrize("device", DEVICES)
def test_training_in_bfloat16_attends_by_the_flash_kernel(device):
    with sdpa_kernel(SDPBackend.MATH):
        expected, names = step_in_bfloat16(small_model(device), device)
    assert not flash_operators(names)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # where it cannot take what it is given, torch raises
        model = small_model(device)
        loss, names = step_in_bfloat16(model, device)
    assert {"backward" in name for name in flash_operators(names)} == {True, False}
    assert loss == pytest.approx(expected, rel=TOLERANCES["bf16"])
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_left_to_itself_torch_takes_a_fused_kernel(device):
    _, names = step_in_bfloat16(small_model(device), device)
    cudnn = {name for name in names if name.startswith("aten::_scaled_dot_product_cudnn_attention")}
    assert flash_operators(names) | cudnn


@NEEDS_GPU
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_the_package_flash_attn_computes_the_same():
    model = small_model("cuda").bfloat16()
    ids = torch.arange(2 * 128, device="cuda").reshape(2, 128) % 96
    expected = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation("flash_attention_2")
    found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=TOLERANCES["bf16"], atol=TOLERANCES["bf16"])
