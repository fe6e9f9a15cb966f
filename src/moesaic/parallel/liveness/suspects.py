"""Which rank is to blame when a collective fails: told from two looks at what every rank last said of itself."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# A line that names more would no longer be read.
_NAMED = 4


@dataclass(frozen=True)
class Member:
    """A process of the group, as it introduces itself.

    Attributes:
        rank: in the whole job, not in the group.
        host, pid: where it runs.
        home: the kernel and the process namespace that ``pid`` belongs to; "" where there is no ``/proc``.
        started: what ``/proc`` says of its start, so that a later process with its number is not taken for it.
    """

    rank: int
    host: str
    pid: int
    home: str
    started: str

    @classmethod
    def here(cls, rank: int) -> Member:
        """This process."""
        pid = os.getpid()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            home, started = f"{boot} {os.readlink('/proc/self/ns/pid')}", _status(pid)[1]
        except OSError:
            home, started = "", ""
        return cls(rank, socket.gethostname(), pid, home, started)

    @classmethod
    def read(cls, text: str) -> Member:
        return cls(**json.loads(text))

    def write(self) -> str:
        return json.dumps(asdict(self))

    def state(self, home: str) -> str:
        """ "gone", "stopped" or "": the last one also where this cannot be seen from ``home``."""
        if not self.home or self.home != home:
            return ""
        try:
            letter, started = _status(self.pid)
        except OSError:
            return "gone"
        if started != self.started or letter in "ZX":
            return "gone"
        return "stopped" if letter in "Tt" else ""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def _status(pid: int) -> tuple[str, str]:
    """State letter and start time of a process, from ``/proc/PID/stat``; the name before them may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself once in a while.

    Attributes:
        elapsed: seconds since the group began to watch, the same moment everywhere; it grows with every beat.
        sequence: how many collectives and steps it has entered.
        waiting: whether it is in a collective now.
        where: its place in words: "in the tokens exchange of layer ...", "after ...".
        error: the error that it ends with, one line; "" while it goes on.
        victim: that error is only another rank's.
        ended: it has left the group on purpose.
    """

    elapsed: float
    sequence: int
    waiting: bool
    where: str
    error: str = ""
    victim: bool = False
    ended: bool = False

    @classmethod
    def read(cls, text: bytes) -> Beat:
        return cls(**json.loads(text))

    def write(self) -> str:
        return json.dumps(asdict(self))


def lost(members: Sequence[Member], me: int) -> list[str]:
    """A clause for each process beside this one that has died or is stopped, as far as this host's kernel tells."""
    words = {"gone": "has died", "stopped": "is stopped"}
    states = [member.state(members[me].home) for member in members]
    return [
        f"{member} {words[state]}"
        for place, (member, state) in enumerate(zip(members, states, strict=True))
        if state and place != me
    ]


def fallen(members: Sequence[Member], before: Sequence[Beat], after: Sequence[Beat], me: int, final: bool) -> list[str]:
    """A clause for each rank beside this one that ended with an error of its own, has died, is stopped or is silent.

    Args:
        before, after: every member's beat at two looks.
        final: so much time lies between the looks that a rank without another beat in it is silent.
    """
    clauses = []
    for place, (member, first, last) in enumerate(zip(members, before, after, strict=True)):
        if place == me or last.victim or (last.ended and not last.error):
            continue
        state = member.state(members[me].home)
        silent = f"has not answered for {max(after[me].elapsed - last.elapsed, 0.0):.1f} s"
        if last.error:
            clauses.append(f"{member} ended with: {last.error}")
        elif state == "gone":
            clauses.append(f"{member} has died; it was last seen {last.where}")
        elif state == "stopped":
            clauses.append(f"{member} is stopped and {silent}; it was last seen {last.where}")
        elif final and last.elapsed == first.elapsed:
            clauses.append(f"{member} {silent}; it was last seen {last.where}")
    return clauses


def suspected(members: Sequence[Member], beats: Sequence[Beat], me: int, waited: str) -> list[str]:
    """The next best clauses where nobody has fallen: who is late, else who has ended, else who was only hit.

    Args:
        beats: every member's, at the last look.
        waited: the collective in words ("the tokens exchange of layer ...").
    """
    others = [(member, beat) for place, (member, beat) in enumerate(zip(members, beats, strict=True)) if place != me]
    late = [
        (member, beat)
        for member, beat in others
        if beat.sequence < beats[me].sequence and not (beat.ended or beat.victim)
    ]
    if late:
        least = min(beat.sequence for _, beat in late)
        return [_tardy(member, beat, waited) for member, beat in late if beat.sequence == least]
    ended = [
        f"{member} has ended without an error, {beat.where}" for member, beat in others if not beat.error and beat.ended
    ]
    victims = [f"{member} ended with: {beat.error}" for member, beat in others if beat.victim]
    places = [f"rank {member.rank} {beat.where}" for member, beat in zip(members, beats, strict=True)]
    return ended or victims or [f"every rank answers: {listed(places, ', ')}"]


def listed(clauses: Sequence[str], between: str = "; ") -> str:
    """The first few clauses, and how many more there are."""
    more = [f"and {len(clauses) - _NAMED} more"] if len(clauses) > _NAMED else []
    return between.join([*clauses[:_NAMED], *more])


def _tardy(member: Member, beat: Beat, waited: str) -> str:
    seen = f"is still {beat.where}" if beat.waiting else f"was last seen {beat.where}"
    return f"{member} is alive but has not entered {waited}: it {seen}"
