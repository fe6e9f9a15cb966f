"""Adapters in every batch: what they cost in time and in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moesaic.adapters.pool import PoolMemory
from moesaic.bench.part import Part
from moesaic.bench.serving.adapters import make_adapters
from moesaic.bench.serving.engine import EngineUnderTest
from moesaic.bench.serving.load import mixed, spread
from moesaic.bench.serving.part import opened
from moesaic.bench.serving.served import Served
from moesaic.bench.targets import Verdict
from moesaic.serve.request import EngineSettings

REQUESTS, ADAPTERS = 32, 20
TUNED = 3
"""Of 64 experts in each layer, 5 %: ESFT reports 5 to 15 %."""
CONTEXT = 1024
HEADER = ("load", "between tokens, mean ms", "median ms", "p99 ms", "new tokens/s", "experts a layer and step")


def run_adapters(folder: Path, tell: Callable[[str], None]) -> Part:
    """The same 32 requests for the base only and spread over 20 ESFT adapters: two engines, step by step in turns."""
    with opened(lambda: EngineUnderTest(folder, EngineSettings(max_context=CONTEXT), adapters=True)) as engine:
        assert engine.pool is not None
        paths = make_adapters(engine.model, folder.with_name(f"{folder.name}-adapters"), ADAPTERS, TUNED)
        before = anonymous_bytes()
        for path in paths:
            engine.pool.load(path.name, path)
        grown, memory = anonymous_bytes() - before, engine.pool.memory()
        base = mixed(engine.model.config.vocab_size, REQUESTS)
        tell("the base and the adapters take turns")
        alone, mixture = engine.serve_in_turns([base, spread(base, [path.name for path in paths])])
    work = f"{ADAPTERS} ESFT adapters, {TUNED} of 64 experts in each layer, {REQUESTS} requests"
    ratio = mixture.gaps().mean / alone.gaps().mean
    verdicts = [
        Verdict("adapters", work, "time between tokens / base only", 1.11, ratio, at_most=True),
        Verdict("adapters", work, "memory / base + adapters", 1.02, _committed(memory), at_most=True),
        Verdict(
            "adapters", work, "growth of resident memory / adapters", 1.02, grown / memory.adapter_bytes, at_most=True
        ),
    ]
    more = mixture.experts / alone.experts - 1
    lines = [
        f"with adapters a step reads {more:.0%} more experts of a layer, and reading them is what most steps wait for",
        f"base's experts {memory.base_bytes / 1e9:.2f} GB, adapters' {memory.adapter_bytes / 1e9:.2f} GB, "
        f"held {memory.committed_bytes / 1e9:.2f} GB",
    ]
    disturbed = alone.is_disturbed or mixture.is_disturbed
    rows = [_cells(name, served) for name, served in (("base only", alone), ("adapters", mixture))]
    figures = {"ratio": ratio, "more_experts": more, "base_bytes": memory.base_bytes, "grown_bytes": grown}
    figures |= {"adapter_bytes": memory.adapter_bytes, "committed_bytes": memory.committed_bytes}
    return Part(work, HEADER, rows, [replace(each, disturbed=disturbed) for each in verdicts], lines, figures)


def anonymous_bytes() -> int:
    """Of this process's resident memory, what is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux tells RssAnon since 4.5")


def _committed(memory: PoolMemory) -> float:
    return memory.committed_bytes / (memory.base_bytes + memory.adapter_bytes)


def _cells(name: str, served: Served) -> tuple[str, ...]:
    gaps = served.gaps()
    times = (f"{value * 1e3:.1f}" for value in (gaps.mean, gaps.median, gaps.p99))
    return name, *times, f"{served.rate:.1f}", f"{served.experts:.1f}"
