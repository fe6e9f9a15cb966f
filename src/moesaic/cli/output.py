"""What a command prints as its result: one JSON document for programs, or tables for people."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDEST = 10_000


def print_json(document: Any) -> None:
    """Print ``document`` as the one JSON document of a command.

    Dataclasses become objects, paths strings, tuples and sets lists, NumPy and PyTorch values numbers or lists.
    JSON has no infinity and no NaN: they become null.

    Raises:
        TypeError: where something else is in the document.
    """
    print(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, whole: bool = False) -> None:
    """Print a table for people; columns of numbers are aligned to the right. An empty ``header`` prints none.

    Args:
        whole: never break or shorten a line, whatever fits the terminal.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console, headline = Console(), Text(title, "bold")
    table = Table(title=None if whole else headline, title_justify="left", box=None, show_header=bool(header))
    for index in range(len(rows[0]) if rows else len(header)):
        is_number = bool(header and rows) and all(row[index].lstrip("-")[:1].isdigit() for row in rows)
        table.add_column(
            Text(header[index] if header else ""),
            justify="right" if is_number else "left",
            style="cyan" if index == 0 else "",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    if whole:
        console.print(headline, soft_wrap=True)
        options = console.options.update(width=_WIDEST)
        table.collapse_padding = Measurement.get(console, options, table).maximum > console.width
        console = Console(width=max(Measurement.get(console, options, table).maximum, console.width))
    console.print(table)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return [_plain(item) for item in sorted(value)]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no place in a JSON document")
