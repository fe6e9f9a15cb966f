"""Where the outputs for one client wait until its connection takes them; lives on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from moesaic.serve.request import Output, Request


class Inbox:
    """The outputs of the requests that one HTTP request has become.

    Args:
        sequences: continuations of all of them, for which the server keeps room until :meth:`Service.close`.
        whole: the client waits for all of it, so that nobody need be woken before.
    """

    def __init__(self, sequences: int, *, whole: bool) -> None:
        self.sequences, self._whole = sequences, whole
        self.request_ids: tuple[str, ...] = ()
        self.arrived = time.perf_counter()
        self.last_token: dict[tuple[str, int], float] = {}
        self._left = sequences
        self._outputs: list[Output] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def done(self) -> bool:
        """Whether every continuation has ended."""
        return not self._left

    def expect(self, requests: Sequence[Request]) -> None:
        """Say whose outputs will come."""
        self.request_ids = tuple(request.id for request in requests)

    def put(self, output: Output) -> None:
        """Take in what a step has made; after an error, nothing."""
        if self._error is not None:
            return
        self._outputs.append(output)
        self._left -= output.finish_reason is not None
        if not (self._whole and self._left):
            self._news.set()

    def fail(self, error: Exception) -> None:
        """Nothing more will come, because of ``error``."""
        self._error = error
        self._news.set()

    async def outputs(self) -> AsyncIterator[Output]:
        """All outputs, until every continuation has ended; raises what :meth:`fail` was given."""
        while True:
            await self._news.wait()
            self._news.clear()
            batch, self._outputs = self._outputs, []
            for output in batch:
                yield output
            if not self._left:
                return
            if self._error is not None:
                raise self._error
