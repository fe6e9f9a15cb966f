"""What every HTTP request passes before a route sees it: name of the host, key, kind and size of the body."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.datastructures import Headers

from moesaic.serve.server.errors import ApiError
from moesaic.serve.server.metrics import Metrics
from moesaic.serve.server.settings import ServerSettings

# ASGI's own words.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = {"/", "/health", "/ready", "/openapi.json"}
"""Paths that need no key; and those of the page's files."""
OPEN_FOLDER = "/page/"
MOST_BODIES = 64
"""Bodies of full size that may be in memory at once; connections are not counted, what they hold is."""


class Gate:
    """ASGI middleware: answers what must not come in, hands everything else on with its body read."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._held = 0
        # A page from anywhere can make a browser ask a server on the same machine, under a name of the page's own
        # (DNS rebinding); keys protect from it, and so does knowing one's own names.
        self._own_names_only = not settings.keys and is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.responded(getattr(route, "path", "other"), message["status"])
            await send(message)

        body, handed_on = bytearray(), 0
        try:
            self._check(scope)
            if await self._read(scope, receive, body):
                replay, handed_on = _replayed(bytes(body), receive), len(body)
                body.clear()
                await self._app(scope, replay, send_and_count)
        except ApiError as error:
            self._metrics.erred(error.label)
            await error.reply()(scope, receive, send_and_count)
        finally:
            self._held -= len(body) + handed_on

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._own_names_only and not self._is_own_name(headers.get("host", "")):
            raise ApiError(403, "a server without API keys answers to localhost and IP addresses only", code="host")
        path = scope["path"]
        if path in OPEN or path.startswith(OPEN_FOLDER):
            return
        if not self._settings.keys.admit(headers.get("authorization", "").encode("latin-1")):
            raise ApiError(
                401,
                "give one of this server's API keys: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_own_name(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").lower()
        if name in ("localhost", self._settings.host.lower()) or name.endswith(".localhost"):
            return True
        return _is_address(name)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Fill the body, and count what all of them hold; False where the client has left before its end."""
        headers = Headers(scope=scope)
        told = headers.get("content-length", "")
        if told.isdigit() and int(told) > self._settings.max_body:
            raise self._too_large()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part = message.get("body", b"")
            body += part
            self._held += len(part)
            more = message.get("more_body", False)
            if len(body) > self._settings.max_body:
                raise self._too_large()
            if self._held > MOST_BODIES * self._settings.max_body:
                busy = {"Connection": "close", "Retry-After": "1"}
                raise ApiError(429, "the bodies of other requests fill the memory", code="queue_full", headers=busy)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # Other kinds may be sent by any page without the browser asking first.
        if body and kind != "application/json":
            raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
        return True

    def _too_large(self) -> ApiError:
        # What is left of the body is not read: the connection cannot be used again.
        text = f"the body has more than {self._settings.max_body} bytes"
        return ApiError(413, text, headers={"Connection": "close"})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What gives a body that has been read, and then what still comes."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at ``host``."""
    try:
        # A name may mean it, too, and so may a shorter way to write the address ("127.1").
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return False
    return ipaddress.ip_address(str(found[0][4][0]).partition("%")[0]).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
