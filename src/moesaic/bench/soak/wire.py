"""A client of HTTP that can leave at any moment: one connection per request, nothing hidden, nothing kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

BROKEN = (OSError, EOFError, ValueError)
"""What a connection that breaks off, or an answer that is not HTTP, raises."""


@dataclass
class Answer:
    """Status and headers (names in lower case) of an answer, whose body is still to be read."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader = field(repr=False)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes; raises EOFError where it breaks off."""
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
        else:
            yield await self.reader.readexactly(int(self.headers.get("content-length", 0)))

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.pieces()])

    async def text(self) -> str:
        """The whole body, for people."""
        return (await self.read()).decode(errors="replace")

    async def json(self) -> Any:
        """The whole body, for programs."""
        return json.loads(await self.read())

    async def lines(self) -> AsyncIterator[str]:
        """The body's lines as they come, without those that are empty."""
        kept = b""
        async for piece in self.pieces():
            *whole, kept = (kept + piece).split(b"\n")
            for line in whole:
                if line.strip():
                    yield line.decode().strip()


class Wire:
    """The way to a server."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    @asynccontextmanager
    async def ask(self, method: str, path: str, body: Any = None) -> AsyncIterator[Answer]:
        """Send a request (``body``: bytes as they are, or what becomes JSON); the connection ends with the block."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        async with self.connection() as (reader, writer):
            writer.write(head.encode() + b"\r\n" + content)
            yield await _answer(reader)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A bare connection."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def _answer(reader: asyncio.StreamReader) -> Answer:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Answer(int(status.split(" ")[1]), headers, reader)
