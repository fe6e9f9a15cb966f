"""The report's pictures for papers and slides: PNG files by matplotlib, on white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moesaic.inspect.kinds import KINDS

DPI = 150
# Okabe and Ito's palette, which the colour-blind can tell apart; dashes where there are more domains than colours.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def write_figures(report: dict[str, Any], folder: Path) -> list[str]:
    """Write the figures of a report of :func:`moesaic.inspect.analyze` into ``folder``; returns the file names.

    load.png, layers.png, and where there is something to show, preference.png (several domains), spending.png (tokens
    take different numbers of experts) and transitions.png (several MoE layers).

    Raises:
        OSError: where the disk does not allow it.
    """
    figures = {"load.png": _load(report), "layers.png": _layers(report)}
    if len(_domains(report)) > 1:
        figures["preference.png"] = _preference(report)
    if report["experts_per_token"]["varies"]:
        figures["spending.png"] = _spending(report)
    if report["transitions"]:
        figures["transitions.png"] = _transitions(report)
    for name, figure in figures.items():
        # No software version in the file: the same report gives the same bytes.
        FigureCanvasAgg(figure)
        figure.savefig(folder / name, metadata={"Software": None})
    return list(figures)


def _domains(report: dict[str, Any]) -> list[str]:
    return [domain["name"] for domain in report["data"]["domains"]]


def _table(rows: list[list[float]]) -> np.ma.MaskedArray[Any, Any]:
    """``[L, largest E]``; layers with fewer experts are masked at their end."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return np.ma.masked_invalid(table)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _heat_maps(
    report: dict[str, Any], panels: dict[str, np.ma.MaskedArray[Any, Any]], unit: str, **colors: Any
) -> Figure:
    """Panels of layers and experts, one under the other, on one scale."""
    numbers = [layer["label"] for layer in report["layers"]]
    step = max(1, len(numbers) // 12)
    figure = _figure(7, 0.6 + len(panels) * (0.8 + 0.16 * min(40, len(numbers))))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for one, (title, table) in zip(axes, panels.items(), strict=True):
        picture = one.imshow(table, aspect="auto", interpolation="nearest", **colors)
        one.set_title(title, loc="left")
        one.set(xlabel="expert", ylabel="layer")
        one.set_yticks(range(0, len(numbers), step), numbers[::step])
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(picture, ax=list(axes), label=unit)
    return figure


def _load(report: dict[str, Any]) -> Figure:
    """Load in even shares, of all text and of each domain."""
    names, layers = _domains(report), report["layers"]
    panels = {"load, all": _table([_in_even_shares(layer, layer["load"]) for layer in layers])}
    for name in names if len(names) > 1 else []:
        panels[f"load, {name}"] = _table([_in_even_shares(layer, layer["load_by_domain"][name]) for layer in layers])
    top = max(float(table.max()) for table in panels.values())
    return _heat_maps(report, panels, "even shares", cmap="cividis", vmin=0, vmax=max(2, top))


def _in_even_shares(layer: dict[str, Any], load: list[float]) -> list[float]:
    return [value * layer["experts"] for value in load]


def _preference(report: dict[str, Any]) -> Figure:
    """Each expert's domains as if all were equally long: two of them on one scale, more in a panel each."""
    names = _domains(report)
    even = 1 / len(names)
    panels = {}
    for name in names[:1] if len(names) == 2 else names:
        title = f"preference for {name} (blue)" + (f" or {names[1]} (red)" if len(names) == 2 else "")
        panels[title] = _table([[part - even for part in layer["domain_mix"][name]] for layer in report["layers"]])
    # Blue to red through white, told apart by any eye; the even part in the middle.
    return _heat_maps(report, panels, "above even", cmap="RdBu", vmin=even - 1, vmax=1 - even)


def _positions(report: dict[str, Any]) -> list[float]:
    """Where a layer is on an axis of layers: the routings of one layer in equal steps up to the next layer."""
    numbers = [layer["number"] for layer in report["layers"]]
    seen = [numbers[:i].count(number) for i, number in enumerate(numbers)]
    return [number + before / numbers.count(number) for number, before in zip(numbers, seen, strict=True)]


def _spending(report: dict[str, Any]) -> Figure:
    """Experts per token by kind, mean and standard deviation over all layers; and by layer."""
    spent = report["experts_per_token"]
    kinds = sorted(spent["by_kind"].items(), key=lambda item: item[1]["mean"])
    figure = _figure(8, 1.2 + 0.3 * len(kinds))
    by_kind, by_layer = figure.subplots(1, 2, width_ratios=[3, 2])
    means, spreads = ([of[key] for _, of in kinds] for key in ("mean", "spread"))
    by_kind.barh([KINDS[kind] for kind, _ in kinds], means, xerr=spreads, color=COLORS[0], error_kw={"linewidth": 1})
    by_kind.axvline(spent["mean"], color="gray", linestyle=":")
    by_kind.set(title="experts per token, by its kind")
    by_kind.set_xlim(left=0)
    of_layers = [layer["experts_per_token"] for layer in report["layers"]]
    by_layer.errorbar(
        _positions(report), [of["mean"] for of in of_layers], [of["spread"] for of in of_layers], marker=".", capsize=2
    )
    by_layer.set(title="by layer", xlabel="layer")
    by_layer.set_ylim(bottom=0)
    by_layer.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _layers(report: dict[str, Any]) -> Figure:
    """Entropy, imbalance, domain information and token consistency by layer."""
    layers, names = report["layers"], _domains(report)
    x = _positions(report)
    figure = _figure(8, 5)
    ((entropy, imbalance), (information, consistency)) = figure.subplots(2, 2)
    for d, name in enumerate(names):
        style = {"color": COLORS[d % len(COLORS)], "linestyle": "--" if d >= len(COLORS) else "-"}
        entropy.plot(x, [layer["entropy_by_domain"][name] for layer in layers], marker=".", label=name, **style)
    entropy.set(title="router entropy", ylim=(0, 1.05))
    entropy.legend(fontsize="small")
    imbalance.plot(x, [layer["imbalance"] for layer in layers], marker=".", color="black")
    imbalance.axhline(1, color="gray", linestyle=":")
    imbalance.set(title="load imbalance (max / mean)")
    imbalance.set_ylim(bottom=0)
    information.plot(x, [layer["domain_information"] for layer in layers], marker=".", color="black")
    information.set(title="domain information")
    information.set_ylim(bottom=0)
    for key, line in (("share", "-"), ("chance", ":")):
        values = [layer["token_consistency"][key] for layer in layers]
        consistency.plot(x, values, marker=".", linestyle=line, color="black", label=key)
    consistency.set(title="a token goes to its usual expert", ylim=(0, 1.05))
    consistency.legend(fontsize="small")
    for axes in figure.axes:
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _transitions(report: dict[str, Any]) -> Figure:
    """The transition matrices, evenly chosen where there are more of them than fit on a page."""
    chosen = [report["transitions"][i] for i in _spread(len(report["transitions"]), 9)]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = _figure(2.6 * columns + 0.9, 2.7 * rows + 0.3)
    top = max(max(map(max, transition["probabilities"])) for transition in chosen) or 1.0
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for one, transition in zip(axes, chosen, strict=False):
        picture = one.imshow(transition["probabilities"], cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
        one.set(title=f"layer {transition['from']} to {transition['to']}", xlabel="next expert", ylabel="expert")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.yaxis.set_major_locator(MaxNLocator(integer=True))
    for spare in axes[len(chosen) :]:
        spare.set_axis_off()
    figure.colorbar(picture, ax=list(axes), label="P(next expert | expert)", shrink=0.7)
    return figure


def _spread(count: int, limit: int) -> list[int]:
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]
