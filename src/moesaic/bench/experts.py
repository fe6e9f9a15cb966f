"""The measurement of expert layers: all contenders side by side on one workload, correctness beside speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from moesaic.bench.contenders import Contender, make_ours
from moesaic.bench.field import make_other
from moesaic.bench.limits import OtherProcesses, limits
from moesaic.bench.timing import Times, alternate
from moesaic.bench.workload import Bank, Call, Workload, active_experts, make_banks, make_calls
from moesaic.errors import MoesaicError, UnsupportedError

# Successive contenders of a round get calls this far apart, so that none finds what the one before it has read.
_APART = 5
_MOST_OTHERS = 0.05


@dataclass(frozen=True)
class Result:
    """One contender on one workload.

    Attributes:
        name: a backend of ours as ``"moesaic/native"``, or the other contender's name.
        seconds, quartiles: of one run: the median, and the first and third quartile.
        runs: how many there were.
        error: ‖out − ref‖ / ‖ref‖ on inputs made for this check, the worst of those tried.
        bytes: of its weights of the active experts, on average over the calls; each is read once at least.
        read_fraction: bytes per second against the measured streaming read.
        register_fraction, matmul_fraction: FLOP/s against multiply-adds on registers, and against a large matmul.
        ratio, ratio_quartiles: its time over that of the first contender of ours (``ours``).
    """

    name: str
    seconds: float
    quartiles: tuple[float, float]
    runs: int
    error: float
    bytes: float
    read_fraction: float
    register_fraction: float | None
    matmul_fraction: float
    ratio: float
    ratio_quartiles: tuple[float, float]


@dataclass
class Row:
    """All contenders on one workload.

    Attributes:
        bytes: of the weights of the active experts, as the dtype stores them, on average over the calls; three times
            that with gradients (read, read again, gradients written).
        flops: of the routed rows.
        limits: measured between the runs; the keys of ``moesaic.bench.limits.LIMITS``.
        others: the share of all CPUs' time that other processes used meanwhile; None where the system does not tell.
        skipped: who did not take part, and why.
    """

    shape: str
    tokens: int
    dtype: str
    routing: str
    backward: bool
    bytes: float
    flops: float
    limits: dict[str, float]
    results: list[Result]
    others: float | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def is_disturbed(self) -> bool:
        """Whether other processes used so much of the machine that the figures mean little."""
        return self.others is not None and self.others > _MOST_OTHERS

    def spread_out(self) -> list[str]:
        """Contenders whose quartiles are a third of their median apart."""
        return [each.name for each in self.results if each.quartiles[1] - each.quartiles[0] > each.seconds / 3]

    def result(self, name: str) -> Result | None:
        """The result of a contender, or None where it did not take part."""
        return next((result for result in self.results if result.name == name), None)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        ours: backends; the first is the one that ratios are against.
        against: other contenders (``moesaic.bench.field.OTHERS``).
        seconds: about how long one row may take, its contenders' preparation not counted.
        seed: of weights, inputs and routing.
    """

    works: list[Workload]
    ours: list[str]
    against: list[str]
    seconds: float = 6.0
    seed: int = 0


def measure(plan: Plan, tell: Callable[[str], object] = lambda line: None) -> Iterator[Row]:
    """Measure row after row; what takes long is told in a line before. Works of one shape and dtype share weights."""
    for (shape, dtype, _), works in groupby(plan.works, lambda work: (work.shape, work.torch_dtype, work.backward)):
        start = time.perf_counter()
        chosen = list(works)
        banks = make_banks(shape, dtype, plan.seed)
        made, skipped = _field(plan, chosen[0], banks)
        tell(f"{shape}: weights ready after {time.perf_counter() - start:.1f} s")
        try:
            for work in chosen:
                tell(f"measuring {work}")
                yield _row(plan, work, banks, made, skipped)
        finally:
            for contender in made.values():
                contender.close()
        # Before the next ones are made, or two layers' weights would be in memory at a time.
        del banks, made


def _field(plan: Plan, work: Workload, banks: list[Bank]) -> tuple[dict[str, Contender], dict[str, str]]:
    made: dict[str, Contender] = {}
    skipped = {}
    for name, make in [
        *((f"moesaic/{name}", partial(make_ours, name, work.shape, banks, work.backward)) for name in plan.ours),
        *((name, partial(make_other, name, work, banks)) for name in plan.against),
    ]:
        try:
            made[name] = make()
        except UnsupportedError as error:
            skipped[name] = str(error)
    return made, skipped


def _row(plan: Plan, work: Workload, banks: list[Bank], made: dict[str, Contender], skipped: dict[str, str]) -> Row:
    # Inputs of their own for the check, in a seed that no timing uses.
    checks = make_calls(work, len(banks), plan.seed + 1)[: 1 if work.tokens > 64 else 2]
    errors, refused = {}, dict(skipped)
    for name, contender in made.items():
        try:
            errors[name] = max(contender.error(call, banks[call.bank]) for call in checks)
        except MoesaicError as error:
            refused[name] = str(error)
    runners = {name: contender for name, contender in made.items() if name in errors}
    calls = make_calls(work, len(banks), plan.seed + 2)
    measured = {
        name: _turn(contender, calls, place * _APART) for place, (name, contender) in enumerate(runners.items())
    }
    for run in measured.values():  # the first calls generate code, grow pools, fault pages in
        run(0)
    rates_of = limits(banks, work.torch_dtype)
    others = OtherProcesses(sum(contender.cpu_seconds() for contender in runners.values()))
    times, rates = alternate(measured, rates_of, plan.seconds)
    share = others.share(sum(contender.cpu_seconds() for contender in runners.values()))
    active, passes = active_experts(calls), work.passes()
    expert_bytes = work.shape.weights_of_expert() * work.torch_dtype.itemsize
    row = Row(
        str(work.shape),
        work.tokens,
        work.dtype,
        work.routing,
        work.backward,
        active * passes * expert_bytes,
        passes * work.shape.flops(work.rows()),
        rates,
        [],
        share,
        refused,
    )
    first = next(iter(times.values()), None)
    for name, taken in times.items():
        row_bytes = active * passes * (runners[name].bytes_per_expert or expert_bytes)
        row.results.append(_result(row, name, taken, row_bytes, errors[name], first or taken))
    return row


def _turn(contender: Contender, calls: list[Call], offset: int) -> Callable[[int], float]:
    return lambda number: contender.seconds(calls[(number + offset) % len(calls)])


def _result(row: Row, name: str, times: Times, row_bytes: float, error: float, first: Times) -> Result:
    seconds, registers = times.median, row.limits.get("registers")
    ratio, low, high = first.ratio_of(times)
    return Result(
        name,
        seconds,
        times.quartiles(),
        len(times.seconds),
        error,
        row_bytes,
        row_bytes / seconds / row.limits["read"],
        row.flops / seconds / registers if registers else None,
        row.flops / seconds / row.limits["matmul"],
        ratio,
        (low, high),
    )
