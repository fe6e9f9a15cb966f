"""A server on a free port of this machine, in the test's process; and an engine that does what a test tells it."""

from __future__ import annotations

import http.client
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from openai import OpenAI
from tests.serve.tiny import VOCABULARY, byte_tokenizer

from moesaic.serve.request import EngineStats, FinishReason, Output, Request, UnknownAdapterError
from moesaic.serve.server.run import Server, listen, url
from moesaic.serve.server.service import Loaded, Service
from moesaic.serve.server.settings import ServerSettings
from moesaic.serve.server.stats import NOTHING
from moesaic.serve.text import token_bytes
from moesaic.serve.vocabulary import Vocabulary

PATIENCE = 60.0
"""Seconds after which a test gives up; nothing waits for it otherwise."""
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@dataclass
class Running:
    """A server that answers."""

    url: str
    service: Service
    server: Server
    changed: threading.Event

    @property
    def engine(self) -> Any:
        assert self.service.loaded is not None
        return self.service.loaded.engine

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE, **options)

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body (JSON where it is JSON) of one request; ``body``: bytes, or what becomes JSON."""
        told = dict(headers or {})
        if body is not None:
            told.setdefault("Content-Type", "application/json")
        connection = self.connect()
        try:
            connection.request(
                method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), told
            )
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        answered = {name.lower(): value for name, value in response.getheaders()}
        is_json = answered.get("content-type", "").startswith("application/json")
        return response.status, answered, json.loads(text) if is_json else text.decode()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=PATIENCE)

    def resume(self) -> None:
        """Let a paused engine go on."""
        self.engine.paused = False
        self.service.loop.cancel([])  # a command wakes its thread


@contextmanager
def serving(build: Callable[[], Loaded], *, wait: bool = True, **settings: Any) -> Iterator[Running]:
    """A server around what ``build`` makes; ended by the same way as a signal ends it."""
    chosen = ServerSettings(**{"name": "base", "port": 0, "drain_seconds": 5.0, **settings})
    listener = listen(chosen.host, chosen.port)
    changed = threading.Event()
    service = Service(chosen, build, on_change=lambda _: changed.set())
    server = Server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    address = url(chosen, listener)
    thread.start()
    try:
        if wait:
            assert changed.wait(PATIENCE)
            assert service.state == "ready", service.load_error
            changed.clear()
        yield Running(address, service, server, changed)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        service.stop()
        assert not thread.is_alive()
        assert service.loop.join(PATIENCE)


class FakeEngine:
    """Says "a" once a step for every continuation.

    Attributes:
        paused: no step is made; see :meth:`Running.resume`.
        raises: what the next steps raise that have something to compute. refuses: what ``add`` raises.
        batch: requests of a step at most. added: ids of requests.
        was_cancelled: set where one was cancelled while it ran.
    """

    def __init__(self) -> None:
        self.paused = False
        self.computing: tuple[str, ...] = ()
        self.batch = 64
        self.raises: deque[Exception] = deque()
        self.added: list[str] = []
        self.was_cancelled = threading.Event()
        self.refuses: Exception | None = None
        self.adapters: dict[str, int] = {}
        self._open: dict[str, tuple[Request, dict[int, int]]] = {}
        self._outputs: list[Output] = []
        self._stats = NOTHING

    @property
    def has_work(self) -> bool:
        return bool(self._open or self._outputs) and not self.paused

    def add(self, request: Request) -> None:
        if self.refuses is not None:
            raise self.refuses
        if request.adapter is not None and request.adapter not in self.adapters:
            raise UnknownAdapterError(f"there is no adapter {request.adapter!r}")
        self._open[request.id] = (request, dict.fromkeys(range(request.sampling.n), 0))
        self.added.append(request.id)

    def cancel(self, request_id: str) -> None:
        if found := self._open.pop(request_id, None):
            self.was_cancelled.set()
            self._outputs += [Output(request_id, index, (), "", (), "cancelled") for index in found[1]]

    def step(self) -> list[Output]:
        self.computing = tuple(self._open)[: self.batch]
        if self.raises and self._open:
            raise self.raises.popleft()
        outputs, self._outputs = self._outputs, []
        for request, counts in [self._open[name] for name in self.computing]:
            for index in list(counts):
                counts[index] += 1
                reason: FinishReason | None = (
                    "length" if counts[index] == (request.sampling.max_tokens or 400) else None
                )
                outputs.append(Output(request.id, index, (97,), "a", (), reason, len(request.prompt_ids), 0))
                if reason:
                    del counts[index]
            if not counts:
                del self._open[request.id]
        generated = self._stats.generated_tokens + len(outputs)
        self._stats = replace(self._stats, steps=self._stats.steps + 1, generated_tokens=generated)
        return outputs

    def stats(self) -> EngineStats:
        return replace(self._stats, running=len(self._open), adapters=dict.fromkeys(self.adapters, 0))

    def publish_adapter(self, prepared: Any) -> None:
        raise NotImplementedError

    def unload_adapter(self, name: str) -> None:
        raise NotImplementedError


def fake(engine: FakeEngine) -> Callable[[], Loaded]:
    """What builds a server around a fake engine."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    vocabulary = Vocabulary(tokenizer, VOCABULARY, (256,))
    return lambda: Loaded(engine, tokenizer, vocabulary, token_bytes(tokenizer), 512)
