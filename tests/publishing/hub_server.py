"""A Hub on loopback that speaks what the real client of huggingface_hub says to it: repositories, LFS, commits."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".png")


class HubServer(ThreadingHTTPServer):
    """The server and what it holds.

    Attributes:
        token: the only token it accepts.
        repositories: by id: private or not, files by path, number of commits.
        faults: part of a path -> the status to answer, "hang", or "html" for a proxy's page.
        requests: method, path and Authorization header of every request.
    """

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.repositories: dict[str, dict] = {}
        self.large_files: dict[str, bytes] = {}
        self.faults: dict[str, int | str] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.is_over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub(token: str) -> Iterator[HubServer]:
    server = HubServer(token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def children_of(pid: int) -> set[int]:
    """The processes that a process has started and that are still there, by Linux's /proc."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for file in lists for child in file.read_text().split()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments: object) -> None:
        pass

    def handle_request(self) -> None:
        body = self.read_body()
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        self.server.requests.append((self.command, path, authorization))
        for part, fault in self.server.faults.items():
            if part in path:
                if fault == "hang":
                    self.server.is_over.wait()
                    return
                if fault == "html":
                    return self.answer(b"<html>Bad gateway</html>", status=502)
                return self.answer({"error": "as the test wants it"}, status=int(fault))
        if authorization != f"Bearer {self.server.token}" and not path.startswith("/lfs/"):
            return self.answer({"error": "Invalid credentials"}, status=401)
        getattr(self, f"do_{self.route(path)}")(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def route(self, path: str) -> str:
        if path.startswith("/lfs/"):
            return "large_file"
        routes = ("repos/create", "whoami", "validate-yaml", "preupload", "objects/batch", "commit", "resolve", "tree")
        found = [route for route in routes if f"/{route}" in path]
        return found[0].replace("/", "_").replace("-", "_") if found else "repository"

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: object, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repository(self, path: str) -> tuple[str, dict | None]:
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name = f"{parts[0]}/{parts[1].removesuffix('.git')}"
        return name, self.server.repositories.get(name)

    def do_whoami(self, path: str, body: bytes) -> None:
        self.answer({"name": "user", "type": "user", "orgs": []})

    def do_repos_create(self, path: str, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.server.repositories else 200
        is_private = wanted.get("visibility", "private" if wanted.get("private") else "public") == "private"
        self.server.repositories.setdefault(name, {"private": is_private, "files": {}, "commits": 0})
        self.answer({"url": f"{self.server.url}/{name}"}, status=status)

    def do_validate_yaml(self, path: str, body: bytes) -> None:
        is_headed = json.loads(body)["content"].startswith("---\n")
        self.answer({"warnings": [], "errors": [] if is_headed else [{"message": "no metadata"}]})

    def do_preupload(self, path: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def do_objects_batch(self, path: str, body: bytes) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}}}
            for wanted in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def do_large_file(self, path: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
        self.server.large_files[path.rpartition("/")[2]] = body
        self.answer({})

    def do_commit(self, path: str, body: bytes) -> None:
        name, repository = self.repository(path)
        assert repository is not None
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository["files"][value["path"]] = self.server.large_files[value["oid"]]
        repository["commits"] += 1
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    def do_repository(self, path: str, body: bytes) -> None:
        name, repository = self.repository(path)
        if repository is None:
            return self.answer({"error": "not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": file} for file in repository["files"]]
        self.answer({"id": name, "private": repository["private"], "sha": "1" * 40, "siblings": siblings})

    def do_tree(self, path: str, body: bytes) -> None:
        _, repository = self.repository(path)
        assert repository is not None
        files = repository["files"].items()
        self.answer([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files])

    def do_resolve(self, path: str, body: bytes) -> None:
        _, repository = self.repository(path)
        wanted = path.split("/resolve/")[1].split("/", 1)[1]
        commit = {"X-Repo-Commit": "1" * 40}
        if repository is None or wanted not in repository["files"]:
            return self.answer(b"", status=404, headers={**commit, "X-Error-Code": "EntryNotFound"})
        content = repository["files"][wanted]
        self.answer(content, headers={**commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
