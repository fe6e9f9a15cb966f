"""A server's process: the port first, then the model, then requests until a signal ends it."""

from __future__ import annotations

import errno
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from moesaic.errors import Interrupted, UsageError
from moesaic.serve.server.app import create_app
from moesaic.serve.server.gate import is_loopback
from moesaic.serve.server.service import Loaded, Service
from moesaic.serve.server.settings import ServerSettings

log = logging.getLogger("moesaic.serve")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 1024
_KEEP_ALIVE_SECONDS = 60
"""Longer than clients keep idle connections, so that it is they who close them: else they may just be asking again."""
_STEP_SECONDS = 30.0
"""How long the end waits for the engine's step; after a second signal, a tenth of it."""
_CUT_SHORT = "ended before the requests in flight had their answers"


def serve(settings: ServerSettings, build: Callable[[], Loaded]) -> None:
    """Serve until SIGINT or SIGTERM, then let the requests in flight end. Prints the URL when it is ready.

    Args:
        build: loads the model, on a thread of its own; the server answers ``/health`` and ``/ready`` meanwhile.

    Raises:
        UsageError: where it cannot listen at the host and port: before anything is loaded.
        MoesaicError: what ``build`` raises.
        Interrupted: where a second signal came before the requests in flight had ended.
    """
    listener = listen(settings.host, settings.port)
    logging.basicConfig(format="moesaic: %(levelname)s: %(message)s", level=logging.WARNING)
    if not is_loopback(settings.host) and not settings.keys:
        log.warning("everybody who reaches %s may use this server: give it API keys", settings.host)
    service = Service(settings, build, on_change=lambda service: _tell(service, server, listener))
    server = Server(service)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        _end(service, server)
    if service.load_error is not None:
        raise service.load_error
    if server.force_exit:
        raise Interrupted(_CUT_SHORT)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections, so that nobody else can have the port while the model loads.

    Raises:
        UsageError: where that is not possible; the message says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"there is no host {host!r}: give a name or an address of this machine") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reasons = {
            errno.EADDRINUSE: "it is in use: choose another --port, or 0 for any free one",
            errno.EACCES: "no permission: choose a --port from 1024 on",
            errno.EADDRNOTAVAIL: "this machine has no such address: choose another --host",
        }
        reason = reasons.get(error.errno or 0, error.strerror)
        raise UsageError(f"cannot listen at port {port} of {host}: {reason}") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn's, which drains the service when a signal asks it to end, and then just returns."""

    def __init__(self, service: Service) -> None:
        self._service = service
        super().__init__(
            uvicorn.Config(
                create_app(service),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                # The service ends what is left a little earlier, and tells the clients.
                timeout_graceful_shutdown=math.ceil(service.settings.drain_seconds) + 2,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, and wait for what is in flight."""
        self._service.drain()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first signal drains, the second one ends at once; uvicorn would send them on to itself afterwards."""
        # Outside the main thread Python takes no handlers, and signals do what they did before.
        mine = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
        before: dict[signal.Signals, Any] = {number: signal.signal(number, self.handle_exit) for number in mine}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self.should_exit:
            self.force_exit = True
            logging.getLogger("uvicorn.error").disabled = True  # what it cancels now, it would report
        self.should_exit = True


def url(settings: ServerSettings, listener: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _tell(service: Service, server: Server, listener: socket.socket) -> None:
    if service.state == "ready":
        names = ", ".join(service.adapters.names())
        what = f"{service.settings.name}{f' with {names}' if names else ''}"
        print(f"serving {what} at {url(service.settings, listener)}", flush=True)
    if service.load_error is not None:
        server.should_exit = True


def _end(service: Service, server: Server) -> None:
    """Wait for the engine's thread; where it is still busy, end without it."""
    service.stop()
    is_loading = service.loaded is None and service.load_error is None
    patience = 0.0 if is_loading else _STEP_SECONDS / 10 if server.force_exit else _STEP_SECONDS
    if service.loop.join(patience):
        return
    if server.force_exit:
        print(f"moesaic: error: {_CUT_SHORT}", file=sys.stderr)
    # A thread inside C++ code would not live through the interpreter's end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(Interrupted.exit_code if server.force_exit else 0)
