"""The roofline picture: what each contender reached, under what the machine allows.

Roofline: An Insightful Visual Performance Model for Multicore Architectures (Williams, Waterman, Patterson), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moesaic.bench.experts import Row

# Okabe and Ito's palette; every contender has a marker of its own as well, so that no colour has to be seen.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "os^Dv*PX"
_COLUMNS = 3


def write_roofline(rows: Sequence[Row], path: Path) -> None:
    """Draw achieved FLOP/s against arithmetic intensity (FLOP per byte of active weights), a mark a contender and row.

    Each shape and dtype has a panel. Its ceilings are the medians of its rows' measured limits: streaming read, and
    multiply-adds on registers (a large matmul where that was not measured).
    """
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(f"{row.shape}, {row.dtype}" + (", with gradients" if row.backward else ""), []).append(row)
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.6, 4.2 * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    names = list(dict.fromkeys(result.name for row in rows for result in row.results))
    marks: dict[str, Any] = {}
    for axes, (title, chosen) in zip(grid, panels.items(), strict=False):
        _ceilings(axes, chosen)
        marks |= _marks(axes, chosen, names)
        axes.set(xscale="log", yscale="log", title=title, xlabel="FLOP per byte of active weights", ylabel="GFLOP/s")
        axes.grid(which="both", color="#dddddd", linewidth=0.5)
    for spare in grid[len(panels) :]:
        spare.set_axis_off()
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=min(4, max(1, len(marks))))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _marks(axes: Any, rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """Draw the contenders that took part; each with what the legend shows."""
    drawn = {}
    for index, name in enumerate(names):
        # The markers are shifted by one where the colours begin anew.
        style = {"color": _COLORS[index % 8], "marker": _MARKERS[(index // 8 + index) % 8]}
        points = [
            (row.flops / result.bytes, row.flops / result.seconds / 1e9)
            for row in rows
            if (result := row.result(name)) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            (drawn[name],) = axes.plot(x, y, linestyle="none", markersize=6.5, alpha=0.8, label=name, **style)
    for row in rows:
        if row.results:
            fastest = min(row.results, key=lambda result: result.seconds)
            axes.annotate(
                f"{row.tokens} hot" if row.routing == "hot" else str(row.tokens),
                (row.flops / fastest.bytes, row.flops / fastest.seconds / 1e9),
                xytext=(-4, 6),
                textcoords="offset points",
                fontsize="small",
                ha="right",
            )
    return drawn


def _ceilings(axes: Any, rows: Sequence[Row]) -> None:
    read = float(np.median([row.limits["read"] for row in rows]))
    best = "registers" if all("registers" in row.limits for row in rows) else "matmul"
    rate = float(np.median([row.limits[best] for row in rows]))
    intensities = [row.flops / result.bytes for row in rows for result in row.results] or [1.0]
    line = np.geomspace(min(*intensities, rate / read) / 2, max(*intensities, rate / read) * 2, 200)
    axes.plot(line, np.minimum(line * read, rate) / 1e9, color="black", linewidth=1.2)
    told = f"{read / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s ({best})"
    axes.text(0.98, 0.03, told, transform=axes.transAxes, ha="right", fontsize="small")
