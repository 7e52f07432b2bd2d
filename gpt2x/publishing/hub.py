"""A model and its card on the Hub: what belongs to the model, by name, and the plots of its run."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gpt2x.commands import shell_command, tool
from gpt2x.corpus.values import listed
from gpt2x.errors import UserError
from gpt2x.locate import does_not_exist, find_model, is_hub_id, say
from gpt2x.manifest import MANIFEST, WEIGHTS_INDEX, indexed_weights
from gpt2x.publishing.model_card import model_card
from gpt2x.publishing.published_model import ADAPTER_CONFIG, read_adapter_config
from gpt2x.runs.layout import RunLayout
from gpt2x.runs.results import RunFiles

COMMAND = [sys.executable, "-m", "gpt2x.publishing.upload"]
_REASONS = {
    401: "the Hub does not accept the token (401); set HF_TOKEN to a valid one or run `{login}`",
    403: "the token may not write there (403); use one with write access",
    404: "the repository is not there or the token may not see it (404); use one with write access",
    413: "the Hub refuses a file as too large (413); export a smaller dtype",
    429: "the Hub counts too many requests (429); wait some minutes",
}
# What transformers, PEFT and the exports write. Everything else that lies there may be anything: a key, an optimizer.
_NAMES = (
    *("config.json", "generation_config.json", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
    *("model.safetensors", "model-*.safetensors", WEIGHTS_INDEX, "adapter_model.safetensors", ADAPTER_CONFIG),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tekken.json", "*.tiktoken"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("onnx/*.onnx", "onnx/*.onnx_data*", "genai_config.json", "*.gguf"),
    *(file.name for file in (Path(__file__).parents[2] / "modeling_gpt2x").glob("*_gpt2x.py")),
    # The code of models that were saved before it was five files.
    *(f"{name}_gpt2x.py" for name in ("cache", "conversion", "import", "loss", "masks", "packed")),
)
_FOLDERS = {name.split("/")[0] for name in _NAMES if "/" in name}


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
    check_push(push.repo_id)
    files = files_to_push(directory)
    texts = {}
    if "README.md" not in files:
        texts["README.md"] = model_card(directory, repo_id=push.repo_id, license=push.license)
    return _upload(directory, push, files, texts)


def check_push(repo_id: str) -> None:
    """Raises UserError where a push cannot go to a repository for its name, or for want of a token; asks nobody."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"repo_id ({repo_id}) must be USER/NAME of letters, digits, '-', '_' and '.', with a letter or digit at "
            f"both ends and 96 in all; correct it."
        ) from error
    if repo_id.count("/") != 1:
        raise UserError(f"repo_id ({repo_id}) must be USER/NAME; put your user name or organization in front.")
    if get_token() is None:
        login = tool("hf", "auth", "login")
        raise UserError(f"{repo_id} cannot be pushed to, as there is no token; set HF_TOKEN or run `{login}`.")


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
        return _REASONS[status].format(login=tool("hf", "auth", "login"))
    if status is not None and status >= 500:
        return f"the Hub has a failure of its own ({status}); wait some minutes"
    return message


def _failed(directory: Path, push: Push, reason: str) -> UserError:
    """The one line of a failure. The client's own messages never hold the token; this makes sure."""
    options = ["--public"] if push.is_public else []
    options += ["--license", push.license] if push.license is not None else []
    again = shell_command("push_to_hub", directory, "--repo_id", push.repo_id, *options)
    line = f"{push.repo_id} was not updated: {reason}; then `{again}` tries again."
    token = get_token()
    return UserError(line.replace(token, "<token>") if token else line)


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
