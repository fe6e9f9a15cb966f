"""How far a batch is, on standard error: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesaic.serve.offline import Totals


@contextmanager
def batch_progress() -> Iterator[Callable[[Totals], None]]:
    """A context that gives what is to be called with a batch's totals."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(totals: Totals) -> None:
            told = f"{totals.prompt_tokens + totals.new_tokens} tokens"
            progress.update(task, completed=totals.found + totals.done, total=totals.requests, description=told)

        yield show
