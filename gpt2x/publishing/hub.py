"""A model and its card on the Hub."""

import json
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gpt2x.errors import UserError
from gpt2x.publishing.model_card import model_card
from gpt2x.publishing.pushed_files import files_to_push

COMMAND = [sys.executable, "-m", "gpt2x.publishing.upload"]
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
    texts = {}
    if "README.md" not in files:
        texts["README.md"] = model_card(directory, repo_id=push.repo_id, license=push.license)
    return _upload(directory, push, files, texts)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repo_id ({repo_id!r}) must be USER/NAME: {' '.join(str(error).split())}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"repo_id ({repo_id!r}) must be USER/NAME; put your user name or organization in front.")


def _upload(directory: Path, push: Push, files: dict[str, Path], texts: dict[str, str]) -> str:
    request = {
        "repo_id": push.repo_id,
        "private": not push.is_public,
        "message": f"Upload {directory.name} with gpt2x",
        "files": {name: str(file.absolute()) for name, file in files.items()},
        "texts": texts,
    }
    num_bytes = sum(file.stat().st_size for file in files.values())
    time_limit_s = push.time_limit_s or 600 + num_bytes / 1e6
    try:
        answer = _answer(COMMAND, request, time_limit_s)
    except subprocess.TimeoutExpired:
        reason = f"the Hub did not answer within {time_limit_s:.0f} s (--time_limit_s)"
        raise _failed(directory, push, reason) from None
    if "url" not in answer:
        raise _failed(directory, push, _reason(answer))
    return answer["url"]


def _answer(command: list[str], request: dict[str, Any], time_limit_s: float) -> dict[str, Any]:
    """The process's answer; where it died without one, the last line it printed.

    The process does not outlive the block, whatever ends this one: it is killed, or, where this process is killed
    itself, notices that its standard input is closed.

    Raises:
        subprocess.TimeoutExpired: where it has not ended within the time limit.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=complained,
            start_new_session=True,  # what Ctrl-C means for it is for this process to say
        )
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            code = process.wait(time_limit_s)
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
        if code == 0:
            return json.loads(_lines(said)[-1])
        return {"status": None, "message": (_lines(complained) or [f"the upload ended with {code}"])[-1]}


def _lines(output: IO[bytes]) -> list[str]:
    output.seek(0)
    return output.read().decode(errors="replace").strip().splitlines()


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
    command += " --public true" if push.is_public else ""
    command += f" --license {shlex.quote(push.license)}" if push.license is not None else ""
    line = f"{push.repo_id} was not updated: {reason}; then `{command}` tries again."
    token = get_token()
    return UserError(line.replace(token, "<token>") if token else line)
