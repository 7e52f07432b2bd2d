"""A model and its card on the Hub."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gpt2x.errors import UserError
from gpt2x.locate import does_not_exist, find_model, is_hub_id
from gpt2x.models import load_whole
from gpt2x.publishing.model_card import model_card
from gpt2x.publishing.published_model import ADAPTER_CONFIG, read_adapter_config
from gpt2x.publishing.run_files import RunFiles

# What lies in a model's directory without being part of the model.
_LEFT_OUT = ("exports", "plots")
_REASONS = {
    401: "the Hub does not accept the token (401); set HF_TOKEN to a valid one or run `hf auth login`",
    403: "the token may not write there (403); use one with write access",
    404: "the repository is not there or the token may not see it (404); use one with write access",
    413: "the Hub refuses a file as too large (413); export a smaller dtype",
    429: "the Hub counts too many requests (429); wait some minutes",
}


@dataclass(frozen=True, kw_only=True)
class Push:
    """What goes where."""

    repo_id: str
    """USER/NAME."""
    is_public: bool = False
    """Whether a repository made now is visible to everyone; one that exists stays as it is."""
    license: str | None = None
    """The licence named on the card; None for a card that names none."""
    time_limit_s: float | None = None
    """Seconds until the upload is given up; None for ten minutes and one second per megabyte."""


def push_run(directory: Path, push: Push) -> str:
    """Uploads a run's model, card and plots, or a model directory, in one commit.

    The client reads the token itself, from HF_TOKEN or from what `hf auth login` stored; it passes through no
    argument, file or message of ours. The upload is a process of its own, which is killed at the time limit.

    Args:
        directory: a run's or a model's.
        push: where to.

    Returns:
        The repository's address.

    Raises:
        UserError: one line that says what went wrong and how to try again; nothing is half uploaded, and of a damaged
            model nothing at all.
    """
    _check_repo_id(push.repo_id)
    if get_token() is None:
        raise _failed(directory, push, "there is no token; set HF_TOKEN or run `hf auth login`")
    files = files_to_push(directory)
    with tempfile.TemporaryDirectory() as scratch_dir:
        if "README.md" not in files:
            files["README.md"] = Path(scratch_dir) / "README.md"
            card = model_card(directory, repo_id=push.repo_id, license=push.license)
            files["README.md"].write_text(card, encoding="utf-8")
        return _upload(directory, push, files)


def files_to_push(directory: Path) -> dict[str, Path]:
    """The files of a model, and of the run it came from the plots: path in the repository -> file.

    Raises:
        UserError: where there is no model, or a damaged one.
    """
    if not directory.is_dir():  # a Hub id is nothing to push
        raise does_not_exist(str(directory), "the directory of a run or of a model")
    model_dir = Path(find_model(str(directory)))
    files = {}
    for file in sorted(path for path in model_dir.rglob("*") if path.is_file()):
        parts = file.relative_to(model_dir).parts
        is_left_out = parts[0] in _LEFT_OUT or any(part.startswith((".", "__")) for part in parts[:-1])
        if not is_left_out and not file.name.startswith(".") and file.suffix not in (".tmp", ".partial"):
            files["/".join(parts)] = file
    _check_whole(model_dir)
    for plot in RunFiles.of(directory).plots:
        files[f"plots/{plot.name}"] = plot
    return files


def _check_whole(model_dir: Path) -> None:
    """Raises a UserError where others could not load a model, as far as headers tell: it lacks a tensor or has one of
    another shape, or they are adapters of a model that only this machine has."""
    is_adapter, is_onnx = os.path.lexists(model_dir / ADAPTER_CONFIG), any(model_dir.glob("onnx/*.onnx"))
    if is_adapter:
        base = read_adapter_config(model_dir)["base_model_name_or_path"]
        if not is_hub_id(base):
            raise UserError(
                f"the adapters of {model_dir} belong to {base}, which is no Hub id; push that "
                f"model and train on its Hub id, or merge them by lora.merge true."
            )
    elif any(model_dir.glob("*.safetensors")) or not is_onnx:
        load_whole(str(model_dir), device_map="meta")


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repo_id ({repo_id!r}) must be USER/NAME: {' '.join(str(error).split())}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"repo_id ({repo_id!r}) must be USER/NAME; put your user name or organization in front.")


def _upload(directory: Path, push: Push, files: dict[str, Path]) -> str:
    request = {
        "repo_id": push.repo_id,
        "private": not push.is_public,
        "message": f"Upload {directory.name} with gpt2x",
        "files": {name: str(file) for name, file in files.items()},
    }
    num_bytes = sum(file.stat().st_size for file in files.values())
    time_limit_s = push.time_limit_s or 600 + num_bytes / 1e6
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "gpt2x.publishing.upload"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=time_limit_s,
        )
    except subprocess.TimeoutExpired:
        reason = f"the Hub did not answer within {time_limit_s:.0f} s (--time_limit_s)"
        raise _failed(directory, push, reason) from None
    answer = _answer(finished)
    if "url" not in answer:
        raise _failed(directory, push, _reason(answer))
    return answer["url"]


def _answer(finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The process's answer; where it died without one, the last line it printed."""
    if finished.returncode == 0:
        return json.loads(finished.stdout.splitlines()[-1])
    lines = finished.stderr.strip().splitlines() or [f"the upload ended with {finished.returncode}"]
    return {"status": None, "message": lines[-1]}


def _reason(answer: dict[str, Any]) -> str:
    status, message = answer["status"], answer["message"]
    if status in _REASONS:
        return _REASONS[status]
    if status is not None and status >= 500:
        return f"the Hub has a failure of its own ({status}); wait some minutes"
    return message


def _failed(directory: Path, push: Push, reason: str) -> UserError:
    """The one line of a failure. The client's own messages never hold the token; this makes sure."""
    command = f"python scripts/push_to_hub.py {shlex.quote(str(directory))} --repo_id {push.repo_id}"
    command += " --public" if push.is_public else ""
    command += f" --license {shlex.quote(push.license)}" if push.license is not None else ""
    line = f"{push.repo_id} was not updated: {reason}; then `{command}` tries again."
    token = get_token()
    return UserError(line.replace(token, "<token>") if token else line)
