"""A Hub on loopback that serves .jsonl files through the real client, and misbehaves at fixed places."""

import json
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40
# What happens to the first, second, ... request for a file; later ones meet these again.
ACCIDENTS = ("reset", None, None, "503", None, None, None, "stall", None, None, "429", None, None, None)
STALL_S = 12.0


class FlakyHub(ThreadingHTTPServer):
    """Serves data sets, each a mapping of file names to contents.

    Attributes:
        accidents: what happens to the requests for a file, in turn; empty for a faultless server.
        met: how often which accident was met.
        is_down: whether every request is answered 503.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.accidents, self.is_down = repositories, (), False
        self.requests, self.met = Counter(), Counter()
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def accident(self, path: str) -> str | None:
        """What happens to this request for a file."""
        with self.lock:
            number = self.requests[path]
            self.requests[path] += 1
            found = self.accidents[number % len(self.accidents)] if self.accidents else None
            self.met[found] += 1
        return "503" if self.is_down else found

    def handle_error(self, request, client_address) -> None:
        """A client that gave up is nothing to talk about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        for name, files in self.server.repositories.items():
            if path.startswith(f"/datasets/{name}/resolve/"):
                return self._file(path, files.get(path.rpartition("/")[2]))
            if path.startswith(f"/api/datasets/{name}"):
                return self._api(path, name, files)
        self._send(404, b"")

    def _api(self, path: str, name: str, files: dict[str, bytes]) -> None:
        entries = [
            {"type": "file", "path": file, "size": len(content), "oid": COMMIT} for file, content in files.items()
        ]
        about = {"id": name, "sha": COMMIT, "tags": [], "siblings": [{"rfilename": file} for file in files]}
        content = json.dumps(entries if "/tree/" in path else about).encode()
        self._send(503 if self.server.is_down else 200, content)

    def _file(self, path: str, content: bytes | None) -> None:
        if content is None:
            return self._send(404, b"")
        if self.command == "HEAD":
            return self._send(200, content)
        first, last = 0, len(content) - 1
        if requested := self.headers.get("Range"):
            first, last = (int(bound) for bound in requested.partition("=")[2].split("-"))
        part = content[first : last + 1]
        send: dict[str | None, Callable[[bytes], None]] = {"reset": self._reset, "stall": self._stall}
        accident = self.server.accident(path)
        if accident in send:
            self._head(206, len(part))
            self.wfile.write(part[: len(part) // 2])
            return send[accident](part)
        self._send(int(accident or (206 if requested else 200)), b"" if accident else part)

    def _reset(self, part: bytes) -> None:
        """Half of it, then a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wfile.flush()
        self.connection.close()
        self.close_connection = True

    def _stall(self, part: bytes) -> None:
        """Half of it, and the rest when nobody waits for it any more."""
        time.sleep(STALL_S)
        self.wfile.write(part[len(part) // 2 :])

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(length), "ETag": '"x"', "X-Repo-Commit": COMMIT}
        for name, value in (headers | ({"X-Error-Code": "EntryNotFound"} if status == 404 else {})).items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, content: bytes) -> None:
        self._head(status, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = _answer  # noqa: N815


@contextmanager
def flaky_hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[FlakyHub]:
    """Serves until the block ends; faultless until accidents are set."""
    with FlakyHub(repositories) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
