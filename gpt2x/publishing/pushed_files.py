"""What is pushed: the files that belong to a model, by their names, and the plots of its run."""

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from gpt2x.corpus.values import listed
from gpt2x.errors import UserError
from gpt2x.locate import does_not_exist, find_model, is_hub_id, say
from gpt2x.manifest import MANIFEST, WEIGHTS_INDEX, indexed_weights
from gpt2x.publishing.published_model import ADAPTER_CONFIG, read_adapter_config
from gpt2x.runs.layout import RunLayout
from gpt2x.runs.results import RunFiles

# What transformers, PEFT and the exports write. Everything else that lies there may be anything: a key, an optimizer.
_NAMES = (
    *("config.json", "generation_config.json", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
    *("model.safetensors", "model-*.safetensors", WEIGHTS_INDEX, "adapter_model.safetensors", ADAPTER_CONFIG),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tekken.json", "*.tiktoken"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("onnx/*.onnx", "onnx/*.onnx_data*", "genai_config.json", "*.gguf"),
    *(file.name for file in (Path(__file__).parents[2] / "modeling_gpt2x").glob("*_gpt2x.py")),
)
_FOLDERS = {name.split("/")[0] for name in _NAMES if "/" in name}


def files_to_push(directory: Path) -> dict[str, Path]:
    """The files of a model, and of the run it came from the plots: path in the repository -> file.

    What lies beside them and is none of them is left out, which a line says. So is the manifest, without a line: it
    would call the model damaged that somebody else puts in its place in the repository.

    Raises:
        UserError: where there is no model, or a damaged one, or a file of it is a link to somewhere else.
    """
    if not directory.is_dir():  # a Hub id is nothing to push
        raise does_not_exist(str(directory), "the directory of a run or of a model")
    model_dir = Path(find_model(str(directory)))
    if model_dir.parent.parent == RunLayout(directory).checkpoints_dir:
        say(f"{directory} has no final model: its newest whole checkpoint is pushed, {model_dir.parent.name}")
    shards = {name for name in indexed_weights(model_dir) if name.endswith(".safetensors")}
    found = list(_names_in(model_dir))
    files = {name: _no_link(model_dir / name) for name in found if name in shards or _belongs(name)}
    _check_whole(model_dir, files)
    if others := [name for name in found if name not in files and name != MANIFEST]:
        say(f"not pushed, since no part of a model: {listed(others, most=3)}, in {model_dir}")
    return files | {f"plots/{plot.name}": _no_link(plot) for plot in RunFiles.of(directory).plots}


def _names_in(model_dir: Path) -> Iterator[str]:
    """What lies there, in order, a folder by its own name; of one that may hold parts of a model what lies in it."""
    for place in sorted(model_dir.iterdir()):
        if place.name in _FOLDERS and place.is_dir() and not place.is_symlink():
            yield from (f"{place.name}/{file.name}" for file in sorted(place.iterdir()))
        else:
            yield place.name


def _belongs(name: str) -> bool:
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _NAMES)


def _no_link(file: Path) -> Path:
    """The file; what a link leads to may be anything, and is no part of the directory that is to be pushed."""
    if file.is_symlink() or not file.is_file():
        raise UserError(
            f"{file} is a link or no regular file; put a copy of the file there (`cp -rL` copies a directory so), or "
            f"remove it."
        )
    return file


def _check_whole(model_dir: Path, files: Collection[str]) -> None:
    """Raises a UserError where others could not load a model, as far as headers tell: it lacks a tensor or has one of
    another shape, or they are adapters of a model that only this machine has."""
    if ADAPTER_CONFIG in files:
        base = read_adapter_config(model_dir)["base_model_name_or_path"]
        if not is_hub_id(base):
            raise UserError(
                f"the adapters of {model_dir} belong to {base}, which is no Hub id; push that "
                f"model and train on its Hub id, or merge them by lora.merge true."
            )
    elif not any(name.endswith(".onnx") for name in files) or any(name.endswith(".safetensors") for name in files):
        from gpt2x.models import load_whole  # imports torch

        load_whole(str(model_dir), device_map="meta")
