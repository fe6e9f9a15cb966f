"""The choice against every fixed plan, and the cost model against the clock, over a grid of workloads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.bench.parallel.lab import Setting
from moesaic.bench.parallel.ranks import Ranks, started
from moesaic.bench.parallel.run import Run
from moesaic.bench.parallel.work import ROUTINGS, Work
from moesaic.bench.part import Part
from moesaic.bench.targets import Verdict
from moesaic.parallel.plan import AUTO

FloatArray = npt.NDArray[np.float64]

TOKENS, EXPERTS = (256, 1024, 4096, 16384), (4, 16, 64)
TOP_K, D_MODEL, D_FF = 2, 64, 128
SETTINGS = (Setting(4, 1, 1.0), Setting(4, 1, 10.0), Setting(4, 1), Setting(1, 2), Setting(1, 4))
_SECONDS = 1.0
_QUICK_TOKENS, _QUICK_SECONDS = (256, 4096), 0.3
HEADER = (
    *("ranks", "points", "auto / best fixed", "worst", "worst fixed / best", "at most"),
    *("best fixed strategies", "error"),
)
MODEL_HEADER = ("ranks", "plans timed", "relative error, median", "quartiles", "predicted / measured, median")


def works(quick: bool = False, every: bool = False) -> Iterator[Work]:
    """A third of the grid, in which each number of tokens meets each number of experts and each routing; or all."""
    tokens = _QUICK_TOKENS if quick else TOKENS
    names = list(ROUTINGS)
    for (row, count), (column, experts), routing in product(enumerate(tokens), enumerate(EXPERTS), names):
        if every or names.index(routing) == (row + column) % len(names):
            for training in (False, True):
                yield Work(count, experts, TOP_K, D_MODEL, D_FF, routing, training)


def run_grid(run: Run) -> Part:
    """Measure what is not measured yet, as long as there is time: a third on each setting, then all on the first."""
    points = list(run.earlier.get("points", []))
    sweeps = [(setting, works(run.quick)) for setting in SETTINGS]
    sweeps += [] if run.quick else [(SETTINGS[0], works(every=True))]
    for setting, wanted in sweeps:
        done = {_key(point["setting"], point["work"]) for point in points}
        left = [work for work in wanted if _key(str(setting), asdict(work)) not in done]
        if left and setting in run.possible(SETTINGS) and not run.is_over:
            with started(setting) as ranks:
                points += _points(run, ranks, left)
    return part(points, run.skipped(SETTINGS))


def _points(run: Run, ranks: Ranks, left: Sequence[Work]) -> Iterator[dict[str, Any]]:
    # Point by point what comes first in the file is what a run without much time measures.
    for work in left:
        if run.is_over:
            return
        try:
            point = ranks.ask(
                {"task": "point", "work": asdict(work), "seconds": _QUICK_SECONDS if run.quick else _SECONDS}
            )
        except KeyboardInterrupt:
            run.interrupted = True
            return
        point["setting"] = str(ranks.setting)
        run.tell(f"{ranks.setting}, {work}: auto / best {against_best(point['times']):.2f}, {point['chosen']}")
        yield point


def _key(setting: str, work: dict[str, Any]) -> tuple[object, ...]:
    return setting, *work.values()


def against_best(times: dict[str, list[float]]) -> float:
    """The time of ``auto`` over that of the best fixed plan.

    Which plan is the best is told by one half of the rounds, what it takes by the other half, and then the other way
    round: the least of many noisy medians is less than any plan takes.
    """
    ours = times[AUTO]
    rivals = [found for name, found in times.items() if name != AUTO and len(found) == len(ours)]
    if not rivals:  # all of them were given up as too slow
        return median(ours) / best_of(times)[1]
    ratios = []
    for half in (0, 1):
        best = min(rivals, key=lambda found: median(found[half::2]))
        ratios.append(median(ours[1 - half :: 2]) / median(best[1 - half :: 2]))
    return geometric_mean(ratios)


def best_of(times: dict[str, list[float]]) -> tuple[str, float]:
    """The fixed plan with the least median, and that."""
    medians = {name: median(found) for name, found in times.items() if name != AUTO}
    name = min(medians, key=medians.__getitem__)
    return name, medians[name]


def worst_of(times: dict[str, list[float]]) -> float:
    """How many times as long as the best fixed plan the worst one takes."""
    return max(median(found) for name, found in times.items() if name != AUTO) / best_of(times)[1]


def part(points: list[dict[str, Any]], lines: list[str]) -> Part:
    """The table of all points, by setting."""
    rows, everything = [], []
    for setting in dict.fromkeys(point["setting"] for point in points):
        here = [point for point in points if point["setting"] == setting]
        ratios = [against_best(point["times"]) for point in here]
        worst = [worst_of(point["times"]) for point in here]
        best = Counter(best_of(point["times"])[0].split(",")[0] for point in here)
        everything += ratios
        rows.append(
            (
                *(setting, str(len(here)), f"{median(ratios):.2f}x", f"{max(ratios):.2f}x"),
                *(f"{median(worst):.1f}x", f"{max(worst):.1f}x"),
                ", ".join(f"{name} {count}" for name, count in best.most_common()),
                f"{max(point['error'] for point in here):.0e}",
            )
        )
    work = f"{len(points)} points, {Work(0, 0, TOP_K, D_MODEL, D_FF).sizes}"
    verdicts = []
    if points:
        verdicts = [
            Verdict("grid", work, "auto / best fixed, median", 1.05, median(everything), at_most=True),
            Verdict("grid", work, "auto / best fixed, worst", 1.15, max(everything), at_most=True),
        ]
    return Part(f"The choice: {work}", HEADER, rows, verdicts, lines, points=points)


def run_model(run: Run) -> Part:
    """The cost model's predictions for the points that the grid has measured; measures nothing itself."""
    points = run.earlier.get("points", [])
    rows: list[tuple[str, ...]] = []
    everything: list[FloatArray] = []
    for setting in dict.fromkeys(point["setting"] for point in points):
        pairs = [predictions(point) for point in points if point["setting"] == setting]
        ratios = np.concatenate([predicted / measured for predicted, measured in pairs])
        errors = np.abs(ratios - 1)
        low, high = np.percentile(errors, [25, 75])
        everything.append(errors)
        cells = (f"{np.median(errors):.0%}", f"{low:.0%} - {high:.0%}", f"{np.median(ratios):.2f}x")
        rows.append((setting, str(len(errors)), *cells))
    work = f"{sum(map(len, everything))} plans at {len(points)} points"
    verdicts = []
    if points:
        found = float(np.median(np.concatenate(everything)))
        verdicts = [Verdict("model", work, "relative error of the cost model, median", 0.15, found, "%", at_most=True)]
    return Part(f"The cost model: {work}", MODEL_HEADER, rows, verdicts)


def predictions(point: dict[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Predicted and measured seconds of a point's fixed plans."""
    names = list(point["predicted"])
    return (
        np.array([point["predicted"][name] for name in names]),
        np.array([median(point["times"][name]) for name in names]),
    )
