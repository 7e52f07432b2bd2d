"""scripts/generate.py: a prompt, prompts from stdin, and what it says where there is no model."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gpt2x.command_line import parse_recipe
from gpt2x.config import GenerationRecipe
from gpt2x.models import save_model
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The directory of a run with a final model of random weights, and a worse one beside it."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    shape = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPT2XConfig(**shape, max_position_embeddings=64, initializer_range=0.3)
    for seed, name in enumerate(("final", "checkpoints/step-000010/model")):
        torch.manual_seed(seed)
        save_model(GPT2XForCausalLM(config), directory / name, tokenizer)
    (directory / "checkpoints" / "step-000010" / "manifest.json").write_text("{}")
    return directory


@pytest.fixture
def generate(capsys):
    """Calls the script's main with a command line, in this process, and returns what it printed."""

    def call(*argv):
        spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        arguments = [str(argument) for argument in argv]
        recipe, _ = parse_recipe(GenerationRecipe, arguments, script="generate.py", positional="model")
        script.main(recipe)
        return capsys.readouterr().out

    return call


def test_a_prompt_is_printed_with_its_continuation(generate, run_dir):
    text = generate(run_dir, "--prompt=def f", "--max_new_tokens=9")
    assert text.startswith("def f")
    assert len(text) > len("def f\n")


def test_the_model_of_a_run_is_its_final_one(generate, run_dir):
    greedy = ("--prompt=def", "--temperature=0", "--max_new_tokens=9")
    of_run, of_final, of_checkpoint = (
        generate(directory, *greedy) for directory in (run_dir, run_dir / "final", run_dir / "checkpoints/step-000010")
    )
    assert of_run == of_final != of_checkpoint


def test_without_temperature_the_seed_does_not_matter(generate, run_dir):
    first, second = (generate(run_dir, "--prompt=x", "--temperature=0", f"--seed={seed}") for seed in (1, 2))
    assert first == second


def test_the_seed_decides_what_is_drawn(generate, run_dir):
    first, again, other = (generate(run_dir, "--prompt=x", f"--seed={seed}") for seed in (1, 1, 2))
    assert first == again != other


def test_without_a_prompt_every_line_of_stdin_is_one(generate, run_dir, monkeypatch):
    alone = generate(run_dir, "--prompt=one\ntwo", "--temperature=0", "--max_new_tokens=5")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\\ntwo\nthree\n"))
    text = generate(run_dir, "--temperature=0", "--max_new_tokens=5")
    assert text.startswith(">>> " + alone + ">>> three")
    assert text.endswith(">>> \n")


def test_a_model_that_is_not_there_ends_in_one_line(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "nowhere", "--prompt=x"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    line = f"error: {tmp_path}/nowhere does not exist; give a model's directory, a run's, or a Hub id NAME/MODEL.\n"
    assert (finished.returncode, finished.stdout, finished.stderr) == (1, "", line)
