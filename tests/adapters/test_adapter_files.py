"""Adapters as files, which whoever has the stock model loads without gpt2x, and merged into it."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from adapted_models import (
    EVERYWHERE,
    STOCK,
    VOCAB_SIZE,
    adapted,
    adapted_layers,
    disturb,
    make_tokenizer,
    recipe,
    save_stock,
    tokens,
    train_steps,
)
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gpt2x.adapters import (
    adapter_weights,
    add_adapters,
    load_adapters,
    load_base,
    merged_weights,
    save_adapters,
    save_merged,
)
from gpt2x.checkpoints.state import load_optimizer_tensors, optimizer_tensors, parameter_names
from gpt2x.config import LoraSection, OptimizerSection
from gpt2x.errors import UserError
from gpt2x.training.optimizers import make_optimizers


def run_without_gpt2x(code: str, directory: Path) -> str:
    """Runs code in a process of its own that has transformers and peft, and neither gpt2x nor modeling_gpt2x."""
    prelude = """
        import sys
        class Refused:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("gpt2x", "modeling_gpt2x"):
                    raise ImportError(name)
        sys.meta_path.insert(0, Refused())
        """
    command = [sys.executable, "-I", "-c", textwrap.dedent(prelude) + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.trial
def test_a_process_without_gpt2x_loads_them_on_the_stock_model_and_merged(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """All four forms in one process, which takes seconds to start."""
    for name in STOCK:
        model, ids = disturb(adapted(save_stock(name, tmp_path))), tokens()
        assert save_adapters(model, tmp_path / f"adapters-{name}", tokenizer) == name
        assert save_merged(model, tmp_path / f"merged-{name}", tokenizer) == name
        with torch.no_grad():
            save_file({"ids": ids, "logits": model(ids).logits}, tmp_path / f"expected-{name}.safetensors")
    output = run_without_gpt2x(
        f"""
        import torch
        from peft import AutoPeftModelForCausalLM, PeftModel
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
        for name in {list(STOCK)}:
            expected = load_file(f"expected-{{name}}.safetensors")
            stock = AutoModelForCausalLM.from_pretrained(f"stock-{{name}}", dtype=torch.float32)
            merged = AutoModelForCausalLM.from_pretrained(f"merged-{{name}}")
            class_names = type(stock).__name__, type(merged).__name__
            both = (PeftModel.from_pretrained(stock, f"adapters-{{name}}"),
                    AutoPeftModelForCausalLM.from_pretrained(f"adapters-{{name}}", dtype=torch.float32))
            with torch.no_grad():
                differences = [(model.eval()(expected["ids"]).logits - expected["logits"]).abs().max().item()
                               for model in (*both, merged)]
            print(*class_names, merged.dtype, max(differences) < 1e-5 or differences,
                  len(AutoTokenizer.from_pretrained(f"adapters-{{name}}")),
                  len(AutoTokenizer.from_pretrained(f"merged-{{name}}")))
        print({{name.split(".")[0] for name in sys.modules}} & {{"gpt2x", "modeling_gpt2x"}})
        """,
        tmp_path,
    )
    class_names = {name: type(make()).__name__ for name, make in STOCK.items()}
    expected = [f"{class_name} {class_name} torch.float32 True 41 41" for class_name in class_names.values()]
    assert output.splitlines() == [*expected, "set()"]


def test_merging_leaves_every_bit_of_the_model_and_takes_the_rest_from_the_base(
    stock_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = disturb(adapted(stock_dir))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_merged(model, tmp_path / "merged", tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    stock = AutoModelForCausalLM.from_pretrained(stock_dir, dtype=torch.float32).state_dict()
    merged = merged_weights(model)
    changed = {name for name in stock if not torch.equal(merged[name], stock[name])}
    assert merged.keys() == stock.keys()
    assert {name.split(".")[-2] for name in changed} == adapted_layers(model)
    assert {name.split(".")[-1] for name in changed} == {"weight"}


def test_a_merged_head_of_its_own_has_the_same_logits(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    section = LoraSection(rank=2, target_modules=["lm_head", "up_proj"])
    model, ids = disturb(adapted(save_stock("llama", tmp_path), section)), tokens()
    save_merged(model, tmp_path / "merged", tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_files_say_what_pefts_own_would(
    stock_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = disturb(adapted(stock_dir))
    save_adapters(model, tmp_path / "ours", tokenizer)
    model.save_pretrained(tmp_path / "pefts", save_embedding_layers=False)
    ours, pefts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "pefts"))
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(tensor, pefts[name]) for name, tensor in ours.items())
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "pefts")]
    for config in configs:
        config["target_modules"] = set(config["target_modules"])
    assert configs[0] == configs[1]
    assert configs[0]["base_model_name_or_path"] == str(stock_dir)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it by its old name
def test_adapters_on_a_base_with_a_relative_path_load_from_anywhere(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, ids = disturb(adapted(save_stock("llama", Path(".")))), tokens()
    save_adapters(model, Path("adapters"), tokenizer)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = AutoPeftModelForCausalLM.from_pretrained("../adapters", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_directory_of_adapters_has_safetensors_and_json_only(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_adapters(adapted(save_stock("gpt2", tmp_path)), tmp_path / "adapters", tokenizer)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_same_adapters_are_the_same_bytes_at_every_save(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of two metadata safetensors writes either first: ten saves would be alike by chance once in five hundred."""
    model = adapted(save_stock("gpt2", tmp_path))
    expected = adapter_weights(model)
    found = set()
    for number in range(10):
        save_adapters(model, tmp_path / str(number), tokenizer)
        found.add((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert len(found) == 1
    written = load_file(tmp_path / "9" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())


def test_weights_that_are_given_are_written_in_place_of_the_models(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = disturb(adapted(save_stock("gpt2", tmp_path)))
    copies = {name: tensor.clone() for name, tensor in adapter_weights(model).items()}
    train_steps(model, make_optimizers(model, OptimizerSection(learning_rate=1e-2)), range(1))
    save_adapters(model, tmp_path / "adapters", tokenizer, weights=copies)
    written = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in copies.items())
    assert not any(torch.equal(tensor, written[name]) for name, tensor in adapter_weights(model).items())


def test_a_resumed_run_ends_bit_for_bit_where_one_without_a_pause_does(
    stock_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    section = OptimizerSection(learning_rate=1e-2)
    whole = adapted(stock_dir)
    train_steps(whole, make_optimizers(whole, section), range(10))

    first = adapted(stock_dir)
    optimizers = make_optimizers(first, section)
    train_steps(first, optimizers, range(5))
    save_adapters(first, tmp_path / "adapters", tokenizer)
    save_file(optimizer_tensors(optimizers, parameter_names(first)), tmp_path / "optimizer.safetensors")

    second = adapted(stock_dir, seed=99)
    load_adapters(second, tmp_path / "adapters")
    optimizers = make_optimizers(second, section)
    load_optimizer_tensors(optimizers, parameter_names(second), load_file(tmp_path / "optimizer.safetensors"))
    train_steps(second, optimizers, range(5, 10))
    expected = adapter_weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_weights(second).items())


def test_adapters_of_another_rank_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    directory = save_stock("llama", tmp_path)
    save_adapters(adapted(directory), tmp_path / "adapters", tokenizer)
    message = r"the adapters of .* are not those of this recipe: .*lora_A.weight is 4 x 48 there and 8 x 48 here; set"
    with pytest.raises(UserError, match=message):
        load_adapters(adapted(directory, LoraSection(rank=8, target_modules=["all-linear"])), tmp_path / "adapters")


def test_adapters_of_other_layers_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    directory = save_stock("llama", tmp_path)
    save_adapters(adapted(directory), tmp_path / "adapters", tokenizer)
    message = (
        r"down_proj.lora_A.weight is 4 x 48 there and absent here; set lora.rank and lora.target_modules back, or "
    )
    with pytest.raises(UserError, match=message):
        load_adapters(adapted(directory, LoraSection(rank=4, target_modules=["q_proj"])), tmp_path / "adapters")


NOT_THE_BASE = r"init_from \(.*stock-.*\) is not what the adapters of .*adapters were trained on; give the model that"


def change_last_number(directory: Path) -> None:
    """Of the embeddings, which have more than the 1,024 numbers that earlier versions looked at."""
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        assert base.get_input_embeddings().weight.numel() > 1024
        base.get_input_embeddings().weight[-1, -1] *= 1.01
    base.save_pretrained(directory)


def name_base_as_before(adapters: Path, base: Path) -> None:
    """Makes of adapters what earlier versions wrote: of the base they name the beginnings of its tensors."""
    file, digest = adapters / "adapter_model.safetensors", hashlib.sha256()
    for tensor in AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).parameters():
        digest.update(tensor.detach().flatten()[:1024].numpy().tobytes())
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt", "base_fingerprint": digest.hexdigest()})


def test_adapters_of_a_base_that_differs_in_its_last_number_are_refused(
    stock_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    adapters = stock_dir.parent / "adapters"
    save_adapters(adapted(stock_dir), adapters, tokenizer)
    load_adapters(adapted(stock_dir), adapters)
    change_last_number(stock_dir)
    with pytest.raises(UserError, match=NOT_THE_BASE):
        load_adapters(adapted(stock_dir), adapters)


def test_adapters_that_name_their_base_as_earlier_versions_did_are_gone_on_with(
    stock_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    adapters, model = stock_dir.parent / "adapters", disturb(adapted(stock_dir))
    save_adapters(model, adapters, tokenizer)
    name_base_as_before(adapters, stock_dir)
    resumed = adapted(stock_dir, seed=99)
    load_adapters(resumed, adapters)
    expected = adapter_weights(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_weights(resumed).items())

    base = AutoModelForCausalLM.from_pretrained(stock_dir, dtype=torch.float32)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.01)
    base.save_pretrained(stock_dir)
    with pytest.raises(UserError, match=NOT_THE_BASE):
        load_adapters(adapted(stock_dir), adapters)


def test_the_texts_of_a_merged_model_end_where_the_tokenizer_says(tmp_path: Path) -> None:
    directory, chat = save_stock("llama", tmp_path), make_tokenizer(VOCAB_SIZE)
    chat.eos_token = "7"
    model = add_adapters(load_base(recipe(directory), chat), EVERYWHERE, seed=1)
    save_merged(model, tmp_path / "merged", chat)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged.config.eos_token_id, merged.generation_config.eos_token_id) == (7, [7, 1])


def test_nothing_warns_of_what_the_user_cannot_change(
    stock_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted(stock_dir)
        save_adapters(model, tmp_path / "adapters", tokenizer)
        load_adapters(model, tmp_path / "adapters")
        save_merged(model, tmp_path / "merged", tokenizer)
