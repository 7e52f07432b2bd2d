"""Stock models shaped like the real ones, two layers deep: bit-exact both ways, and read by processes without us."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import TOKENS, gpt2, llama, nanochat, qwen3, random_tokens, small_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from gpt2x import save_stock
from modeling_gpt2x import GPT2XForCausalLM

VOCABULARY = 211
SIZES: dict[str, Any] = {**TOKENS, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 512}
LLAMA_3_2_1B: dict[str, Any] = {
    **SIZES,
    "hidden_size": 512,  # 2048 in the real one; the ratios are its own
    "intermediate_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
SMOLLM2_135M: dict[str, Any] = {
    **SIZES,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}
QWEN3_0_6B: dict[str, Any] = {
    **SIZES,
    "hidden_size": 256,  # 1024 in the real one
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
}
NANOCHAT: dict[str, Any] = {
    **SIZES,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
REAL_SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2 124M": lambda: gpt2(768, 12, vocab_size=VOCABULARY, n_positions=1024),
    "Llama 3.2 1B": lambda: llama(**LLAMA_3_2_1B),
    "Llama 3.2 untied": lambda: llama(**{**LLAMA_3_2_1B, "tie_word_embeddings": False}),
    "SmolLM2 135M": lambda: llama(**SMOLLM2_135M),
    "Qwen3 0.6B": lambda: qwen3(**QWEN3_0_6B),
    "Qwen3 untied": lambda: qwen3(**{**QWEN3_0_6B, "tie_word_embeddings": False}),
    "NanoChat": lambda: nanochat(**NANOCHAT),
}


@pytest.mark.parametrize("name", REAL_SHAPES)
def test_real_shapes_convert_bit_for_bit_and_compute_the_same(name: str, tmp_path: Path) -> None:
    stock, tokens = REAL_SHAPES[name](), random_tokens(1, 96, VOCABULARY)
    stock.save_pretrained(tmp_path / "stock", max_shard_size="1MB")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 1
    model = GPT2XForCausalLM.from_pretrained(tmp_path / "stock")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, rtol=1e-5, atol=1e-5)
    save_stock(model, tmp_path / "again")
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert type(again) is type(stock)
    assert not any(loading.values())
    assert again.state_dict().keys() == stock.state_dict().keys()
    for key, tensor in stock.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


# ------------------------------------------------------------------------------- processes that know no gpt2x
def run_alone(code: str, directory: Path) -> str:
    """Runs `code` isolated, in an environment whose Python finds torch and transformers but none of our packages."""
    guard = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("gpt2x", "modeling_gpt2x"):
                raise ModuleNotFoundError(f"No module named {name!r}")

    sys.meta_path.insert(0, Blocked())
    """
    program = textwrap.dedent(guard) + textwrap.dedent(code)
    (directory / "empty").mkdir(exist_ok=True)
    environment = {"HF_HOME": str(directory / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        capture_output=True,
        text=True,
        cwd=directory / "empty",
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.trial
def test_a_process_without_gpt2x_reads_every_stock_form_alike(tmp_path: Path) -> None:
    names = ["gpt2 124M", "SmolLM2 135M", "Qwen3 0.6B", "NanoChat"]
    tokens, expected = random_tokens(1, 12, VOCABULARY), {}
    for number, name in enumerate(names):
        REAL_SHAPES[name]().save_pretrained(tmp_path / "stock")
        model = GPT2XForCausalLM.from_pretrained(tmp_path / "stock")
        save_stock(model, tmp_path / str(number))
        options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            expected[f"logits {number}"] = model(tokens).logits
        expected[f"tokens {number}"] = model.generate(tokens, **options)
    save_file({**expected, "input": tokens}, tmp_path / "expected.safetensors")
    output = run_alone(
        f"""
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        expected = load_file("../expected.safetensors")
        options = dict(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        for number in range({len(names)}):
            model, loading = AutoModelForCausalLM.from_pretrained(f"../{{number}}", output_loading_info=True)
            assert not any(loading.values()), loading
            with torch.no_grad():
                logits = model(expected["input"]).logits
            torch.testing.assert_close(logits, expected[f"logits {{number}}"], rtol=1e-5, atol=1e-5)
            assert torch.equal(model.generate(expected["input"], **options), expected[f"tokens {{number}}"])
            print(type(model).__name__, (logits - expected[f"logits {{number}}"]).abs().max().item())
        """,
        tmp_path,
    )
    classes = [line.split()[0] for line in output.splitlines()]
    assert classes == ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "NanoChatForCausalLM"]


@pytest.mark.trial
def test_remote_code_loads_through_three_auto_classes_where_no_package_of_ours_is(tmp_path: Path) -> None:
    model = GPT2XForCausalLM(small_config(hidden_act="silu", gated_mlp=True, pad_token_id=0, num_labels=3)).eval()
    model.save_pretrained(tmp_path / "model")
    tokens = random_tokens(2, 7)
    base = model.model(tokens)
    expected = {"logits": model(tokens).logits, "hidden": base.last_hidden_state, "input": tokens}
    save_file({name: tensor.detach() for name, tensor in expected.items()}, tmp_path / "expected.safetensors")
    output = run_alone(
        """
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
        remote = dict(trust_remote_code=True, output_loading_info=True)
        expected = load_file("../expected.safetensors")
        lm, loading = AutoModelForCausalLM.from_pretrained("../model", **remote)
        assert not any(loading.values()), loading
        assert torch.equal(lm(expected["input"]).logits, expected["logits"])
        base, loading = AutoModel.from_pretrained("../model", **remote)
        assert torch.equal(base(expected["input"]).last_hidden_state, expected["hidden"])
        classifier, loading = AutoModelForSequenceClassification.from_pretrained("../model", **remote)
        assert set(loading["missing_keys"]) == {"score.weight"}, loading
        assert torch.equal(classifier.model(expected["input"]).last_hidden_state, expected["hidden"])
        print([type(m).__module__.split(".")[0] for m in (lm, base, classifier)], classifier.score.weight.shape[0])
        lm.save_pretrained("../again")
        """,
        tmp_path,
    )
    assert output.splitlines()[-1] == "['transformers_modules', 'transformers_modules', 'transformers_modules'] 3"
    # What a stranger saves again is whole: the same code, the same weights.
    saved = {path.name for path in (tmp_path / "again").iterdir()}
    assert saved == {path.name for path in (tmp_path / "model").iterdir()}
    weights = load_file(tmp_path / "model" / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
