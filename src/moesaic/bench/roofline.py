"""The roofline picture: what each contender reached, under what the machine allows.

Roofline: An Insightful Visual Performance Model for Multicore Architectures (Williams, Waterman, Patterson), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moesaic.bench.experts import Row

# Okabe and Ito's palette; every contender has a marker of its own as well, so that no colour has to be seen.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "os^Dv*PX"


def write_roofline(rows: Sequence[Row], path: Path) -> None:
    """Draw achieved FLOP/s against arithmetic intensity (FLOP per byte of active weights), a mark a contender and row.

    The ceilings are the medians of the rows' measured limits: streaming read, and multiply-adds on registers (a large
    matmul where that was not measured). Rows of several dtypes get a panel each.
    """
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure = Figure(figsize=(7.5 * len(dtypes), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(dtypes), squeeze=False)[0]
    names = list(dict.fromkeys(result.name for row in rows for result in row.results))
    for axes, dtype in zip(panels, dtypes, strict=True):
        chosen = [row for row in rows if row.dtype == dtype]
        _ceilings(axes, chosen)
        for index, name in enumerate(names):
            points = [
                (row.flops / result.bytes, row.flops / result.seconds / 1e9)
                for row in chosen
                if (result := row.result(name)) is not None
            ]
            style = {"color": _COLORS[index % len(_COLORS)], "marker": _MARKERS[index // 8 + index % 8 - len(_MARKERS)]}
            if points:
                axes.plot(*zip(*points, strict=True), linestyle="none", markersize=7, alpha=0.85, label=name, **style)
        for row in chosen:
            at = (row.flops / row.bytes, min(result.seconds for result in row.results))
            axes.annotate(
                f"{row.shape} {row.tokens}",
                (at[0], row.flops / at[1] / 1e9),
                xytext=(0, 7),
                textcoords="offset points",
                fontsize="xx-small",
                ha="center",
            )
        axes.set(xscale="log", yscale="log", title=dtype, xlabel="FLOP per byte of active weights", ylabel="GFLOP/s")
        axes.grid(which="both", color="#dddddd", linewidth=0.5)
        axes.legend(fontsize="small", loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _ceilings(axes: object, rows: Sequence[Row]) -> None:
    read = float(np.median([row.limits["read"] for row in rows]))
    best = "registers" if all("registers" in row.limits for row in rows) else "matmul"
    rate = float(np.median([row.limits[best] for row in rows]))
    intensities = [row.flops / row.bytes for row in rows]
    line = np.geomspace(min(intensities) / 2, max(*intensities, rate / read) * 2, 200)
    ceiling = np.minimum(line * read, rate) / 1e9
    label = f"limits: {read / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s ({best})"
    axes.plot(line, ceiling, color="black", linewidth=1.2, label=label)  # type: ignore[attr-defined]
