"""A batch of requests whose prompts begin alike in groups: with prefix sharing and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moesaic.bench.part import Part
from moesaic.bench.serving.engine import EngineUnderTest
from moesaic.bench.serving.load import grouped
from moesaic.bench.serving.models import vocab_size
from moesaic.bench.serving.part import opened
from moesaic.bench.serving.served import Served
from moesaic.bench.targets import Verdict
from moesaic.serve.request import EngineSettings

GROUPS, EACH, PROMPT, SHARED, NEW = 8, 8, 512, 0.9, 16
HEADER = ("prefix sharing", "s", "new tokens/s", "tokens computed")


def run_prefixes(folder: Path, tell: Callable[[str], None]) -> Part:
    """64 requests in 8 groups that share 90 % of their prompts, in random order."""
    jobs = grouped(vocab_size(folder), GROUPS, EACH, PROMPT, SHARED, NEW)
    found: dict[bool, Served] = {}
    computed: dict[bool, int] = {}
    with opened(lambda: EngineUnderTest(folder)) as engine:
        for sharing in (True, False):
            engine.restart(EngineSettings(prefix_sharing=sharing, max_context=1024))
            found[sharing] = engine.serve(jobs)
            cached = engine.engine.stats().cached_tokens
            computed[sharing] = found[sharing].prompt_tokens + found[sharing].new_tokens - cached
            tell(f"prefix sharing {sharing}: {found[sharing].seconds:.1f} s")
    work = f"{GROUPS} groups of {EACH}, prompts of {PROMPT} tokens, {SHARED:.0%} shared, {NEW} new tokens"
    ratio = found[False].seconds / found[True].seconds
    rows = [
        ("yes" if sharing else "no", f"{each.seconds:.1f}", f"{each.rate:.1f}", str(computed[sharing]))
        for sharing, each in found.items()
    ]
    verdict = Verdict("prefixes", work, "no sharing / sharing", 3.0, ratio)
    disturbed = any(each.is_disturbed for each in found.values())
    figures = {"ratio": ratio, "seconds": found[True].seconds, "seconds_without": found[False].seconds}
    return Part(work, HEADER, rows, [replace(verdict, disturbed=disturbed)], figures=figures)
