"""scripts/generate.py: a prompt, prompts from stdin, a conversation, and what it says where there is no model."""

import importlib.util
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationMixin, PreTrainedTokenizerFast

from gpt2x.command_line import parse_recipe
from gpt2x.config import ChatSection, GenerationRecipe
from gpt2x.errors import UserError
from gpt2x.models import save_model
from gpt2x.tokenizers.chat_template import chat_tokenizer
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"
ENDS = {"bos_token_id": 256, "eos_token_id": 256}


def byte_tokenizer():
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The directory of a run with a final model of random weights, and a worse one beside it."""
    tokenizer = byte_tokenizer()
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    shape = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPT2XConfig(**shape, **ENDS, max_position_embeddings=64, initializer_range=0.3)
    for seed, name in enumerate(("final", "checkpoints/step-000010/model")):
        torch.manual_seed(seed)
        save_model(GPT2XForCausalLM(config), directory / name, tokenizer)
    return directory


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    """A model of random weights that has a chat template and never ends an answer."""
    tokenizer = chat_tokenizer(byte_tokenizer(), ChatSection(template=ROOT / "tokenization" / "plain.jinja"))
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GPT2XForCausalLM(GPT2XConfig(**shape, **ENDS, max_position_embeddings=20_000, tie_word_embeddings=False))
    with torch.no_grad():
        model.model.norm.bias.fill_(1)
        model.lm_head.weight[ENDS["eos_token_id"]] = -10
    directory = tmp_path_factory.mktemp("models") / "chat"
    save_model(model, directory, tokenizer)
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


def test_bytes_that_the_locale_does_not_know_are_read_as_utf_8(generate, run_dir):
    arguments = "caf\udcc3\udca9", "caf\udce9"  # as Python hands them over
    texts = [generate(run_dir, f"--prompt={argument}", "--max_new_tokens=2") for argument in arguments]
    assert [text[:4] for text in texts] == ["café", "caf\ufffd"]


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


@pytest.mark.parametrize("chat", ["true", "false"])
def test_model_and_prompt_are_on_the_accelerator_where_there_is_one(generate, chat_dir, monkeypatch, chat):
    """The meta device stands for it, which computes nothing."""

    class AskedError(Exception):
        pass

    def ask(model, input_ids, attention_mask, **_):
        raise AskedError(model.device.type, input_ids.device.type, attention_mask.device.type)

    meta = torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: meta)
    monkeypatch.setattr(GenerationMixin, "generate", ask)
    with pytest.raises(AskedError) as asked:
        generate(chat_dir, "--prompt=hello", f"--chat={chat}")
    assert asked.value.args == ("meta", "meta", "meta")


@pytest.mark.trial
def test_a_model_that_is_not_there_ends_in_one_line(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "nowhere", "--prompt=x"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    line = f"error: {tmp_path}/nowhere does not exist; give a model's directory, a run's, or a Hub id NAME/MODEL.\n"
    assert (finished.returncode, finished.stdout, finished.stderr) == (1, "", line)


@pytest.mark.trial
def test_a_conversation_is_typed_line_by_line_until_the_input_ends(chat_dir):
    typed = "hello\n\n<|endoftext|>\\nsecond\n"
    command = [sys.executable, SCRIPT, chat_dir, "--chat=true", "--system=Be brief.", "--max_new_tokens=8"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, input=typed)
    assert (finished.returncode, finished.stderr) == (0, "")
    first, blank, second, end = finished.stdout.removeprefix(">>> ").split(">>> ")
    assert first.endswith("\n")
    assert second.endswith("\n")
    assert (blank, end) == ("", "\n")


def test_one_turn_is_answered_without_being_repeated(generate, chat_dir, capsys):
    options = ("--max_new_tokens=9", "--temperature=0")
    answer = generate(chat_dir, "--prompt=hello", "--chat=true", *options)
    continued = generate(chat_dir, "--prompt=User:\nhello\n\nAssistant:\n", *options)
    assert continued == "User:\nhello\n\nAssistant:\n" + answer


@pytest.mark.trial
def test_ctrl_c_ends_the_answer_and_not_the_conversation(chat_dir):
    command = [sys.executable, SCRIPT, chat_dir, "--chat=true", "--max_new_tokens=15000", "--temperature=1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.read(4) == b">>> "
        for turn in (b"first\n", b"second\n"):
            process.stdin.write(turn)
            process.stdin.flush()
            written = process.stdout.read(20)
            assert b">>> " not in written, "the answer was complete before it could be interrupted"
            process.send_signal(signal.SIGINT)
            while not written.endswith(b"\n>>> "):
                written += process.stdout.read(1) or pytest.fail("the conversation ended with the answer")
            assert len(written) < 10_000, "the answer went on"
        process.stdin.close()
        assert (process.stdout.read(), process.stderr.read(), process.wait(60)) == (b"\n", b"", 0)


def test_a_model_without_a_chat_template_is_refused(generate, run_dir):
    complaint = f"^{run_dir} has no chat template; fine-tune it by scripts/finetune.py, or leave --chat out.$"
    with pytest.raises(UserError, match=complaint):
        generate(run_dir, "--chat=true", "--prompt=x")


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_turn_of_nothing_is_refused(generate, chat_dir, blank):
    with pytest.raises(UserError, match=r"^prompt is blank; give a text, or leave it out to be asked.$"):
        generate(chat_dir, "--chat=true", f"--prompt={blank}")
