"""Timing on an accelerator: events around some calls, read when they have passed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# A signature's first calls are all timed, later ones once in a while: an event costs microseconds.
_FIRST, _EVERY = 8, 32
# Where nobody ever waits for the device, no more than these stay open.
_MOST_PENDING = 64


def _cuda_event(device: torch.device) -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class EventTimer:
    """Events around calls.

    Args:
        event: records one on a device's current stream; it has ``query()`` and ``elapsed_time(end)``, in milliseconds.
    """

    def __init__(self, event: Callable[[torch.device], Any] = _cuda_event) -> None:
        self._event = event
        self._pending: deque[tuple[Any, Any, Callable[[float], None]]] = deque()

    @staticmethod
    def is_turn(calls: int) -> bool:
        """Whether the call with this number is timed."""
        return calls <= _FIRST or calls % _EVERY == 0

    @staticmethod
    def is_capturing(device: torch.device) -> bool:
        """Whether the work is only being recorded into a CUDA graph: no time passes, and no event may be asked."""
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @contextmanager
    def timed(self, device: torch.device, note: Callable[[float], None]) -> Iterator[None]:
        """Give ``note`` the seconds that the block's work takes, at some later call."""
        self.collect()
        if len(self._pending) >= _MOST_PENDING or self.is_capturing(device):
            yield
            return
        start = self._event(device)
        yield
        self._pending.append((start, self._event(device), note))

    def collect(self) -> None:
        """Read the events that have passed; never waits."""
        while True:
            try:
                start, end, note = self._pending.popleft()
            except IndexError:
                return
            if not end.query():
                self._pending.appendleft((start, end, note))
                return
            note(start.elapsed_time(end) / 1e3)
