"""The README.md of a model on the Hub, written from what its run left."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gpt2x.locate import is_hub_id
from gpt2x.publishing.published_model import PublishedModel
from gpt2x.runs.results import RunFiles

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
# Of LoRA (arXiv:2106.09685), by PEFT's names.
_ADAPTERS = {
    "r": "rank of the adapters",
    "lora_alpha": "scale of the adapters, times their rank",
    "target_modules": "adapted layers",
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


def model_card(directory: Path, *, repo_id: str, license: str | None) -> str:
    """The card: metadata in YAML, then how to load the model and chat with it, how it was made and what it is worth.

    Args:
        directory: a run's, whose config.yaml, stats.json, metrics.jsonl and plots it reads, or a bare model's.
        repo_id: USER/NAME, for the loading example.
        license: an identifier that the Hub knows; None leaves the licence out.
    """
    run = RunFiles.of(directory)
    model = PublishedModel.of(directory)
    metadata = _metadata(run, model, repo_id, license)
    sections = [
        f"# {repo_id.split('/')[1]}",
        model.introduction(),
        _section("How to load it", model.loading(repo_id)),
        _section("Chat", model.chatting()),
        _section("Architecture", _table(_architecture(model))),
        _section("Data", _table(dict(_flat(run.recipe.get("data", {}))))),
        _section("Training", _table(_training(run))),
        _section("Evaluation", _table(_evaluation(run))),
        _section("Curves", "\n\n".join(f"![{plot.stem}](plots/{plot.name})" for plot in run.plots)),
        _section("Licence", license or ""),
    ]
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"))


def _metadata(run: RunFiles, model: PublishedModel, repo_id: str, license: str | None) -> ModelCardData:
    is_whole = model.adapters is None
    model_type = model.config.get("model_type")
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
        library_name="transformers" if is_whole else "peft",
        pipeline_tag="text-generation",
        tags=["gpt2x", *([] if is_whole else ["lora"]), *([model_type] if model_type else [])],
        base_model=_origin(run) if is_whole else model.base,
        model_name=repo_id.split("/")[1],
        eval_results=results or None,
    )


def _origin(run: RunFiles) -> str | None:
    """The model on the Hub that a run started from, or the run it started from, and so on."""
    seen: set[str] = set()
    name = run.recipe.get("init_from")
    while name is not None and Path(name).is_dir() and name not in seen:
        seen.add(name)
        name = RunFiles.of(Path(name)).recipe.get("init_from")
    return name if name is not None and is_hub_id(name) else None


def _architecture(model: PublishedModel) -> dict[str, Any]:
    named = {_OLD_NAMES.get(key, key): value for key, value in model.config.items()}
    rows = {label: named.get(key) for key, label in _ARCHITECTURE.items()}
    return rows | {label: (model.adapters or {}).get(key) for key, label in _ADAPTERS.items()}


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
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                yield from _flat(item, f"{prefix}{key}.{item.get('name') or number}.")
        elif value not in (None, [], {}):
            yield f"{prefix}{key}", [_public(item) for item in value] if isinstance(value, list) else _public(value)


def _public(value: Any) -> Any:
    is_private = isinstance(value, str) and PurePath(value).is_absolute()
    return PurePath(value).name if is_private else value


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {label} | {_text(value)} |" for label, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""
