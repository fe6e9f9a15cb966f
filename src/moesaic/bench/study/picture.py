"""The picture: loss against what a token costs, and every recipe's difference to what it is compared with."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moesaic.bench.study.figures import LINE, Difference
from moesaic.bench.study.page import Study

_BASE, _OTHER, _FAINT = "#000000", "#0072B2", "#999999"
_VERDICTS = {"yes": "#009E73", "no": "#D55E00", "unclear": "#999999"}


def write_picture(study: Study, path: Path) -> None:
    """Two panels: mean validation loss over active parameters, and the paired differences at equal compute."""
    compared = {
        name: difference
        for name in study.rows
        if (comparison := study.comparison(name)) and (difference := comparison.at_equal_compute)
    }
    figure = Figure(figsize=(11, max(4.5, 0.24 * len(compared) + 1.5)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    _costs(left, study)
    _differences(right, study, compared)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _costs(axes: Any, study: Study) -> None:
    places = {}
    for name, row in study.rows.items():
        x, y = fmean(row.active) / 1e6, fmean(row.loss)
        error = stdev(row.loss) if len(row.loss) > 1 else 0.0
        color = _BASE if name in LINE else _OTHER
        axes.errorbar(x, y, yerr=error, fmt="s" if name in LINE else "o", markersize=4, color=color, linewidth=0.8)
        places[name] = (x, y)
    line = [places[name] for name in LINE if name in places]
    axes.plot(*zip(*line, strict=True), color=_BASE, linewidth=0.8, label="softmax top-1, 2, 3") if line else None
    _labels(axes, places)
    axes.set(xlabel="parameters that a token meets, millions", ylabel="validation loss, nats per token")
    axes.grid(color="#eeeeee", linewidth=0.5)
    if line:
        axes.legend(fontsize=8, loc="upper right")


def _labels(axes: Any, places: dict[str, tuple[float, float]]) -> None:
    """Names beside their points, moved up until none lies on another one."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    axes.set_xlim(left, right := right + 0.22 * (right - left))
    height, taken = (high - low) / 42, list[tuple[float, float, float]]()
    for name, (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
        start, width, at = x + 0.012 * (right - left), 0.0135 * len(name) * (right - left), y
        while any(abs(at - b) < height and start < c and a < start + width for a, b, c in taken):
            at += height / 4
        taken.append((start, at, start + width))
        axes.annotate(
            name,
            (x, y),
            xytext=(start, at),
            fontsize=6.5,
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": _FAINT},
        )


def _differences(axes: Any, study: Study, compared: dict[str, Difference]) -> None:
    names = list(compared)
    for place, name in enumerate(reversed(names)):
        difference = compared[name]
        color = _VERDICTS[difference.verdict()]
        margin = min(difference.margin, 10 * abs(difference.mean) + 0.1)  # infinite for one seed
        axes.errorbar(difference.mean, place, xerr=margin, fmt="o", color=color, markersize=4, linewidth=1)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), [f"{name} − {study.entries[name].against}" for name in reversed(names)])
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="difference in loss at equal compute (left is better; colour: beyond its margin or not)")
    axes.grid(color="#eeeeee", linewidth=0.5)
