"""The one thread that owns the engine: commands between two steps, steps while there is work, else sleep."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from moesaic.errors import MoesaicError
from moesaic.serve.request import EngineStats, Output, Request

Value = TypeVar("Value")
log = logging.getLogger("moesaic.serve")

LOOK_SECONDS = 0.25
"""How old the numbers of a busy engine may be that got no commands meanwhile."""
MOST_FAILURES = 3
"""Steps that may raise without a token between them before the engine counts as beyond repair."""


class EngineFailure(MoesaicError, RuntimeError):
    """The engine failed by no fault of the request's; what happened is in the server's log."""


class EngineCore(Protocol):
    """What is asked of an engine: :class:`moesaic.serve.engine.Engine`, or a test's own."""

    computing: tuple[str, ...]

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> list[Output]: ...
    def stats(self) -> EngineStats: ...
    def publish_adapter(self, prepared: Any) -> None: ...
    def unload_adapter(self, name: str) -> None: ...


class Listener(Protocol):
    """Who is told; every method runs on the event loop."""

    def on_loaded(self, loaded: Any) -> None: ...
    def on_load_failed(self, error: BaseException) -> None: ...
    def on_step(self, outputs: Sequence[Output], at: float, stats: EngineStats | None) -> None:
        """What a step made, when (``time.perf_counter``), and the engine's numbers where they were looked at."""

    def on_failure(self, request_ids: Sequence[str], beyond_repair: bool) -> None:
        """A step raised: these requests have ended without a result."""


@dataclass(frozen=True)
class _Command:
    action: Callable[[EngineCore], Any]
    result: Future[Any]
    shown: bool


class EngineLoop:
    """Builds an engine on a thread of its own and runs it there.

    Args:
        build: makes the engine; its result has an attribute ``engine`` and is handed to ``listener.on_loaded``.
    """

    def __init__(self, build: Callable[[], Any], listener: Listener) -> None:
        self._build, self._listener = build, listener
        self._commands: SimpleQueue[_Command | None] = SimpleQueue()
        self._door = threading.Lock()
        self._refusal: str | None = None
        # Requests that the engine has and their continuations that go on; only the thread touches it.
        self._open: dict[str, int] = {}
        self._failures = 0
        self._beyond_repair = False
        self._looked_at = 0.0
        self._unseen = True
        # A daemon: the model may still be loading when the process is to end.
        self._thread = threading.Thread(target=self._run, name="moesaic-engine", daemon=True)

    def start(self, event_loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; the listener is called on ``event_loop``."""
        self._event_loop = event_loop
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end after its step, whatever goes on."""
        self._commands.put(None)

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end; whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    async def call(self, action: Callable[[EngineCore], Value]) -> Value:
        """Run ``action`` on the engine between two steps; its result or exception.

        Who asks for the engine's numbers after that sees what it did.

        Raises:
            EngineFailure: where the engine is not there any more.
        """
        return await asyncio.wrap_future(self._submit(action, shown=True))

    async def add(self, requests: Sequence[Request]) -> None:
        """Add all of ``requests`` or none; raises what ``Engine.add`` raises."""
        await asyncio.wrap_future(self._submit(lambda engine: self._add(engine, requests)))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """End these requests, without waiting for it; they need not be there."""
        with suppress(EngineFailure):
            self._submit(lambda engine: self._cancel(engine, request_ids))

    def _submit(self, action: Callable[[EngineCore], Value], *, shown: bool = False) -> Future[Value]:
        result: Future[Value] = Future()
        with self._door:
            if self._refusal is not None:
                raise EngineFailure(self._refusal)
            self._commands.put(_Command(action, result, shown))
        return result

    # What follows runs on the thread.

    def _run(self) -> None:
        try:
            loaded = self._build()
        except BaseException as error:  # even SystemExit must not leave the server waiting for a model
            self._post(self._listener.on_load_failed, error)
            self._close("the model could not be loaded")
            return
        self._post(self._listener.on_loaded, loaded)
        while not self._beyond_repair and self._take_commands(loaded.engine):
            if loaded.engine.has_work:
                self._step(loaded.engine)
        self._close("the engine has failed: restart the server" if self._beyond_repair else "the server has ended")

    def _close(self, refusal: str) -> None:
        """Refuse all further commands, and those that wait."""
        with self._door:
            self._refusal = refusal
        with suppress(Empty):
            while True:
                if (
                    command := self._commands.get_nowait()
                ) is not None and command.result.set_running_or_notify_cancel():
                    command.result.set_exception(EngineFailure(refusal))

    def _take_commands(self, engine: EngineCore) -> bool:
        """Run the commands that wait, or sleep until there is one; False where the thread is to end."""
        idle = not engine.has_work
        if idle and self._unseen:
            self._show(engine)
        while True:
            try:
                command = self._commands.get(block=idle)
            except Empty:
                return True
            if command is None:
                return False
            self._obey(engine, command)
            idle = False

    def _obey(self, engine: EngineCore, command: _Command) -> None:
        if not command.result.set_running_or_notify_cancel():
            return
        self._unseen = True
        try:
            value = command.action(engine)
        except Exception as error:
            command.result.set_exception(error)
        else:
            if command.shown:
                self._show(engine)
            command.result.set_result(value)

    def _show(self, engine: EngineCore) -> None:
        self._post(self._listener.on_step, [], time.perf_counter(), self._look(engine))

    def _add(self, engine: EngineCore, requests: Sequence[Request]) -> None:
        added: list[str] = []
        try:
            for request in requests:
                engine.add(request)
                added.append(request.id)
        except BaseException:
            for request_id in added:
                engine.cancel(request_id)
            raise
        self._open.update((request.id, request.sampling.n) for request in requests)

    def _cancel(self, engine: EngineCore, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self._open.pop(request_id, None) is not None:
                engine.cancel(request_id)

    def _step(self, engine: EngineCore) -> None:
        try:
            outputs = engine.step()
            late = time.monotonic() - self._looked_at >= LOOK_SECONDS
            stats = self._look(engine) if late or self._unseen or not engine.has_work else None
        except Exception:
            self._recover(engine)
            return
        for output in outputs:
            if output.token_ids:
                self._failures = 0
            if output.finish_reason is not None and output.request_id in self._open:
                self._open[output.request_id] -= 1
                if not self._open[output.request_id]:
                    del self._open[output.request_id]
        if outputs or stats is not None:
            self._post(self._listener.on_step, outputs, time.perf_counter(), stats)

    def _recover(self, engine: EngineCore) -> None:
        """After an exception: the requests of the step end with it, those that wait do not."""
        # Where it failed before it chose any, all may have to do with it.
        lost = [request_id for request_id in engine.computing if request_id in self._open] or list(self._open)
        log.exception("a step of the engine failed; %d requests end with an error", len(lost))
        self._failures += 1
        # A step that fails with nothing to do will fail for ever.
        self._beyond_repair = self._failures >= MOST_FAILURES or not lost
        try:
            self._cancel(engine, lost)
        except Exception:
            log.exception("the engine cannot give its requests back")
            self._beyond_repair = True
        self._unseen = True
        if self._beyond_repair:
            log.error("the engine is beyond repair: restart the server")
        self._post(self._listener.on_failure, lost, self._beyond_repair)

    def _look(self, engine: EngineCore) -> EngineStats:
        self._looked_at, self._unseen = time.monotonic(), False
        return engine.stats()

    def _post(self, told: Callable[..., None], *values: Any) -> None:
        with suppress(RuntimeError):  # the event loop has been closed: nobody is there to be told
            self._event_loop.call_soon_threadsafe(told, *values)
