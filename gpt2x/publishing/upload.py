"""The process that talks to the Hub: `python -m gpt2x.publishing.upload`, a request on stdin, the answer on stdout.

It is a process of its own because the client of huggingface_hub waits for a silent server for ever, in threads that
keep the interpreter alive: only a process can be given up after a time limit. It ends with the one that started it:
when stdin is closed, nobody is there to be answered.
"""

import json
import os
import sys
import threading
from io import FileIO
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError


def upload(request: dict[str, Any]) -> str:
    """Makes the repository where it is not there, and adds all files in one commit.

    Args:
        request: repo_id, private, message; files: path in the repository -> path here; texts: path there -> content.

    Returns:
        The repository's address.
    """
    client = HfApi(library_name="gpt2x")
    url = client.create_repo(request["repo_id"], private=request["private"], exist_ok=True)
    # One commit, not upload_folder, which may cut a large folder into several: a reader meets all files or none.
    contents = request["files"] | {name: text.encode() for name, text in request["texts"].items()}
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
    client.create_commit(request["repo_id"], additions, commit_message=request["message"])
    return str(url)


def failure(error: BaseException | None) -> dict[str, Any]:
    """What the parent needs to explain a failure: the HTTP status behind it, and its message on one line."""
    message = " ".join(str(error).split())
    if isinstance(error, json.JSONDecodeError):
        message = "the Hub's answer is not what its client expects; it may be down"
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return {"status": None if error is None else error.response.status_code, "message": message}


def main() -> None:
    """Answers one request, unless standard input is closed before."""
    # Without a buffer, which the thread would hold locked when the interpreter ends.
    requests = FileIO(sys.stdin.fileno(), closefd=False)
    request = json.loads(requests.readline())
    threading.Thread(target=_end_with_parent, args=[requests], daemon=True).start()
    try:
        answer = {"url": upload(request)}
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        answer = failure(error)
    print(json.dumps(answer))


def _end_with_parent(requests: FileIO) -> None:
    requests.read()  # nothing more is asked: this returns at the end
    os._exit(1)


if __name__ == "__main__":
    main()
