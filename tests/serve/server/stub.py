"""A server that answers the page with made-up numbers, and does what a test asks of it: no model, no engine."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class Stub:
    """What it will answer; a test changes it while the page looks on.

    Attributes:
        leaving: adapters that are being unloaded.
        busy: tokens flow from one look at /stats to the next.
        answer: pieces of the next chat answers. refusal: what they get instead: status and message.
        error: told in the middle of an answer. breaks: an answer has no end.
        more: where set, an answer waits for it after its first piece. left: set when a client went away in an answer.
        asked: bodies of the chat requests.
    """

    layers: int = 4
    experts: int = 16
    busy: bool = True
    key: str | None = None
    chat: bool = True
    state: str = "ready"
    adapters: list[str] = field(default_factory=lambda: ["law", "medicine"])
    answer: list[str] = field(default_factory=lambda: ["Hello", ", ", "world", "."])
    refusal: tuple[int, str] | None = None
    more: threading.Event | None = None
    error: str | None = None
    breaks: bool = False
    leaving: tuple[str, ...] = ()
    left: threading.Event = field(default_factory=threading.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)
    looks: int = 0

    def __post_init__(self) -> None:
        draw = random.Random(7)
        self.weights = [[draw.gammavariate(1.6, 1.0) for _ in range(self.experts)] for _ in range(self.layers)]
        self.load = [[0] * self.experts for _ in range(self.layers)]
        self.generated = 0

    def stats(self) -> dict[str, Any]:
        self.looks += 1
        if self.busy:
            self.generated += 180 + 60 * (self.looks % 5)
            for load, weights in zip(self.load, self.weights, strict=True):
                for expert, weight in enumerate(weights):
                    load[expert] += int(200 * weight)
        running = 11 if self.busy else 0
        return {
            "model": "tiny-moe",
            "state": self.state,
            "uptime": 4000.0 + self.looks,
            "chat": self.chat,
            "max_context": 4096,
            "max_batch": 64,
            "max_queue": 256,
            "steps": self.looks,
            "preemptions": 0,
            "requests": {"running": running, "waiting": 3 if self.busy else 0, "finished": 1234},
            "tokens": {"prompt": 4 * self.generated, "cached": self.generated, "generated": self.generated},
            "pages": {"total": 4096, "used": 1400 if self.busy else 0, "cached": 900, "size": 16},
            "slots": {"used": 12 * len(self.adapters), "total": 64},
            "adapters": [
                *({"name": name, "running": 2, "state": "ready"} for name in self.adapters),
                *({"name": name, "running": 1, "state": "unloading"} for name in self.leaving),
            ],
            "experts": [
                {"layer": f"model.layers.{number}.mlp.experts", "load": load} for number, load in enumerate(self.load)
            ],
        }


@contextmanager
def serving(stub: Stub, port: int = 0) -> Iterator[str]:
    """The address of the stub while it runs."""

    class Handler(_Handler):
        pass

    Handler.stub = stub
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    stub: Stub

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/" or path.startswith("/page/"):
            self._file(path.removeprefix("/page/").removeprefix("/") or "index.html")
        elif self._refused():
            pass
        elif path == "/stats":
            self._json(200, self.stub.stats())
        elif path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": name} for name in ["tiny-moe", *self.stub.adapters]]})
        else:
            self._error(404, "no such page")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        self.stub.asked.append(body)
        if self.stub.refusal:
            self._error(*self.stub.refusal)
            return
        self._head(200, "text/event-stream")
        try:
            self._stream()
        except OSError:
            self.stub.left.set()

    def _stream(self) -> None:
        chat = "messages" in self.stub.asked[-1]
        for number, piece in enumerate(self.stub.answer):
            self._event({"choices": [{"index": 0, "finish_reason": None, **_piece(piece, chat)}]})
            if number == 0 and self.stub.more:
                self._wait(self.stub.more)
        if self.stub.error:
            self._event({"error": {"message": self.stub.error, "type": "server_error", "code": "engine_failed"}})
        if self.stub.error or self.stub.breaks:
            return
        self._event({"choices": [{"index": 0, "finish_reason": "stop", **_piece("", chat)}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(self.stub.answer)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _wait(self, more: threading.Event) -> None:
        """Comments go out meanwhile: where nobody reads them any more, writing fails."""
        until = time.monotonic() + 30
        while not more.wait(0.02) and time.monotonic() < until:
            self.wfile.write(b": still here\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _refused(self) -> bool:
        if self.stub.key is None or self.headers.get("Authorization") == f"Bearer {self.stub.key}":
            return False
        self._error(401, "this server needs an API key")
        return True

    def _file(self, name: str) -> None:
        text = (resources.files("moesaic.serve") / "server" / "page_files" / name).read_bytes()
        self._head(200, TYPES[name.rsplit(".", 1)[1]], len(text))
        self.wfile.write(text)

    def _json(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self._head(status, "application/json", len(text))
        self.wfile.write(text)

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "invalid_request_error", "code": None}})

    def _head(self, status: int, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-cache")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _piece(text: str, chat: bool) -> dict[str, Any]:
    return {"delta": {"content": text}} if chat else {"text": text}
