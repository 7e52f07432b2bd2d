"""Adapters as files, which whoever has the stock model loads without gpt2x, and merged into it."""

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
from gpt2x.config import LoraSection, OptimizerSection
from gpt2x.errors import UserError
from gpt2x.training.optimizer_state import load_optimizer_tensors, optimizer_tensors, parameter_names
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


def test_adapters_of_another_base_are_refused(stock_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    save_adapters(adapted(stock_dir), stock_dir.parent / "adapters", tokenizer)
    base = AutoModelForCausalLM.from_pretrained(stock_dir, dtype=torch.float32)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.01)
    base.save_pretrained(stock_dir)
    message = r"init_from \(.*stock-.*\) is not what the adapters of .*adapters were trained on; give the model that"
    with pytest.raises(UserError, match=message):
        load_adapters(adapted(stock_dir), stock_dir.parent / "adapters")


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
