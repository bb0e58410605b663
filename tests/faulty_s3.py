"""An S3 server that fails as real ones do: a proxy on loopback in front of moto's, which cannot."""

import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ANSWERS = {
    "slow down": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),
    "checksum": (400, "BadDigest"),
}


@dataclass
class Faults:
    """Which requests fail, by a part of their path: the first ones of each path, in the order of ``kinds``.

    ``slow down`` is 503, ``conflict`` 409, ``checksum`` a digest that does not fit; ``lost`` stores the object and
    closes the connection without an answer; ``flip`` answers with one byte of the object changed.
    """

    kinds: tuple[str, ...]
    within: str
    method: str = "PUT"
    made: Counter[str] = field(default_factory=Counter)
    _seen: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_for(self, method: str, path: str) -> str:
        """Returns how this request is to fail; empty: not at all."""
        path = urlsplit(path).path  # an upload in parts has another query at every attempt
        if method != self.method or self.within not in path:
            return ""
        with self._lock:
            turn = self._seen[path]
            self._seen[path] += 1
            kind = self.kinds[turn] if turn < len(self.kinds) else ""
            self.made[kind] += bool(kind)
        return kind


@contextmanager
def serve(endpoint: str, faults: Faults) -> Iterator[str]:
    """Yields the endpoint of a proxy to ``endpoint``."""
    target = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self._read_body()
            headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
            headers["Content-Length"] = str(len(body))
            kind = faults.next_for(self.command, self.path)
            if kind in ANSWERS:
                status, code = ANSWERS[kind]
                return self._answer(status, {}, f"<Error><Code>{code}</Code><Message>{kind}</Message></Error>".encode())
            onward = http.client.HTTPConnection(target, timeout=60)
            onward.request(self.command, self.path, body, headers)
            answer = onward.getresponse()
            content = answer.read()
            onward.close()
            if kind == "lost":
                self.close_connection = True
                return None
            if kind == "flip":
                middle = len(content) // 2
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            return self._answer(answer.status, dict(answer.getheaders()), content)

        def _read_body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            return body

        def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
