"""The speeds that we want, and what was measured instead: one verdict for each cell of the table of targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moesaic.bench.experts import Result, Row
from moesaic.bench.generation import Generation
from moesaic.bench.shapes import SHAPES, Shape, told_tokens
from moesaic.bench.trace import Trace
from moesaic.bench.workload import Workload

OURS = "moesaic/native"
TRAINING = Shape(16, 2, 512, 672)
DECODE, MIDDLE, PREFILL = (1, 4, 16), (64,), (512, 2048)


@dataclass(frozen=True)
class Verdict:
    """One target against what was measured.

    Attributes:
        group: a key of ``GROUPS``; in the other benchmarks their part, or what it is about.
        work: in words.
        what: was measured.
        target, measured: ratios, or shares of a limit; ``at_most`` says on which side of the target to be.
        unit: ``"x"`` or ``"%"``.
        disturbed: other processes used the machine meanwhile.
    """

    group: str
    work: str
    what: str
    target: float
    measured: float
    unit: str = "x"
    at_most: bool = False
    disturbed: bool = False

    @property
    def passed(self) -> bool:
        """Whether the target is reached."""
        return self.measured <= self.target if self.at_most else self.measured >= self.target

    def said(self, value: float) -> str:
        """A value in the verdict's unit."""
        return f"{value:.2f}x" if self.unit == "x" else f"{value:.1%}"

    def cells(self) -> tuple[str, str, str, str, str]:
        """Work, what, target, measured, and whether it passed or by how much it missed."""
        missed = self.measured / self.target - 1
        verdict = "pass" if self.passed else f"misses by {abs(missed):.0%}"
        if self.disturbed:
            verdict += " (disturbed)"
        sign = "at most " if self.at_most else ""
        return self.work, self.what, sign + self.said(self.target), self.said(self.measured), verdict


HEADER = ("work", "measured", "target", "reached", "verdict")

# Group -> what it is about. Those before "trace" are rows of expert layers.
GROUPS = {
    "decode": "1, 4 and 16 tokens, bf16",
    "middle": "64 tokens, bf16",
    "prefill": "512 and 2048 tokens, bf16",
    "hot": "one expert that every token goes to; no target of its own",
    "fp32": "16 and 64 tokens, fp32",
    "quantized": "int8 and int4 at 1 token",
    "training": "forward and backward, 2048 tokens",
    "trace": "the tuner on a mixed trace",
    "model": "generation by a whole model",
}


@dataclass(frozen=True)
class Batch:
    """Rows that are measured with the same contenders."""

    works: list[Workload]
    ours: list[str]
    against: list[str]


def batches(groups: Sequence[str], peers: Sequence[str]) -> list[Batch]:
    """What to measure for ``groups``, one shape after the other so that weights are made once.

    Args:
        peers: those of vLLM's kernel and llama.cpp that are here; they take part in all bf16 rows of plain experts.
    """
    found = []
    tokens = [
        t
        for group, row in (("decode", DECODE), ("middle", MIDDLE), ("prefill", PREFILL))
        if group in groups
        for t in row
    ]
    for shape in SHAPES.values():
        works = [Workload(shape, each) for each in tokens]
        works += [Workload(shape, each, routing="hot") for each in (16, 512) if "hot" in groups]
        found.append(Batch(works, ["native"], ["grouped_mm", "eager", *peers]))
        if "quantized" in groups:
            found.append(Batch([Workload(shape, 1)], ["native", "native+int8", "native+int4"], []))
    if "fp32" in groups:
        found += [
            Batch([Workload(shape, each, "fp32") for each in (16, 64)], ["native"], ["grouped_mm", "eager"])
            for shape in SHAPES.values()
        ]
    if "training" in groups:
        found.append(Batch([Workload(TRAINING, 2048, backward=True)], ["native"], ["grouped_mm", "eager"]))
    return [batch for batch in found if batch.works]


def row_verdicts(row: Row) -> list[Verdict]:
    """The verdicts that follow from one row of expert layers."""
    return [replace(verdict, disturbed=row.is_disturbed) for verdict in _row_verdicts(row)]


def _row_verdicts(row: Row) -> Iterator[Verdict]:
    ours, grouped_mm = row.result(OURS), row.result("grouped_mm")
    if ours is None:
        return
    work = f"{row.shape}, {told_tokens(row.tokens)}"
    if row.routing == "hot":
        return
    for format, least in (("int8", 1.7), ("int4", 3.0)):
        if quantized := row.result(f"{OURS}+{format}"):
            yield Verdict("quantized", work, f"our bf16 / {format}", least, ours.seconds / quantized.seconds)
    if grouped_mm is None:
        return
    if row.backward:
        yield Verdict("training", work, "grouped_mm / ours", 1.2, grouped_mm.ratio)
    elif row.dtype == "fp32":
        yield Verdict("fp32", work, "grouped_mm / ours", 2.5, grouped_mm.ratio)
    elif row.tokens in PREFILL:
        yield from _prefill(row, work, ours)
    else:
        yield from _decode(row, work, ours, grouped_mm)


def _decode(row: Row, work: str, ours: Result, grouped_mm: Result) -> Iterator[Verdict]:
    group = "middle" if row.tokens in MIDDLE else "decode"
    if group == "decode":
        yield Verdict(group, work, "grouped_mm / ours", 2.3, grouped_mm.ratio)
        yield Verdict(group, work, "of streaming read", 0.85, ours.read_fraction, "%")
    elif row.shape in ("A", "C"):
        yield Verdict(group, work, "grouped_mm / ours", 2.0, grouped_mm.ratio)
    yield from _peers(group, row, work)


def _prefill(row: Row, work: str, ours: Result) -> Iterator[Verdict]:
    fastest = min((each for name in ("grouped_mm", "eager") if (each := row.result(name))), key=lambda each: each.ratio)
    yield Verdict("prefill", work, f"faster of grouped_mm and eager ({fastest.name}) / ours", 1.3, fastest.ratio)
    if ours.register_fraction is not None:
        yield Verdict("prefill", work, "of multiply-adds on registers", 0.75, ours.register_fraction, "%")
    yield from _peers("prefill", row, work)


def _peers(group: str, row: Row, work: str) -> Iterator[Verdict]:
    for name in ("vllm", "llama.cpp"):
        if peer := row.result(name):
            yield Verdict(group, work, f"{name} / ours", 1.0, peer.ratio)


def trace_verdicts(trace: Trace) -> Iterator[Verdict]:
    """The tuner's."""
    work = f"{len(trace.tokens)} calls of {min(trace.tokens)} to {max(trace.tokens)} tokens, {trace.rounds} rounds"
    yield Verdict("trace", work, "auto / oracle of each call", 1.03, trace.ratio, at_most=True)
    yield Verdict("trace", work, "tuning overhead, by its own account", 0.01, trace.overhead, "%", at_most=True)


def model_verdicts(generations: Sequence[Generation]) -> Iterator[Verdict]:
    """Generation's: ours is the first."""
    for each in generations:
        if each.name == "grouped_mm":
            yield Verdict("model", "OLMoE-shaped, 4 layers, 64 new tokens", "grouped_mm / ours", 1.8, each.ratio)
