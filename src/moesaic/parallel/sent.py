"""How many bytes this process has sent to other ranks, and what for."""

from __future__ import annotations

from collections import Counter

KINDS = ("counts", "tokens", "results", "weights", "gradients")
_sent: Counter[str] = Counter()


def count(kind: str, sent: int) -> None:
    """Add bytes that have been handed to a collective for other ranks."""
    _sent[kind] += sent


def traffic() -> dict[str, int]:
    """Bytes that this process has sent to other ranks so far, by kind.

    ``counts`` (what all ranks tell each other of a step), ``tokens`` and ``results`` (rows on their way to the experts
    and back, in both passes), ``weights`` and ``gradients`` (of experts that are computed elsewhere). There is no kind
    for a change of strategy, because nothing is sent for one.
    """
    return {kind: _sent[kind] for kind in KINDS}
