"""Ending on request: the first signal asks, the second one is obeyed at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which SIGINT or SIGTERM only sets :attr:`received`; with it the earlier handlers come back.

    Outside the main thread Python takes no handlers, and signals do what they did before.

    Args:
        others_may_end_us: a launcher sends SIGTERM to all processes when one has failed. A process that leaves the
            context by an error then ignores it from there on, so that it still can say what has happened.
    """

    received: signal.Signals | None = None

    def __init__(self, others_may_end_us: bool = False) -> None:
        self._others_may_end_us = others_may_end_us

    def counts(self) -> list[float]:
        """For each of the two signals whether it was received, 1 or 0: what ranks add up to tell one another."""
        return [float(self.received is number) for number in _SIGNALS]

    @staticmethod
    def of_counts(counts: Sequence[float]) -> signal.Signals | None:
        """The signal that any rank has received, by the sums of their :meth:`counts`."""
        return next((number for number, count in zip(_SIGNALS, counts, strict=True) if count), None)

    def __enter__(self) -> StopRequest:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        is_main = bool(self._before) or self.received is not None
        self._restore()
        if error is not None and self._others_may_end_us and is_main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
