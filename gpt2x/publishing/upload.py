"""The process that talks to the Hub: `python -m gpt2x.publishing.upload`, a request on stdin, the answer on stdout.

It is a process of its own because the client of huggingface_hub waits for a silent server for ever, in threads that
keep the interpreter alive: only a process can be given up after a time limit.
"""

import json
import sys
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError


def upload(request: dict[str, Any]) -> str:
    """Makes the repository where it is not there, and adds all files in one commit.

    Args:
        request: repo_id, private, message, and files: path in the repository -> path here.

    Returns:
        The repository's address.
    """
    client = HfApi(library_name="gpt2x")
    url = client.create_repo(request["repo_id"], private=request["private"], exist_ok=True)
    # One commit, not upload_folder, which may cut a large folder into several: a reader meets all files or none.
    files = request["files"].items()
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files]
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
    """Answers one request."""
    try:
        answer = {"url": upload(json.load(sys.stdin))}
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        answer = failure(error)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
