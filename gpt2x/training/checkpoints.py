"""Checkpoints: at once an exactly resumable state and a stock Hugging Face model.

    checkpoints/step-000100/
        model/          the weights as a transformers model, float32, with the tokenizer
        state/          optimizer.safetensors and trainer.json
        manifest.json   size and sha256 of every file above, written last

A checkpoint is made in a temporary sibling, flushed to the disk and renamed; only then are older ones deleted. A
directory without a manifest that fits is never resumed from. Nothing here is ever unpickled.
"""

import hashlib
import json
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2x.errors import UserError
from gpt2x.manifest import MANIFEST, damage_of, missing_or_cut, named_checkpoints
from gpt2x.shards.files import sync
from gpt2x.training.sharding import state_in_shards


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


# --- the optimizer's state as tensors --------------------------------------------------------------------------------


def optimizer_tensors(optimizers: Iterable[Optimizer], names: Mapping[int, str]) -> dict[str, Tensor]:
    """The state of the optimizers, keyed ``parameter name/state name``: the very tensors, where they are.

    Args:
        optimizers: the optimizers, whose parameters are disjoint.
        names: the name of each parameter by its ``id``.
    """
    return {
        f"{names[id(parameter)]}/{key}": value.detach()
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizers: Iterable[Optimizer], names: Mapping[int, str], tensors: Mapping[str, Tensor]
) -> None:
    """Puts saved state back into freshly made optimizers.

    Raises:
        UserError: where the saved state belongs to other parameters.
    """
    saved: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, state_name = key.rpartition("/")
        saved[name][state_name] = tensor
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        missing = [names[id(parameter)] for parameter in parameters if names[id(parameter)] not in saved]
        if missing:
            raise UserError(
                f"the checkpoint has no optimizer state for {missing[0]}; resume with the recipe that made it."
            )
        state = {
            position: state_in_shards(parameter, saved.pop(names[id(parameter)]))
            for position, parameter in enumerate(parameters)
        }
        # torch places the state beside its parameter, except where an optimizer wants a step count on the host
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if saved:
        raise UserError(
            f"the checkpoint has optimizer state for {next(iter(saved))}, which this run does not train; "
            f"resume with the recipe that made it."
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_checkpoint(
    target: Path,
    *,
    write_model: Callable[[Path], object],
    optimizer: dict[str, Tensor],
    trainer: Mapping[str, Any],
) -> None:
    """Writes a whole checkpoint, or nothing that could be mistaken for one.

    Args:
        target: the directory of the checkpoint; an older one of that name is replaced.
        write_model: writes model and tokenizer into the directory it is given.
        optimizer: tensors of the optimizer's state.
        trainer: what else a resumed run needs, as JSON.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        (temporary / "state").mkdir(parents=True)
        write_model(temporary / "model")
        save_file(optimizer, temporary / "state" / "optimizer.safetensors")
        _write_json(temporary / "state" / "trainer.json", trainer)
        _write_json(temporary / MANIFEST, {"files": _describe_files(temporary)})
        _flush_directory(temporary)
        if target.exists():  # a damaged one: whole ones are not written again
            shutil.rmtree(target)
        temporary.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_checkpoints(run_dir: Path, checkpoints: Iterable[Path]) -> None:
    """Deletes checkpoints, and what killed saves and deletions left behind.

    A checkpoint is renamed before it is deleted, so that a kill leaves it whole or nothing of its name.
    """
    for checkpoint in checkpoints:
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.tmp-{uuid.uuid4().hex[:8]}"))
    for leftover in (run_dir / "checkpoints").glob("step-*.tmp-*"):
        shutil.rmtree(leftover)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(directory)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_directory(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        sync(path)
    sync(directory)


# --- reading ---------------------------------------------------------------------------------------------------------


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first: those whose manifest names files of the right sizes."""
    return [path for path in named_checkpoints(run_dir) if missing_or_cut(path) is None]


def newest_checkpoint(
    run_dir: Path, *, is_wanted: Callable[[Path], bool] = lambda _checkpoint: True
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written.

    Args:
        run_dir: the run's.
        is_wanted: asked of each whole checkpoint; those that are not are passed over silently.

    Returns:
        Its directory (None where there is none), and a line for each newer one that was passed over.
    """
    passed_over: list[str] = []
    for checkpoint in reversed(named_checkpoints(run_dir)):
        damage = damage_of(checkpoint)
        if damage is None and is_wanted(checkpoint):
            return checkpoint, passed_over
        if damage is not None:
            passed_over.append(f"{checkpoint} is damaged ({damage}); looking for an older one.")
    return None, passed_over


def read_state(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors and the trainer's JSON of a checkpoint."""
    trainer = json.loads((checkpoint / "state" / "trainer.json").read_text(encoding="utf-8"))
    return load_file(checkpoint / "state" / "optimizer.safetensors"), trainer


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The name of each parameter by its ``id``; a tied one has its first name."""
    return {id(parameter): name for name, parameter in model.named_parameters()}
