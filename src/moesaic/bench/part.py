"""What a part of a benchmark hands back: a table of its own, and verdicts for the table of targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.bench.targets import Verdict


@dataclass(frozen=True)
class Part:
    """One part's findings.

    Attributes:
        title, header, rows: a table for people.
        lines: what a reader must know beside it.
        figures: the same for programs.
        points: single measurements, where there are more of them than a table can hold.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    verdicts: list[Verdict]
    lines: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
