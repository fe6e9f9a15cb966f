"""What serves loads, and ends."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from moesaic.bench.serving.load import Job
from moesaic.bench.serving.served import Served


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
