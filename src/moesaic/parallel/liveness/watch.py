"""Watching over one another: a rank that dies or hangs ends the job with a line that names it and the collective.

Every rank of a group has a :class:`Watch`. Its thread says through the job's store, twice an ``interval``, that the
process lives and which collective it is in; what enters and leaves collectives only sets an attribute. When one fails,
two looks at what the others have said tell who has died, stopped, or hangs in code of its own.

How long it takes, with ``timeout`` the group's own and I the ``interval`` (1 s):

* A rank is killed, or ends with an error of its own: where connections break (Gloo), the others end within 3 I + 1 s;
  where they do not (NCCL), as if it had stopped.
* A rank stops, or does not come to the collective: the others end within ``timeout`` + 3 I. They raise where the
  backend gives up after ``timeout``. Where it does not, the thread writes the line to standard error and ends the
  process with exit code 1, as nothing else can wake a thread that waits inside of a library.
* The first rank that knows tells all, and one that still waits 3 I later is ended by its thread too.

The last resort needs a store that answers: where its host is stopped, only the backend's own timeout is left.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from types import FrameType, TracebackType
from typing import Any, ClassVar

import torch.distributed as dist

from moesaic.errors import ConfigError, MoesaicError, ParallelError
from moesaic.parallel.groups import timeout_of
from moesaic.parallel.liveness.monitor import Monitor, Place, Spot, group_store

# What Gloo and NCCL say when a peer is gone; PyTorch raises a plain RuntimeError for most of it.
_COMMUNICATION = re.compile(
    r"gloo|nccl|connection|timed? ?out|broken pipe|socket|process group|remote process", re.IGNORECASE
)


class Inside:
    """The context that :meth:`Watch.collective` and :meth:`Watch.guard` make; it is entered once."""

    __slots__ = ("_is_guard", "_monitor", "_outer", "_spot", "_words")
    _outer: Spot | None
    _spot: Spot

    def __init__(self, monitor: Monitor, words: str, is_guard: bool) -> None:
        self._monitor, self._words, self._is_guard = monitor, words, is_guard

    def __enter__(self) -> None:
        before = self._monitor.place
        self._outer, self._spot = before.current, Spot(self._words, self._is_guard, time.monotonic())
        self._monitor.place = Place(before.sequence + 1, self._spot, before.last)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            self._fail(error)
        else:
            self._monitor.place = Place(self._monitor.place.sequence, self._outer, self._spot)
            if self._outer is None and _terminated:
                _end_by_sigterm()

    def _fail(self, error: BaseException) -> None:
        failure = None
        before = self._monitor.place
        told, victim = before.error, before.victim
        if self._monitor.size > 1 and is_communication(error):
            failure = ParallelError(self._monitor.explain(self._spot))
            told, victim = one_line(failure), True
        elif self._outer is None and not told:
            told = one_line(error)
        self._monitor.place = Place(before.sequence, self._outer, self._spot, told, victim)
        if failure is not None:
            raise failure from error


class Watch:
    """Watches over the ranks of a process group; made by all of them at the same place, which waits for the others.

    As a context it tells the others at its end with which error, if any, this rank has ended.

    Args:
        group: the default group where it is None.
        timeout: seconds; the group's own by default. A shorter one ends a job before the backend does, a longer one
            puts the last resort off. For NCCL, whose watchdog aborts the process without our line, it should be shorter
            than the group's.
        interval: seconds; what the times above count in.

    Raises:
        ConfigError: for times that are not positive.
        ParallelError: where not all ranks come within ``timeout``.
    """

    _made: ClassVar[Counter[str]] = Counter()
    _of: ClassVar[dict[tuple[int, ...], Watch]] = {}

    def __init__(self, group: Any = None, *, timeout: float | None = None, interval: float = 1.0) -> None:
        group = group or dist.group.WORLD
        timeout = timeout_of(group) if timeout is None else timeout
        if not (timeout > 0 and interval > 0):
            raise ConfigError(f"timeout is {timeout} s and interval {interval} s: both must be above 0")
        self.timeout, self.interval = timeout, interval
        ranks = dist.get_process_group_ranks(group)
        store = group_store(group, Watch._made[group.group_name])
        Watch._made[group.group_name] += 1
        self._job, self._closed = dist.group.WORLD, False
        self._monitor = Monitor(store, ranks, ranks.index(dist.get_rank()), timeout, interval)
        if self._monitor.size > 1:  # nobody to talk to otherwise
            self._monitor.start()
        _watches.add(self)
        _take_sigterm()
        atexit.register(self._at_exit)

    @classmethod
    def of(cls, group: Any = None, *, timeout: float | None = None, interval: float = 1.0) -> Watch:
        """The one watch of a group's ranks, whatever groups they form; made by the first call, by all of them.

        The times are those of the call that makes it.
        """
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        for stale in [each for each, watch in cls._of.items() if watch._job is not dist.group.WORLD]:
            cls._of.pop(stale).close()
        found = cls._of.get(ranks)
        if found is None or found._closed:
            found = cls._of[ranks] = cls(group, timeout=timeout, interval=interval)
        return found

    def collective(self, name: str, *, layer: str = "") -> Inside:
        """A context around waiting for a collective; entering and leaving it takes a microsecond or two.

        All ranks of the group must enter their collectives and guards in the same order.

        Args:
            name: what is exchanged: ``"tokens exchange"``.

        Raises:
            ParallelError: from the context, in place of what Gloo or NCCL raise when a peer is gone or does not come.
                Other errors pass unchanged.
        """
        return Inside(self._monitor, f"the {name} of layer {layer}" if layer else f"the {name}", is_guard=False)

    def guard(self, name: str) -> Inside:
        """The same around a whole step (``"step 12"``), for collectives that are not ours, such as FSDP's.

        The innermost context gives the name. How long a step may compute is unknown: one that takes longer than the
        timeout is ended only where a rank has died, stopped or failed. SIGTERM, where nobody else takes it, waits until
        the outermost context is left: torchrun sends it to all as soon as one rank has died.
        """
        return Inside(self._monitor, name, is_guard=True)

    def ending(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error; waits up to an interval until they can read it."""
        before = self._monitor.place
        if not before.error:
            victim = isinstance(error, ParallelError) or is_communication(error)
            self._monitor.place = Place(before.sequence, None, before.last, one_line(error), victim)
        self._monitor.tell()

    def close(self) -> None:
        """Tell the others that this rank ends, and stop watching; takes at most two intervals."""
        if not self._closed:
            self._closed = True
            self._monitor.stop()
            atexit.unregister(self._at_exit)
            _watches.discard(self)
            _give_sigterm_back()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            self.ending(error)
        self.close()

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)  # of a program that ends with a traceback
        if error is not None:
            self.ending(error)
        self.close()


def is_communication(error: BaseException) -> bool:
    """Whether an error is one of torch.distributed about a peer, a connection or a time that has run out."""
    if isinstance(error, MoesaicError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or _COMMUNICATION.search(str(error)) is not None


def one_line(error: BaseException) -> str:
    """Type and message of an error, cut to what fits into another message."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:400] if message else type(error).__name__


_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
_terminated = False


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _take_sigterm() -> None:
    if _is_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)


def _give_sigterm_back() -> None:
    if not _watches and _is_main_thread() and signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    global _terminated
    _terminated = True
    if not any(watch._monitor.place.current for watch in _watches):
        _end_by_sigterm()


def _end_by_sigterm() -> None:
    if not _is_main_thread():  # autograd's: handlers are the main thread's, and it gets the signal again
        os.kill(os.getpid(), signal.SIGTERM)
        return
    for monitor in [watch._monitor for watch in _watches]:
        before = monitor.place
        if not before.error:
            monitor.place = Place(before.sequence, None, before.last, "SIGTERM", True)
        monitor.tell()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
