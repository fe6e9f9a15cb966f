"""What a part of the serving benchmark hands back: a table of its own, and verdicts for the table of targets."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from moesaic.bench.serving.load import Job
from moesaic.bench.serving.served import Served
from moesaic.bench.targets import Verdict


@dataclass(frozen=True)
class Part:
    """One part's findings.

    Attributes:
        title, header, rows: a table for people.
        lines: what a reader must know beside it.
        figures: the same for programs.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    verdicts: list[Verdict]
    lines: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


class Contender(Protocol):
    """Something that serves loads."""

    def serve(self, jobs: Sequence[Job]) -> Served: ...

    def close(self) -> None: ...


C = TypeVar("C", bound=Contender)


@contextmanager
def opened(make: Callable[[], C]) -> Iterator[C]:
    """A contender that is ended afterwards, so that the next one has the memory and the cores."""
    contender = make()
    try:
        yield contender
    finally:
        contender.close()
        del contender
        gc.collect()
