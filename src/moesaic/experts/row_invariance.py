"""Whether a token's numbers must not depend on the tokens beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class _Wanted:
    """Process-wide: a recomputed forward runs in autograd's own threads."""

    value = False


def is_row_invariant() -> bool:
    """Whether :func:`row_invariant` is in force."""
    return _Wanted.value


@contextmanager
def row_invariant() -> Iterator[None]:
    """Let experts give every token the same bits whatever other tokens a call has.

    All calls go to the backend ``native``, which then adds up in one order for any number of rows, at the cost of some
    speed from a dozen rows an expert on. What it refuses goes to ``loop``, which is row-invariant only as far as the
    linear layers and functions are that it calls.
    """
    before, _Wanted.value = _Wanted.value, True
    try:
        yield
    finally:
        _Wanted.value = before
