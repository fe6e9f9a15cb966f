"""Long prompts arrive while others generate: how long those have to wait for their next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moesaic.bench.serving.engine import EngineUnderTest
from moesaic.bench.serving.load import mixed
from moesaic.bench.serving.part import Part, opened
from moesaic.bench.serving.served import Gaps
from moesaic.bench.targets import Verdict
from moesaic.serve.request import EngineSettings

RUNNING, NEW = 8, 96
ARRIVALS, LONG, EVERY = 6, 2000, 12
BUDGET = 512
HEADER = ("token budget", "long prompts", "between tokens, median ms", "p99 ms", "max ms", "max / median alone")


def run_stall(folder: Path, tell: Callable[[str], None]) -> Part:
    """8 requests that generate: alone, and while a prompt of 2,000 tokens arrives every 12 steps.

    The bound that the scheduler promises is the time of one step over ``token_budget`` tokens, which is measured too:
    a quarter of the time that a prompt of four such steps takes alone.
    """
    settings = EngineSettings(token_budget=BUDGET, max_context=4096)
    with opened(lambda: EngineUnderTest(folder, settings)) as engine:
        vocabulary = engine.model.config.vocab_size
        jobs = mixed(vocabulary, RUNNING, (32, 64), (NEW, NEW))
        prompts = mixed(vocabulary, ARRIVALS, (LONG, LONG), (1, 1), seed=1)
        alone = engine.serve(jobs)
        step = engine.serve(mixed(vocabulary, 1, (4 * BUDGET, 4 * BUDGET), (1, 1), seed=2)).seconds / 4
        tell(f"one step over {BUDGET} tokens: {step * 1e3:.0f} ms")
        late = [(EVERY * (i + 1), job) for i, job in enumerate(prompts)]
        busy = engine.serve(jobs, late)
    quiet, stalled = alone.gaps(), busy.gaps(range(RUNNING))
    work = f"{RUNNING} requests generate, {ARRIVALS} prompts of {LONG} tokens arrive, token budget {BUDGET}"
    verdicts = [
        Verdict(
            "stall",
            work,
            f"longest time between tokens / step of {BUDGET} tokens",
            1.25,
            stalled.max / step,
            at_most=True,
        )
    ]
    rows = [_cells("no", quiet, quiet), _cells("yes", stalled, quiet)]
    lines = [
        f"one step over {BUDGET} tokens of a prompt alone takes {step * 1e3:.0f} ms, "
        f"{step / quiet.median:.1f} times the median time between tokens"
    ]
    figures = {"step": step, "median_alone": quiet.median, "p99": stalled.p99, "max": stalled.max}
    disturbed = alone.is_disturbed or busy.is_disturbed
    return Part(work, HEADER, rows, [replace(each, disturbed=disturbed) for each in verdicts], lines, figures)


def _cells(arriving: str, gaps: Gaps, alone: Gaps) -> tuple[str, ...]:
    times = (f"{value * 1e3:.0f}" for value in (gaps.median, gaps.p99, gaps.max))
    return str(BUDGET), arriving, *times, f"{gaps.max / alone.median:.1f}"
