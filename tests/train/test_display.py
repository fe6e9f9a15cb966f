"""What a person sees: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moesaic.train import display as module
from moesaic.train.display import ConsoleDisplay
from moesaic.train.evaluate import DomainResult
from moesaic.train.metrics import MetricsLog, StepMetrics, read_metrics


def metrics(step: int, loss: float = 3.0) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=loss,
        aux_loss=0.02,
        learning_rate=1e-3,
        grad_norm=0.5,
        imbalance=1.25,
        worst_imbalance=1.5,
        dropped=0.125,
        tokens=100 * step,
        tokens_per_second=2345.6,
    )


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_without_a_terminal_it_says_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=40)
    display = ConsoleDisplay(console)
    display.say("reading the data of [brackets] in a long line that is not broken")
    display.begin(0, 9)
    for step in range(1, 10):
        clock[0] += 4.0
        display.step(metrics(step))
    display.validation(9, {"code": DomainResult(2.0, 7389.05, 10), "prose": DomainResult(1.0, 2.72, 10)})
    display.close()
    said = lines_of(console)
    assert said[0] == "reading the data of [brackets] in a long line that is not broken"
    assert [line.split(" · ")[0] for line in said[1:-1]] == ["step 1/9", "step 4/9", "step 7/9", "step 9/9"]
    expected = "loss 3.000 · 2,346 tokens/s · lr 1.0e-03 · grad 0.50 · load max/mean 1.25 · dropped 12.5%"
    assert said[1] == f"step 1/9 · {expected}"
    assert said[-1] == "validation perplexity at step 9: code 7,389.05 · prose 2.72"


def test_on_a_terminal_it_draws_a_bar_and_removes_it() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    display = ConsoleDisplay(console)
    display.begin(3, 6)
    display.step(metrics(4, loss=4.0))
    display.step(metrics(5, loss=2.0))
    display.say("a line between")
    display.close()
    drawn = "\n".join(lines_of(console))
    assert "5/6" in drawn
    assert "loss 3.800" in drawn  # smoothed
    assert "2,346 tokens/s" in drawn
    assert "a line between" in drawn


def test_the_log_takes_back_what_comes_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.validation(0, {"a": DomainResult(1.0, 2.7, 5)})
    for step in (1, 2, 3):
        log.step(metrics(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # a kill in the middle of a line
    log = MetricsLog(tmp_path, 2)
    log.step(metrics(3, loss=1.5))
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("validation", 0),
        ("step", 1),
        ("step", 2),
        ("step", 3),
    ]
    assert lines[-1]["loss"] == 1.5
    log = MetricsLog(tmp_path, 0)
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_every_line_of_the_log_is_json_as_it_was_given(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.step(metrics(1, loss=1 / 3))
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == 1 / 3
