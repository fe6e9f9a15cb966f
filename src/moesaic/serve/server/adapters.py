"""Adapters of a running server: which there are, loading one, unloading one."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from moesaic.errors import UsageError
from moesaic.serve.names import check_name
from moesaic.serve.server.errors import ApiError
from moesaic.serve.server.loop import EngineLoop
from moesaic.serve.server.settings import ServerSettings

AdapterState = Literal["ready", "unloading"]


class Pool(Protocol):
    """What is asked of :class:`moesaic.adapters.pool.AdapterPool`."""

    def prepare(self, name: str, path: Path) -> Any: ...
    def discard(self, prepared: Any) -> None: ...
    def names(self) -> list[str]: ...


@dataclass
class Adapter:
    """An adapter that requests may name (until it is unloading). ``created``: unix time."""

    name: str
    path: Path
    created: int
    state: AdapterState = "ready"


class Adapters:
    """The adapters of a server; lives on the event loop, and reads files on a thread of its own.

    Args:
        pool: None where the server was started without adapters and without a folder for them.
        loaded: what the pool holds already.
    """

    def __init__(self, settings: ServerSettings, loop: EngineLoop, pool: Pool | None, loaded: dict[str, Path]) -> None:
        self._settings, self._loop, self._pool = settings, loop, pool
        self._entries = {name: Adapter(name, path, int(time.time())) for name, path in loaded.items()}
        self._arriving: set[str] = set()
        self._reader = ThreadPoolExecutor(1, "moesaic-adapters")

    def all(self) -> list[Adapter]:
        """By name."""
        return sorted(self._entries.values(), key=lambda adapter: adapter.name)

    def names(self) -> list[str]:
        """Those that a request may name."""
        return [adapter.name for adapter in self.all() if adapter.state == "ready"]

    async def load(self, name: str, path: str) -> Adapter:
        """Read an adapter from the allowed folder and put it into the running engine.

        Raises:
            ApiError: 403 where that is not allowed, 409 where the name is taken.
            UsageError: where the folder holds no adapter, or one of another base.
        """
        if self._pool is None or self._settings.adapter_folder is None:
            raise ApiError(403, "this server loads no adapters: start it with --adapter-dir", code="adapters_closed")
        check_name(name, self._settings.name)
        if name in self._entries or name in self._arriving:
            raise ApiError(409, f"there is an adapter {name!r} already: unload it first", param="name", code="exists")
        self._arriving.add(name)
        try:
            folder = await self._read(resolve, self._settings.adapter_folder, path)
            prepared = await self._read(self._pool.prepare, name, folder)
            try:
                await self._loop.call(lambda engine: engine.publish_adapter(prepared))
            except BaseException:
                self._pool.discard(prepared)
                raise
        finally:
            self._arriving.discard(name)
        self._entries[name] = Adapter(name, folder, int(time.time()))
        return self._entries[name]

    async def unload(self, name: str) -> bool:
        """Refuse new requests for an adapter and drop it when its last one has ended; whether it is gone already.

        Raises:
            ApiError: 404 where there is none.
        """
        adapter = self._entries.get(name)
        if adapter is None:
            raise ApiError(404, unknown(name, self.names()), param="name", code="adapter_not_found")
        if adapter.state == "ready":
            adapter.state = "unloading"
            try:
                await self._loop.call(lambda engine: engine.unload_adapter(name))
            except BaseException:
                adapter.state = "ready"
                raise
        self.settle()
        return self._entries.get(name) is not adapter

    def settle(self) -> None:
        """Forget those that the engine has dropped since."""
        held = self._pool.names() if self._pool is not None else []
        for adapter in [a for a in self._entries.values() if a.state == "unloading" and a.name not in held]:
            del self._entries[adapter.name]

    def close(self) -> None:
        """Read no more."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def _read(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._reader, function, *arguments)


def resolve(allowed: Path, path: str) -> Path:
    """The folder that ``path`` means, which must lie in ``allowed`` with all that it holds.

    Raises:
        UsageError: where it does not, or is no folder; whether anything is there outside, the message does not tell.
    """
    refusal = UsageError(f"{path!r} is no adapter's folder inside the folder that this server loads adapters from")
    try:
        root = allowed.resolve(strict=True)
        folder = (root / path).resolve(strict=True)
        if not folder.is_relative_to(root) or not folder.is_dir():
            raise refusal
        # A link inside would lead out of it just as well.
        for held in folder.rglob("*"):
            if not held.resolve(strict=True).is_relative_to(root):
                raise refusal
    except (OSError, ValueError, RuntimeError):  # not there, not readable, a NUL in the name, links in a circle
        raise refusal from None
    return folder


def unknown(name: str, names: list[str]) -> str:
    """What to say of a name that is not there."""
    return f"there is no adapter {name!r}; loaded: {', '.join(names) or 'none'}"
