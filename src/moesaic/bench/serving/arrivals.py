"""Long prompts arrive while others generate: how long those have to wait for their next token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moesaic.bench.part import Part
from moesaic.bench.serving.engine import EngineUnderTest
from moesaic.bench.serving.load import mixed
from moesaic.bench.serving.part import opened
from moesaic.bench.serving.served import Gaps
from moesaic.bench.targets import Verdict
from moesaic.serve.request import EngineSettings

RUNNING, NEW = 8, 96
ARRIVALS, LONG, EVERY = 6, 2000, 12
MULTIPLES = {128: 8.0, 512: 14.0}
"""Token budget -> how many times the median time between tokens, when nothing arrives, none of them may exceed."""
HEADER = ("token budget", "long prompts", "between tokens, median ms", "p99 ms", "max ms", "max / median alone")


def run_stall(folder: Path, tell: Callable[[str], None]) -> Part:
    """8 requests that generate: alone, and while a prompt of 2,000 tokens arrives every 12 steps.

    The scheduler promises that nobody waits longer for a token than one step takes; how long that is, the token budget
    decides.
    """
    verdicts: list[Verdict] = []
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {}
    with opened(lambda: EngineUnderTest(folder)) as engine:
        vocabulary = engine.model.config.vocab_size
        jobs = mixed(vocabulary, RUNNING, (32, 64), (NEW, NEW))
        prompts = mixed(vocabulary, ARRIVALS, (LONG, LONG), (1, 1), seed=1)
        late = [(EVERY * (i + 1), job) for i, job in enumerate(prompts)]
        for budget, most in MULTIPLES.items():
            engine.restart(EngineSettings(token_budget=budget, max_context=4096))
            alone, busy = engine.serve(jobs), engine.serve(jobs, late)
            quiet, stalled = alone.gaps(), busy.gaps(range(RUNNING))
            tell(f"token budget {budget}: the longest time between tokens is {stalled.max * 1e3:.0f} ms")
            work = f"{RUNNING} requests generate, token budget {budget}"
            waited, multiple = stalled.max / busy.longest_step(), stalled.max / quiet.median
            disturbed = alone.is_disturbed or busy.is_disturbed
            verdicts += [
                Verdict("stall", work, "longest time between tokens / longest step", 1.0, waited, at_most=True),
                Verdict(
                    "stall", work, "longest time between tokens / median alone", most, multiple, "x", True, disturbed
                ),
            ]
            rows += [_cells(budget, "no", quiet, quiet), _cells(budget, "yes", stalled, quiet)]
            figures[f"multiple at {budget}"] = multiple
    title = f"{RUNNING} requests generate, {ARRIVALS} prompts of {LONG} tokens arrive"
    return Part(title, HEADER, rows, verdicts, figures=figures)


def _cells(budget: int, arriving: str, gaps: Gaps, alone: Gaps) -> tuple[str, ...]:
    times = (f"{value * 1e3:.0f}" for value in (gaps.median, gaps.p99, gaps.max))
    return str(budget), arriving, *times, f"{gaps.max / alone.median:.1f}"
