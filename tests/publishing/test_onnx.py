"""The ONNX file: its signature, and text from it token by token as from the torch model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published_models import greedy_on_onnx, random_model

from gpt2x.config import ExportRecipe
from gpt2x.errors import UserError
from gpt2x.publishing.comparison import Reference
from gpt2x.tokenizers.bpe import write_tokenizer

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

from gpt2x.publishing.export import export_model  # noqa: E402
from gpt2x.publishing.hub import files_to_push  # noqa: E402
from gpt2x.publishing.onnx import check_onnx, write_onnx  # noqa: E402
from gpt2x.publishing.onnx_decoder import OnnxDecoder  # noqa: E402

ROOT = Path(__file__).parents[2]
PROMPTS = {"one": [[5, 60, 7, 99, 280]], "three, padded": [[9, 17, 250], [4] * 3 + [77] * 6, list(range(40, 60))]}


@pytest.fixture(scope="module")
def model():
    """Grouped queries, tied embeddings, RoPE."""
    return random_model("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def exported(model, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("onnx") / "llama"
    model.save_pretrained(directory)
    write_tokenizer(tokenizer, directory)
    export = export_model(ExportRecipe(model=str(directory), to="onnx"))
    assert export.difference.largest < 1e-4
    assert export.path == directory / "exports" / "onnx" / "onnx" / "model.onnx"
    assert export.num_bytes == export.path.stat().st_size
    return directory / "exports" / "onnx"


@pytest.fixture
def decoder(exported):
    return OnnxDecoder(exported, num_threads=1)


def left_padded(prompts):
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def test_the_file_has_the_signature_that_readers_of_decoders_expect(exported):
    session = onnxruntime.InferenceSession(exported / "onnx" / "model.onnx")
    total = "past_sequence_length + sequence_length"
    cache = ["batch_size", 2, "past_sequence_length", 8]
    names = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", total],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{name}": cache for name in names},
    }
    assert {value.name: value.shape for value in session.get_outputs()} == {
        "logits": ["batch_size", "sequence_length", 304],
        **{f"present.{name}": ["batch_size", 2, total, 8] for name in names},
    }


def test_what_readers_look_for_lies_beside_it(exported):
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "onnx/model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["transformers.js_config"] == {"kv_cache_dtype": {"fp16": "float16"}}


def test_a_push_of_an_export_leaves_nothing_of_it_out(exported):
    every = {file.relative_to(exported).as_posix() for file in exported.rglob("*") if file.is_file()}
    assert set(files_to_push(exported)) == every


def test_genai_config_names_the_inputs_outputs_and_cache_that_the_file_has(exported):
    settings = json.loads((exported / "genai_config.json").read_text())
    decoder, layers = settings["model"]["decoder"], range(settings["model"]["decoder"]["num_hidden_layers"])
    session = onnxruntime.InferenceSession(exported / decoder["filename"])
    for named, values in ((decoder["inputs"], session.get_inputs()), (decoder["outputs"], session.get_outputs())):
        names = {name % layer if "%d" in name else name for name in named.values() for layer in layers}
        assert names == {value.name for value in values}
    shapes = {value.name: value.shape for value in session.get_inputs()}
    heads, width = shapes["past_key_values.1.value"][1::2]
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (heads, width)
    assert (settings["search"]["max_length"], settings["model"]["eos_token_id"]) == (128, 0)


def test_a_tied_head_is_stored_once_and_no_path_of_this_machine_is(exported, model):
    content = (exported / "onnx" / "model.onnx").read_bytes()
    assert content.count(model.lm_head.weight.detach().numpy().tobytes()) == 1
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_greedy_text_equals_the_torch_models(decoder, model, prompts):
    ids, mask = left_padded(prompts)
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert greedy_on_onnx(decoder, prompts, 64) == expected[:, ids.shape[1] :].tolist()


def test_after_the_prompt_every_step_reads_one_token_and_the_cache(decoder, monkeypatch):
    lengths, step = [], decoder.step

    def spy(ids, mask, cache):
        lengths.append((ids.shape[1], cache["past_key_values.1.value"].shape()[2], mask.shape[1]))
        return step(ids, mask, cache)

    monkeypatch.setattr(decoder, "step", spy)
    greedy_on_onnx(decoder, PROMPTS["three, padded"], 4)
    assert lengths == [(20, 0, 20), (1, 20, 21), (1, 21, 22), (1, 22, 23)]


def test_it_runs_without_torch_and_transformers(exported):
    code = (
        "import sys; from pathlib import Path\n"
        "from gpt2x.publishing.onnx_decoder import *\n"
        "ids = np.array([[5, 60, 7]])\n"
        "decoder = OnnxDecoder(Path(sys.argv[1]))\n"
        "print(decoder.step(ids, np.ones_like(ids), decoder.empty_cache(1))[0].shape)\n"
        "print({'torch', 'transformers', 'onnx', 'datasets'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code, exported], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout == "(1, 3, 304)\nset()\n", ran.stderr


def test_a_precision_that_was_not_exported_is_refused(exported):
    with pytest.raises(UserError, match=r"model_fp16\.onnx does not exist; `.*scripts/export\.py MODEL --to onnx"):
        OnnxDecoder(exported, dtype="float16")


@pytest.mark.parametrize("content", [b"", b"abc", b"\x08" * 200, b"[" * 100_000])
def test_a_damaged_export_is_refused_in_one_line(exported, tmp_path, content):
    directory = shutil.copytree(exported, tmp_path / "out")
    (directory / "onnx" / "model.onnx").write_bytes(content)
    with pytest.raises(UserError, match=rf"^the export in {directory} is damaged: [^\n]*; export again\.$"):
        OnnxDecoder(directory)


def test_an_export_that_computes_something_else_is_refused(exported, model):
    other = random_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    with pytest.raises(UserError, match=r"the float32 export differs from the model by .* of its logits, more than"):
        check_onnx(exported, Reference.of(other), dtype="float32")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_are_refused(rope_type, tmp_path):
    model = random_model("llama")
    model.config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match=rf"rope_type \({rope_type}\) changes the angles with the text's length"):
        write_onnx(model, tmp_path, dtype="float32")
