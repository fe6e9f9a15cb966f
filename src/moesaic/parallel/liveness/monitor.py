"""The thread behind a :class:`~moesaic.parallel.liveness.watch.Watch`: tells how its rank is, finds who is to blame."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from moesaic.errors import ParallelError
from moesaic.parallel.liveness.meeting import meet
from moesaic.parallel.liveness.suspects import Beat, Member, fallen, listed, lost, suspected

# All in intervals. Between the two looks at the others: three beats of a rank that lives.
_LOOK = 1.5
# How long the main thread waits for what the thread finds; its store may be silent.
_PATIENCE = 2.5
# How long the main thread may still wait in vain after another rank has found who is to blame.
_GRACE = 3


class Spot(NamedTuple):
    """A collective or a guarded step: in words, which of the two, and when (monotonic) it was entered."""

    words: str
    is_guard: bool
    since: float

    def waited(self) -> str:
        return f"waited {time.monotonic() - self.since:.1f} s in {self.words}"


class Place(NamedTuple):
    """Where a rank's program is; replaced as a whole, so that the thread never sees half of it.

    Attributes:
        sequence: how many spots it has entered.
        current, last: the innermost one that it is in, and the one that it has left.
        error, victim: the line that it ends with, and whether the fault is another rank's.
    """

    sequence: int = 0
    current: Spot | None = None
    last: Spot | None = None
    error: str = ""
    victim: bool = False

    def __str__(self) -> str:
        after = f"after {self.last.words}" if self.last else "before its first collective"
        if self.current is None:
            return after
        if self.current.is_guard and self.last and not self.last.is_guard:
            return f"in {self.current.words}, {after}"
        return f"in {self.current.words}"


@dataclass(frozen=True)
class _Look:
    """A first look at the others: when, from where, and what they said."""

    since: float
    place: Place
    beats: list[Beat]


class Monitor(threading.Thread):
    """Publishes this rank's :attr:`place`, and answers :meth:`explain`; ends the process as the last resort.

    The main thread sets :attr:`place` and waits in :meth:`tell` and :meth:`explain`, for a bounded time, as an
    operation of the store may block for ever; all that talks to the store is the thread's.

    Args:
        store: of the watches of this group alone; what others have left in it does no harm.
        ranks: of the group's members in the job; ``me`` is this one's place among them.
        timeout, interval: seconds.

    Raises:
        ParallelError: where not all ranks come within ``timeout``.
    """

    def __init__(self, store: Any, ranks: Sequence[int], me: int, timeout: float, interval: float) -> None:
        super().__init__(name="moesaic-watch", daemon=True)
        self.place = Place()
        self.wake = threading.Event()
        self.size = len(ranks)
        self._me, self._rank = me, ranks[me]
        self._timeout, self._interval = timeout, interval
        self._agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._holds_store = self._rank == 0 and not self._agent
        self._news = threading.Condition()
        self._wanted = self._served = 0
        self._ended = False
        self._asked: Spot | None = None
        self._verdict, self._verdict_at = "", 0.0
        self._store, introductions = meet(store, ranks, me, Member.here(self._rank).write(), timeout)
        self._members = [Member.read(text) for text in introductions]
        # All have waited for the last one: the same moment everywhere.
        self._start = self._seen_at = time.monotonic()
        self._seen = self.place
        try:
            self._publish()
            # A first beat of everybody, so that none has to be waited for later.
            self._store.wait(self._beat_keys(), timedelta(seconds=timeout))
        except RuntimeError as error:
            raise ParallelError(
                f"rank {self._rank}: one of the ranks, or their store, ended at once: {error}"
            ) from error

    def _beat_keys(self) -> list[str]:
        return [f"beat/{place}" for place in range(self.size)]

    # In the main thread:

    def tell(self) -> None:
        """Wait until :attr:`place`, as it is, has been published; an interval at most."""
        if not self.is_alive():
            return
        with self._news:
            self._wanted += 1
            wanted = self._wanted
            self.wake.set()
            self._news.wait_for(lambda: self._served >= wanted, self._interval)

    def explain(self, spot: Spot) -> str:
        """One line: why waiting in ``spot`` has failed; takes at most 3.5 intervals."""
        waited = spot.waited()
        with self._news:
            self._asked = spot
            self.wake.set()
            self._news.wait_for(lambda: bool(self._verdict), _PATIENCE * self._interval)
        line = self._verdict or listed(lost(self._members, self._me) or [self._storeless()])
        self._linger()
        return f"rank {self._rank} {waited}: {line}"

    def stop(self) -> None:
        """Say that this rank ends, and end the thread; takes at most two intervals."""
        self._ended = True
        if self.is_alive():
            self.tell()
            self.join(self._interval)

    # In the thread:

    def run(self) -> None:
        look: _Look | None = None
        while not self._ended or self._served < self._wanted:
            self.wake.wait(self._interval / (8 if look else 2))
            self.wake.clear()
            wanted = self._wanted
            if self._store is not None:
                try:
                    self._publish()
                    self._hear()
                except RuntimeError:
                    self._store = None  # a lost connection is not made again
            with self._news:
                self._served = wanted
                self._news.notify_all()
            look = self._seek(look, time.monotonic())
        if self._holds_store:
            self._see_off(time.monotonic() + self._interval)

    def _see_off(self, limit: float) -> None:
        """Wait for the others to end: the store, which goes with this process, is what they say so to."""
        while time.monotonic() < limit and not all(beat.ended or beat.error for beat in self._beats()):
            time.sleep(self._interval / 16)

    def _publish(self) -> None:
        place = self.place
        waiting = place.current is not None and not place.current.is_guard
        elapsed = time.monotonic() - self._start
        beat = Beat(elapsed, place.sequence, waiting, str(place), place.error, place.victim, self._ended)
        self._store.set(f"beat/{self._me}", beat.write())

    def _hear(self) -> None:
        if not self._verdict and self._store.check(["verdict"]):
            self._decide(self._store.get("verdict").decode())

    def _decide(self, line: str) -> None:
        with self._news:
            self._verdict, self._verdict_at = line, time.monotonic()
            self._news.notify_all()

    def _seek(self, look: _Look | None, now: float) -> _Look | None:
        """Look for who is to blame where the main thread asks or waits for too long; the look that is to go on."""
        place, asked = self.place, self._asked
        if place is not self._seen:
            self._seen, self._seen_at = place, now
        if self._verdict:
            if place.current and not asked and now - max(self._verdict_at, self._seen_at) > _GRACE * self._interval:
                self._end(place.current)
            return None
        spot = asked or (look.place.current if look else place.current)
        overdue = now - self._seen_at > self._timeout + self._interval
        if spot is None or not (asked or overdue):
            return None  # nothing is wrong, or it went on after all
        if look is None:
            look = _Look(now, place, self._beats())
        final = now - look.since >= _LOOK * self._interval
        clauses = self._clauses(look, spot, final)
        if clauses:
            self._pronounce(listed(clauses))
            if asked is None:
                self._end(spot)
        elif final:
            self._seen_at = now  # a long step among ranks that live
        return None if clauses or final else look

    def _clauses(self, look: _Look, spot: Spot, final: bool) -> list[str]:
        now = look.beats
        if final or (now and fallen(self._members, now, now, self._me, False)):
            now = self._beats()  # what a process that is gone said at its end is newer than the first look
        if not (now and look.beats):
            # The kernel may not have buried yet who held the store.
            buried = time.monotonic() - look.since > self._interval / 2
            return lost(self._members, self._me) or ([self._storeless()] if buried else [])
        found = fallen(self._members, look.beats, now, self._me, final)
        if found or not final or (spot.is_guard and self._asked is None):
            return found
        return suspected(self._members, now, self._me, spot.words)

    def _beats(self) -> list[Beat]:
        """What every rank said last; nothing where the store is gone."""
        if self._store is None:
            return []
        try:
            return [Beat.read(text) for text in self._store.multi_get(self._beat_keys())]
        except RuntimeError:
            self._store = None
            return []

    def _pronounce(self, line: str) -> None:
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.set("verdict", f"{line} (found by rank {self._rank})")
        self._decide(line)

    def _end(self, spot: Spot) -> None:
        """The last resort: the main thread waits inside of a library, and nothing else can wake it."""
        line = f"rank {self._rank} {spot.waited()}: {self._verdict}"
        # Not by sys.stderr, whose lock the main thread may hold.
        os.write(2, f"moesaic: error: {line}\n".encode())
        self.place = self.place._replace(error=f"ParallelError: {line}", victim=True)
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._publish()
        self._linger()
        os._exit(ParallelError.exit_code)

    # In either:

    def _linger(self) -> None:
        # Who holds the store takes it away by ending: the others have to read first why.
        if self._holds_store:
            time.sleep(self._interval)

    def _storeless(self) -> str:
        holder = next((str(member) for member in self._members if member.rank == 0), "rank 0")
        if self._agent:
            holder = f"torchrun's agent on {os.environ.get('MASTER_ADDR')}"
        return f"the job's store does not answer: {holder} holds it and has probably died"


def group_store(group: Any, number: int) -> Any:
    """The part of the job's store for the ``number``-th watch of a group, on a connection of its own.

    On its own, what blocks in the thread does not hold up who makes a group in the main thread.
    """
    store: Any = _get_default_store()
    return PrefixStore(f"moesaic/watch/{group.group_name}/{number}", store.clone())
