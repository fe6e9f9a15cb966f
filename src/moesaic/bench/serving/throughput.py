"""Many requests at once: our engine and server against those of others, one after the other on the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moesaic.bench.part import Part
from moesaic.bench.serving import vllm
from moesaic.bench.serving.batching import ContinuousBatching
from moesaic.bench.serving.engine import EngineUnderTest
from moesaic.bench.serving.http import moesaic_serve, transformers_serve
from moesaic.bench.serving.load import Job, mixed
from moesaic.bench.serving.models import vocab_size
from moesaic.bench.serving.part import Contender, opened
from moesaic.bench.serving.served import Served
from moesaic.bench.targets import Verdict
from moesaic.serve.request import EngineSettings

REQUESTS = 32
ONE_BY_ONE = 8
"""A server that answers one request after the other gets a quarter of the load: its rate is that of the whole."""
CONTEXT = 1024
WORK = f"{REQUESTS} requests at once, OLMoE shape, 4 layers"
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


Field = Sequence[tuple[Callable[[], Contender], Sequence[Job]]]


def run_batching(folder: Path, tell: Callable[[str], None]) -> Part:
    """Our engine and transformers' continuous batching, in one process."""
    jobs = mixed(vocab_size(folder), REQUESTS)
    field: Field = [(lambda: _ours(folder), jobs), (lambda: ContinuousBatching(folder), jobs)]
    return _part(f"{WORK}, in one process", field, 5.0, [], tell)


def run_servers(folder: Path, tell: Callable[[str], None]) -> Part:
    """Our server and transformers', asked by 32 clients."""
    jobs = mixed(vocab_size(folder), REQUESTS)
    field: Field = [
        (lambda: moesaic_serve(folder), jobs),
        (lambda: transformers_serve(folder), jobs[:ONE_BY_ONE]),
    ]
    line = f"transformers serve got the first {ONE_BY_ONE} of the {REQUESTS} requests: it answers one after the other"
    return _part(f"{WORK}, over HTTP", field, 5.0, [line], tell)


def run_vllm(folder: Path, tell: Callable[[str], None]) -> Part:
    """Our engine and vLLM's, which is nobody's target; it takes part where it is installed."""
    jobs = mixed(vocab_size(folder), REQUESTS)
    field: Field = [(lambda: _ours(folder), jobs)]
    if absent := vllm.missing():
        return _part(f"{WORK}, against vLLM", field, 1.0, [f"vLLM did not take part: {absent}"], tell)
    return _part(f"{WORK}, against vLLM", [*field, (lambda: vllm.Vllm(folder), jobs)], 1.0, [], tell)


def run_demo(folder: Path, tell: Callable[[str], None]) -> Part:
    """The demo model, which is small: what is not arithmetic counts, and what is made at first use does not."""
    jobs = mixed(vocab_size(folder), REQUESTS)
    field: Field = [
        (lambda: _Warm(_ours(folder), jobs), jobs),
        (lambda: _Warm(ContinuousBatching(folder), jobs), jobs),
    ]
    lines = [
        "transformers runs the demo model on our experts, as anybody would: it has no others for it",
        "both had served the same load once before",
    ]
    return _part(f"{REQUESTS} requests at once, the demo model, in one process", field, 5.0, lines, tell)


class _Warm:
    """A contender that has served the load once."""

    def __init__(self, contender: Contender, jobs: Sequence[Job]) -> None:
        self.serve, self.close = contender.serve, contender.close
        self.serve(jobs)


def _ours(folder: Path) -> EngineUnderTest:
    return EngineUnderTest(folder, EngineSettings(max_context=CONTEXT))


def _part(title: str, field: Field, least: float, lines: list[str], tell: Callable[[str], None]) -> Part:
    """The first of the field against the others, one after the other."""
    found: list[Served] = []
    for make, jobs in field:
        with opened(make) as contender:
            found.append(contender.serve(jobs))
        tell(f"{found[-1].name}: {found[-1].rate:.1f} new tokens/s")
    ours, *others = found
    disturbed = any(each.is_disturbed for each in found)
    verdicts = [
        Verdict("throughput", title, f"ours / {each.name}", least, ours.rate / each.rate, disturbed=disturbed)
        for each in others
    ]
    figures = {each.name: each.rate for each in found}
    return Part(title, HEADER, [_cells(each, ours) for each in found], verdicts, lines, figures)


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
