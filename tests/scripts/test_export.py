"""scripts/export.py: each form from a run's directory, and one line where it cannot be."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gpt2x.command_line import parse_recipe
from gpt2x.config import ExportRecipe
from gpt2x.errors import UserError
from gpt2x.publishing.export import model_name
from gpt2x.tokenizers.bpe import write_tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "export.py"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The directory of a run whose final model is a stock Llama of random weights."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape)).save_pretrained(directory / "final")
    write_tokenizer(tokenizer, directory / "final")
    return directory


@pytest.fixture
def run_export(capsys, monkeypatch):
    """Calls the script's main with a command line, in this process, and returns what it printed."""
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def call(*argv):
        spec = importlib.util.spec_from_file_location("export_script", SCRIPT)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        script.main(recipe(*argv))
        return capsys.readouterr().out

    return call


def recipe(*argv):
    arguments = [str(argument) for argument in argv]
    return parse_recipe(ExportRecipe, arguments, script="export.py", positional="model")[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpt2xs_own_form_is_loaded_by_its_code(run_export, run_dir, tmp_path, dtype):
    printed = run_export(run_dir, "--to=native", f"--dtype={dtype}", f"--output={tmp_path / 'out'}")
    assert printed.startswith(f"{tmp_path / 'out'}: 0.")
    assert "compared with the model, largest logit difference" in printed
    assert (tmp_path / "out" / "modeling_gpt2x.py").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(run_dir / "final")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("def", return_tensors="pt")["input_ids"]
    tolerance = {"float32": 1e-5, "bfloat16": 0.02}[dtype]
    assert loaded.config.model_type == "gpt2x"
    torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, atol=tolerance, rtol=0)


def test_a_gguf_file_is_named_after_its_run(run_export, run_dir):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    printed = run_export(run_dir, "--to=gguf", "--dtype=float16")
    assert printed.startswith(f"{run_dir}/exports/gguf/tiny-float16.gguf: ")
    assert [path.name for path in (run_dir / "exports" / "gguf").iterdir()] == ["tiny-float16.gguf"]


@pytest.mark.parametrize(("form", "dtype"), [("gguf", "int8"), ("onnx", "q8_0"), ("native", "int8")])
def test_a_dtype_that_the_form_has_not_is_refused(capsys, form, dtype):
    with pytest.raises(SystemExit):
        recipe("runs/x", f"--to={form}", f"--dtype={dtype}")
    assert f"dtype ({dtype}) must be one of " in capsys.readouterr().err


def test_a_form_is_needed(capsys):
    with pytest.raises(SystemExit):
        recipe("runs/x")
    assert "to is needed; give --to VALUE, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "output"),
    [("openai-community/gpt2", "exports/gpt2/onnx"), (str(ROOT / "tests"), str(ROOT / "tests" / "exports" / "onnx"))],
)
def test_an_export_lies_in_the_runs_directory_or_under_exports(model, output):
    assert recipe(model, "--to=onnx").output_dir == Path(output)


@pytest.mark.parametrize("part", ["", "final", "checkpoints/step-000010/model"])
def test_a_model_is_called_by_its_runs_name(tmp_path, part):
    directory = tmp_path / "my-run" / part
    directory.mkdir(parents=True)
    assert model_name(str(directory)) == "my-run"


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, run_export, run_dir):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = r"^--to onnx needs onnxscript, which is not installed; run `.*python -m pip install -e '.*\[onnx\]'`\.$"
    with pytest.raises(UserError, match=line):
        run_export(run_dir, "--to=onnx")


def test_a_model_that_is_not_there_is_refused_and_nothing_made(run_export, tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; give a model's directory, a run's, or a Hub id"):
        run_export(tmp_path / "nowhere", "--to=native", f"--output={tmp_path / 'out'}")
    assert list(tmp_path.iterdir()) == []
