"""What a person sees of a run, on standard error: a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from moesaic.train.evaluate import DomainResult
from moesaic.train.metrics import StepMetrics

SECONDS_BETWEEN_LINES = 10.0
_REMEMBERED = 0.9  # of the smoothed speed and loss, from one step to the next


class Display:
    """Shows nothing; what a library user, and every process but the first, gets."""

    def say(self, line: str) -> None:
        """One line of text."""

    def begin(self, step: int, steps: int) -> None:
        """Training goes on from ``step`` of ``steps``."""

    def step(self, metrics: StepMetrics) -> None:
        """A step has been done."""

    def validation(self, step: int, results: Mapping[str, DomainResult]) -> None:
        """The model has been measured."""

    def close(self) -> None:
        """Training has ended, well or not."""


class ConsoleDisplay(Display):
    """Shows a run on a console (default: standard error)."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0
        self._loss: float | None = None
        self._speed: float | None = None
        self._last_line = 0.0

    def say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def begin(self, step: int, steps: int) -> None:
        self._steps = steps
        if self._console.is_terminal:
            columns = (
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=steps, completed=step)
            self._bar.start()

    def step(self, metrics: StepMetrics) -> None:
        self._loss = _smoothed(self._loss, metrics.loss)
        self._speed = _smoothed(self._speed, metrics.tokens_per_second)
        text = (
            f"loss {self._loss:.3f} · {self._speed:,.0f} tokens/s · lr {metrics.learning_rate:.1e} · "
            f"grad {metrics.grad_norm:.2f} · load max/mean {metrics.imbalance:.2f} · dropped {metrics.dropped:.1%}"
        )
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, description=text)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or metrics.step == self._steps:
            self._last_line = now
            self.say(f"step {metrics.step}/{self._steps} · {text}")

    def validation(self, step: int, results: Mapping[str, DomainResult]) -> None:
        measured = " · ".join(f"{name} {result.perplexity:,.2f}" for name, result in results.items())
        self.say(f"validation perplexity at step {step}: {measured}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else _REMEMBERED * before + (1 - _REMEMBERED) * value
