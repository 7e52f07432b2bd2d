"""The README.md of a model on the Hub, written from what its run left."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gpt2x.models import find_model
from gpt2x.publishing.run_files import RunFiles

_READERS = {
    "gpt2": "transformers, vLLM and PEFT as it is; llama.cpp, ONNX Runtime and transformers.js after an export",
    "llama": "transformers, vLLM and PEFT as it is; llama.cpp, ONNX Runtime and transformers.js after an export",
    "qwen3": "transformers, vLLM and PEFT as it is; llama.cpp, ONNX Runtime and transformers.js after an export",
    "nanochat": "transformers as it is; ONNX Runtime and transformers.js after an export",
    "gpt2x": "transformers with `trust_remote_code=True`, since its code is in this repository; ONNX Runtime after an "
    "export",
}
_ARCHITECTURE = {
    "model_type": "model type",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key and value heads",
    "head_dim": "head width",
    "intermediate_size": "MLP width",
    "hidden_act": "activation",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "longest sequence",
    "tie_word_embeddings": "tied embeddings",
    "rope_parameters": "RoPE",
    "sliding_window": "sliding window",
}
# GPT-2's names for the same.
_OLD_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
}
_RUN = {
    "parameters": "parameters",
    "tokens": "tokens seen",
    "steps": "optimizer steps",
    "elapsed_s": "seconds of training",
    "flops": "FLOPs",
    "devices": "devices",
}
_METRICS = {
    "val/loss": "cross-entropy (nats per token)",
    "val/bits_per_byte": "bits per byte",
    "val/token_accuracy": "token accuracy",
}


def model_card(directory: Path, *, repo_id: str, license: str) -> str:
    """The card: metadata in YAML, then architecture, data, training, evaluation, curves and how to load the model.

    Args:
        directory: a run's, whose config.yaml, stats.json, metrics.jsonl and plots it reads, or a bare model's.
        repo_id: USER/NAME, for the loading example.
        license: an identifier that the Hub knows.
    """
    run = RunFiles.of(directory)
    config = json.loads((Path(find_model(str(directory))) / "config.json").read_text())
    metadata = _metadata(run, config, repo_id, license)
    sections = [
        f"# {repo_id.split('/')[1]}",
        _introduction(config),
        _section("How to load it", _loading(config, repo_id)),
        _section("Architecture", _table(_architecture(config))),
        _section("Data", _table(dict(_flat(run.recipe.get("data", {}))))),
        _section("Training", _table(_training(run))),
        _section("Evaluation", _table(_evaluation(run))),
        _section("Curves", "\n\n".join(f"![{plot.stem}](plots/{plot.name})" for plot in run.plots)),
        _section("Licence", license),
    ]
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"))


def _metadata(run: RunFiles, config: Mapping[str, Any], repo_id: str, license: str) -> ModelCardData:
    origin = run.recipe.get("init_from")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="validation",
            dataset_name="held-out documents of the training corpus",
            metric_type=key.removeprefix("val/"),
            metric_name=_METRICS[key],
            metric_value=value,
        )
        for key, value in _validation(run).items()
    ]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2x", config["model_type"]],
        base_model=origin if origin is not None and _is_hub_id(origin) else None,
        model_name=repo_id.split("/")[1],
        eval_results=results or None,
    )


def _is_hub_id(name: str) -> bool:
    return len(PurePath(name).parts) == 2 and not PurePath(name).is_absolute() and not Path(name).exists()


def _introduction(config: Mapping[str, Any]) -> str:
    model_class = (config.get("architectures") or [config["model_type"]])[0]
    readers = _READERS.get(config["model_type"], "transformers")
    return f"A causal language model, `{model_class}`, trained by gpt2x. It is read by {readers}."


def _loading(config: Mapping[str, Any], repo_id: str) -> str:
    remote = ", trust_remote_code=True" if config["model_type"] == "gpt2x" else ""
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{remote})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
        "```"
    )


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    named = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
    return {label: named.get(key) for key, label in _ARCHITECTURE.items()}


def _training(run: RunFiles) -> dict[str, Any]:
    """The run in numbers, then its recipe: batch, precision, optimizer and schedule, field by field."""
    numbers = {label: run.stats.get(key, run.last_values.get(key)) for key, label in _RUN.items()}
    recipe: dict[str, Any] = {
        section: run.recipe[section] for section in ("train", "optimizer") if section in run.recipe
    }
    versions = {f"version of {name}": version for name, version in run.stats.get("versions", {}).items()}
    return numbers | dict(_flat(recipe)) | versions


def _validation(run: RunFiles) -> dict[str, float]:
    values = run.last_values | run.stats
    return {key: values[key] for key in _METRICS if isinstance(values.get(key), int | float)}


def _evaluation(run: RunFiles) -> dict[str, Any]:
    rows: dict[str, Any] = {f"validation, {_METRICS[key]}": value for key, value in _validation(run).items()}
    for name, scores in run.stats.get("evaluation", {}).items():
        for key, value in scores.items():
            if isinstance(value, float) and not key.endswith("_stderr"):
                error = scores.get(f"{key}_stderr")
                rows[f"{name}, {key}"] = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    return rows


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of nested sections by dotted names, where they say something; of absolute paths the last part."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, item in enumerate(value):
                yield from _flat(item, f"{prefix}{key}.{item.get('name') or number}.")
        elif value not in (None, [], {}):
            is_private = isinstance(value, str) and PurePath(value).is_absolute()
            yield f"{prefix}{key}", PurePath(value).name if is_private else value


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {label} | {_text(value)} |" for label, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""
