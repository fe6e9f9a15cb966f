"""Long prompts arrive while others generate: how long those have to wait for their next token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moesaic.bench.serving.engine import EngineUnderTest
from moesaic.bench.serving.load import mixed
from moesaic.bench.serving.part import Part, opened
from moesaic.bench.serving.served import Gaps
from moesaic.bench.targets import Verdict
from moesaic.serve.request import EngineSettings

RUNNING, NEW = 8, 96
ARRIVALS, LONG, EVERY = 6, 2000, 12
BUDGETS = (128, 512)
HEADER = ("token budget", "long prompts", "between tokens, median ms", "p99 ms", "max ms", "max / median alone")


def run_stall(folder: Path, tell: Callable[[str], None]) -> Part:
    """8 requests that generate: alone, and while a prompt of 2,000 tokens arrives every 12 steps.

    The scheduler promises that nobody waits longer for a token than one step over ``token_budget`` tokens takes. That
    is measured too: the longest step of such a prompt that is alone.
    """
    verdicts: list[Verdict] = []
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {}
    with opened(lambda: EngineUnderTest(folder)) as engine:
        vocabulary = engine.model.config.vocab_size
        jobs = mixed(vocabulary, RUNNING, (32, 64), (NEW, NEW))
        prompts = mixed(vocabulary, ARRIVALS, (LONG, LONG), (1, 1), seed=1)
        late = [(EVERY * (i + 1), job) for i, job in enumerate(prompts)]
        for budget in BUDGETS:
            engine.restart(EngineSettings(token_budget=budget, max_context=4096))
            alone, prompt, busy = engine.serve(jobs), engine.serve(prompts[:1]), engine.serve(jobs, late)
            step, quiet, stalled = prompt.longest_step(), alone.gaps(), busy.gaps(range(RUNNING))
            tell(
                f"a step over {budget} tokens: {step * 1e3:.0f} ms; longest between tokens: {stalled.max * 1e3:.0f} ms"
            )
            what = f"longest time between tokens / longest step of {budget} tokens"
            work = f"{RUNNING} requests generate, token budget {budget}"
            disturbed = alone.is_disturbed or prompt.is_disturbed or busy.is_disturbed
            verdicts.append(Verdict("stall", work, what, 1.25, stalled.max / step, at_most=True, disturbed=disturbed))
            rows += [_cells(budget, "no", quiet, quiet), _cells(budget, "yes", stalled, quiet)]
            figures[f"multiple of the median at {budget}"] = stalled.max / quiet.median
    title = f"{RUNNING} requests generate, {ARRIVALS} prompts of {LONG} tokens arrive"
    return Part(title, HEADER, rows, verdicts, figures=figures)


def _cells(budget: int, arriving: str, gaps: Gaps, alone: Gaps) -> tuple[str, ...]:
    times = (f"{value * 1e3:.0f}" for value in (gaps.median, gaps.p99, gaps.max))
    return str(budget), arriving, *times, f"{gaps.max / alone.median:.1f}"
