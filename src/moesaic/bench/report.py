"""Measured rows as text: lines of a table, Markdown, and one JSON document."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesaic.bench.experts import Result, Row
from moesaic.bench.limits import machine
from moesaic.bench.shapes import told_tokens
from moesaic.errors import UsageError

HEADER = (
    *("contender", "median ms", "quartiles", "GB/s", "GFLOP/s"),
    *("of read", "of registers", "of matmul", "error", "time / ours"),
)


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The machine and the rows, as JSON takes them."""
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}


def rows_of(told: dict[str, Any]) -> list[Row]:
    """What :func:`document` was made of."""
    return [Row(**{**row, "results": [Result(**result) for result in row["results"]]}) for row in told["rows"]]


def make_folder(folder: Path) -> None:
    """Make the folder that results go to, before anything is measured.

    Raises:
        UsageError: where it cannot be made, or nothing can be written into it.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: that is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be written to: {error.strerror or error}") from error


def write(told: dict[str, Any], path: Path) -> None:
    """Replace a JSON file at once, so that whoever interrupts finds the old or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    os.replace(beside, path)


def title(row: Row) -> str:
    """The work, its bytes and operations, and the limits measured beside it."""
    limits = [f"read {row.limits['read'] / 1e9:.1f} GB/s"]
    limits += [f"{name} {row.limits[name] / 1e9:.0f} GFLOP/s" for name in ("registers", "matmul") if name in row.limits]
    work = f"{row.shape}, {told_tokens(row.tokens)}, {row.dtype}, {row.routing} routing"
    if row.backward:
        work += ", forward and backward"
    return f"{work}: {row.bytes / 1e6:.1f} MB of weights, {row.flops / 1e9:.3g} GFLOP; limits: {', '.join(limits)}"


def notes(row: Row) -> list[str]:
    """What a reader must know beside the table: who is missing, and whether the figures can be trusted."""
    lines = [f"{name} does not take part: {reason}" for name, reason in row.skipped.items()]
    if row.is_disturbed:
        lines.append(f"do not trust these figures: other processes used {row.others:.0%} of the machine")
    if spread := row.spread_out():
        lines.append(f"widely spread, so with care: {', '.join(spread)}")
    return lines


def cells(row: Row, result: Result) -> tuple[str, ...]:
    """One line under ``HEADER``."""
    low, high = result.quartiles
    near, far = result.ratio_quartiles
    return (
        result.name,
        milliseconds(result.seconds),
        f"{milliseconds(low)} - {milliseconds(high)}",
        f"{result.bytes / result.seconds / 1e9:.1f}",
        f"{row.flops / result.seconds / 1e9:.1f}",
        f"{result.read_fraction:.0%}",
        f"{result.register_fraction:.0%}" if result.register_fraction is not None else "-",
        f"{result.matmul_fraction:.0%}",
        f"{result.error:.1e}",
        f"{result.ratio:.2f} ({near:.2f} - {far:.2f})",
    )


def milliseconds(seconds: float) -> str:
    """Three digits, so that times of any size can be compared."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)) + "\n"
