"""Pictures of what was measured, and of what was simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moesaic.bench.parallel.grid import predictions

# Okabe and Ito's palette; every line has a marker of its own as well, so that no colour has to be seen.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = "os^Dv"
_WITHIN = 0.15


def write_predictions(points: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured seconds: a mark for each plan at each point of the grid."""
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    times: list[float] = []
    for index, setting in enumerate(dict.fromkeys(point["setting"] for point in points)):
        for count, point in enumerate(each for each in points if each["setting"] == setting):
            predicted, measured = (each * 1e3 for each in predictions(point))
            label = setting if count == 0 else None
            color, marker = _COLORS[index % 5], _MARKERS[index % 5]
            axes.scatter(measured, predicted, s=8, color=color, marker=marker, alpha=0.5, linewidths=0, label=label)
            times += measured.tolist()
    ends = [min(times), max(times)]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    low, high = ([end * factor for end in ends] for factor in (1 - _WITHIN, 1 + _WITHIN))
    axes.fill_between(ends, low, high, color="black", alpha=0.12, linewidth=0, label=f"within {_WITHIN:.0%}")
    axes.set(xscale="log", yscale="log", xlabel="measured, ms a step", ylabel="predicted, ms a step")
    axes.grid(which="both", color="#dddddd", linewidth=0.5)
    axes.legend(fontsize=8)
    _save(figure, path)


def write_scale(points: list[dict[str, Any]], path: Path) -> None:
    """Simulated speed-ups by the number of ranks: a panel for each cluster, a line for each routing."""
    clusters = list(dict.fromkeys(point["cluster"] for point in points))
    figure = Figure(figsize=(3.6 * len(clusters), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(clusters), squeeze=False, sharey=True)[0]
    for axes, cluster in zip(panels, clusters, strict=True):
        here = [point for point in points if point["cluster"] == cluster]
        for index, routing in enumerate(dict.fromkeys(point["routing"] for point in here)):
            line = [(point["ranks"], point["speedup"]) for point in here if point["routing"] == routing]
            style = {"color": _COLORS[index], "marker": _MARKERS[index], "markersize": 4}
            axes.plot(*zip(*line, strict=True), label=routing, **style)
        axes.set(title=cluster, xlabel="ranks")
        axes.set_xscale("log", base=2)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.grid(color="#dddddd", linewidth=0.5)
    panels[0].set_ylabel("simulated speed-up over static EP")
    panels[0].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
