"""Many requests at once: our engine and server against those of others, one after the other on the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from moesaic.bench.serving import vllm
from moesaic.bench.serving.batching import ContinuousBatching
from moesaic.bench.serving.engine import EngineUnderTest
from moesaic.bench.serving.http import moesaic_serve, transformers_serve
from moesaic.bench.serving.load import Job, mixed
from moesaic.bench.serving.models import vocab_size
from moesaic.bench.serving.part import Contender, Part, opened
from moesaic.bench.serving.served import Served
from moesaic.bench.targets import Verdict
from moesaic.serve.request import EngineSettings

REQUESTS = 32
ONE_BY_ONE = 8
"""A server that answers one request after the other gets a quarter of the load: its rate is that of the whole."""
CONTEXT = 1024
HEADER = (
    "contender",
    "s",
    "requests",
    "new tokens/s",
    "between tokens, ms",
    "p99, ms",
    "to the first, s",
    "ours / its",
)


def run_throughput(folder: Path, tell: Callable[[str], None]) -> Part:
    """Everybody on the OLMoE-shaped model."""
    jobs = mixed(vocab_size(folder), REQUESTS)
    few = jobs[:ONE_BY_ONE]
    contenders: list[tuple[Callable[[], Contender], Sequence[Job]]] = [
        (lambda: EngineUnderTest(folder, EngineSettings(max_context=CONTEXT)), jobs),
        (lambda: moesaic_serve(folder), jobs),
        (lambda: ContinuousBatching(folder), jobs),
        (lambda: transformers_serve(folder), few),
    ]
    lines = [
        f"transformers serve got the first {ONE_BY_ONE} of the {REQUESTS} requests: it answers one after the other"
    ]
    if absent := vllm.missing():
        lines.append(f"vLLM did not take part: {absent}")
    else:
        contenders.append((lambda: vllm.Vllm(folder), jobs))
    return _part(f"{REQUESTS} requests at once, OLMoE shape, 4 layers", contenders, lines, tell)


def run_demo(folder: Path, tell: Callable[[str], None]) -> Part:
    """The demo model, which is small: what is not arithmetic counts."""
    jobs = mixed(vocab_size(folder), REQUESTS)
    contenders: list[tuple[Callable[[], Contender], Sequence[Job]]] = [
        (lambda: EngineUnderTest(folder), jobs),
        (lambda: moesaic_serve(folder), jobs),
        (lambda: ContinuousBatching(folder), jobs),
    ]
    return _part(f"{REQUESTS} requests at once, the demo model", contenders, [], tell)


def _part(
    title: str,
    contenders: Sequence[tuple[Callable[[], Contender], Sequence[Job]]],
    lines: list[str],
    tell: Callable[[str], None],
) -> Part:
    found: list[Served] = []
    for make, jobs in contenders:
        with opened(make) as contender:
            found.append(contender.serve(jobs))
        tell(f"{found[-1].name}: {found[-1].rate:.1f} new tokens/s")
    ours, served, *others = found
    verdicts = [Verdict("throughput", title, f"engine / {each.name}", 5.0, ours.rate / each.rate) for each in others]
    verdicts += [
        Verdict("throughput", title, f"moesaic serve / {each.name}", 5.0, served.rate / each.rate)
        for each in others
        if "serve" in each.name
    ]
    rows = [_cells(each, ours) for each in found]
    disturbed = any(each.is_disturbed for each in found)
    figures = {each.name: each.rate for each in found}
    return Part(title, HEADER, rows, [replace(each, disturbed=disturbed) for each in verdicts], lines, figures)


def _cells(served: Served, ours: Served) -> tuple[str, ...]:
    told = ("-", "-", "-")
    if served.times:
        gaps = served.gaps()
        told = (f"{gaps.median * 1e3:.0f}", f"{gaps.p99 * 1e3:.0f}", f"{served.waits():.1f}")
    count = served.requests
    return (
        served.name,
        f"{served.seconds:.1f}",
        str(count),
        f"{served.rate:.1f}",
        *told,
        f"{ours.rate / served.rate:.2f}",
    )
