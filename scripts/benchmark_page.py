"""Write what the scripts ``experts``, ``null_slots``, ``serving`` and ``parallel`` of benchmarks/ measured into docs/.

    .venv/bin/python scripts/benchmark_page.py [benchmarks/results]

Copies the pictures of that folder to ``docs/assets``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from moesaic.bench.parallel.grid import best_of
from moesaic.bench.parallel.scale import CLUSTERS
from moesaic.bench.report import HEADER, cells, markdown, milliseconds, notes, rows_of, title
from moesaic.bench.results import read, section, where_of
from moesaic.bench.targets import GROUPS, Verdict
from moesaic.bench.targets import HEADER as VERDICT_HEADER
from moesaic.parallel.choice.clusters import DEVICES, WIRES
from moesaic.parallel.plan import AUTO, STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
SERVING_PAGE = ROOT / "docs" / "serving.md"
PARALLEL_PAGE = ROOT / "docs" / "parallelism.md"
ASSETS = ROOT / "docs" / "assets"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: made by scripts/benchmark_page.py -->\n", "<!-- end of results -->\n"
SLOTS_BEGIN, SLOTS_END = "<!-- null slots: made by scripts/benchmark_page.py -->\n", "<!-- end of null slots -->\n"
# Parts of benchmarks/parallel.py: what their tables show, and how it was measured.
PARALLEL = {
    "links": "What Gloo gets out of the links, against which everything below is to be read: rank 0 sends to the last "
    "rank, then all ranks send to all; medians of 9 rounds.",
    "grid": "`auto` against every fixed plan: each strategy in 1, 2 and 4 chunks, with each exchange that the hosts "
    "allow and each way to gather weights; a hybrid fetches the hottest expert, the hottest eighth or the "
    "hotter half. The choice has met the kind of step before, until it explored no more; then all take turns in an "
    "order drawn anew for each round, and fixed plans that are far behind drop out after one, three or six rounds. A "
    "step takes as long as its slowest rank. Which fixed plan is the best is told by one half of the rounds, and what "
    "it takes by the other half. The error is the largest relative one of outputs and tokens' gradients against the "
    "layer on one process.",
    "model": "What the cost model, from links and experts measured at start, says of every fixed plan of the grid, "
    "against the median time of that plan. Nothing is fitted to these times.",
    "hot": "The strategies as a user names them, with everything else chosen as always, in turns; medians of 5 rounds. "
    "What was chosen stands below.",
    "overlap": "Steps in 1 to 8 chunks, in turns with their two sides alone: the experts on as many rows without an "
    "exchange, and the exchanges without experts. The ideal is the longer side; medians of 7 rounds.",
    "exchange": "An exchange with as many bytes from each rank to each, direct (every rank sends to every other one) "
    "and hierarchical (inside a host, then between hosts), in turns. Above 1 the hierarchical one wins. "
    "One half of the rounds says at which size the target is read, the other half what is read there.",
    "tutel": "Tutel's layer, built for CPUs, with the same weights, the same tokens and the same gate in the same "
    "processes; both take turns, medians of 9 rounds. Ours chooses (`auto`) and has run 25 steps before.",
}


def page(text: str, told: dict[str, Any]) -> str:
    """The page ``text`` with its results made anew from the JSON document of a run."""
    before, rest = text.split(BEGIN)
    parts = [machine(told), targets(told), rows(told), trace(told), model(told)]
    return f"{before}{BEGIN}\n{''.join(part + chr(10) for part in parts if part)}{END}{rest.split(END)[1]}"


def machine(told: dict[str, Any]) -> str:
    """Where and when it was."""
    cpu, versions = told["machine"]["cpu"], told["machine"]["versions"]
    features = ", ".join(f"`{name}`" for name in cpu["features"])
    packages = ", ".join(f"{name} {versions[name]}" for name in ("moesaic", "torch", "transformers"))
    absent = "".join(f" {name} did not take part: {reason}." for name, reason in told.get("absent", {}).items())
    return (
        f"{cpu['model']} ({cpu['architecture']}), {cpu['cores']} cores, {cpu['threads']} threads, "
        f"{told['machine']['memory_bytes'] / 2**30:.0f} GiB; {features}. {packages}. "
        f"Measured {told['machine']['measured']}.{absent}\n"
    )


def targets(told: dict[str, Any]) -> str:
    """Every target and what was reached, by group."""
    verdicts = [Verdict(**{key: value for key, value in each.items() if key != "passed"}) for each in told["verdicts"]]
    parts = [f"### Targets\n\n{sum(each.passed for each in verdicts)} of {len(verdicts)} reached.\n"]
    for group, what in GROUPS.items():
        if chosen := [each.cells() for each in verdicts if each.group == group]:
            parts.append(f"**{group}**: {what}\n\n{markdown(VERDICT_HEADER, chosen)}")
    return "\n".join(parts)


def rows(told: dict[str, Any]) -> str:
    """Every row of expert layers, all contenders."""
    if not told["rows"]:
        return ""
    parts = ["### Expert layers\n\n![Roofline: FLOP/s against FLOP per byte of weights](assets/roofline.png)\n"]
    for row in rows_of(told):
        told_beside = "".join(f"\n{line}.\n" for line in notes(row))
        parts.append(f"{title(row)}\n\n{markdown(HEADER, [cells(row, each) for each in row.results])}{told_beside}")
    return "\n".join(parts)


def trace(told: dict[str, Any]) -> str:
    """The tuner's trace."""
    found = told.get("trace")
    if not found:
        return ""
    lines = [
        (name, milliseconds(seconds), f"{seconds / found['oracle']:.3f}") for name, seconds in found["fixed"].items()
    ]
    lines += [
        ("oracle of each call", milliseconds(found["oracle"]), "1.000"),
        ("auto", milliseconds(found["auto"]), f"{found['auto'] / found['oracle']:.3f}"),
        ("auto, first round", "", f"{found['first_ratio']:.3f}"),
    ]
    return f"### The tuner\n\n{markdown(('backend', 'median round, ms', 'time / oracle'), lines)}"


def model(told: dict[str, Any]) -> str:
    """Generation by a whole model."""
    lines = [
        (
            each["name"],
            f"{each['seconds']:.3f}",
            " - ".join(f"{value:.3f}" for value in each["quartiles"]),
            str(each["same_tokens"]),
            f"{each['logits_error']:.1e}",
            f"{each['ratio']:.2f} ({each['ratio_quartiles'][0]:.2f} - {each['ratio_quartiles'][1]:.2f})",
        )
        for each in told.get("model", [])
    ]
    header = ("implementation", "s", "quartiles", "first tokens alike", "error of the logits", "time / ours")
    return f"### A whole model\n\n{markdown(header, lines)}" if lines else ""


def with_null_slots(text: str, told: dict[str, Any]) -> str:
    """The page ``text`` with its tables of null slots made anew: a row for each case and backend."""
    before, rest = text.split(SLOTS_BEGIN)
    lines = []
    for part in told.values():
        for name in dict.fromkeys(point["backend"] for point in part["points"]):
            own = [point for point in part["points"] if point["backend"] == name]
            *fewer, whole = own
            off = [f"{point['ratio'] / point['share'] - 1:+.0%}" for point in fewer]
            error = max(point["error"] for point in own)
            lines.append((part["title"], name, *off, f"{milliseconds(whole['seconds'])} ms", f"{error:.1e}"))
    shares = [f"{point['share']:.0%}" for point in own[:-1]]
    table = markdown(("layer", "backend", *shares, "all slots", "error"), lines)
    where = where_of(next(iter(told.values()))["machine"])
    return f"{before}{SLOTS_BEGIN}\n{where}\n\n{table}\n{SLOTS_END}{rest.split(SLOTS_END)[1]}"


def serving_page(text: str, told: dict[str, Any]) -> str:
    """The page on serving with its results made anew from the JSON document of a run."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section(told)}\n{END}{rest.split(END)[1]}"


def parallel_page(text: str, told: dict[str, Any]) -> str:
    """The page on parallelism with its results made anew: what was measured, and what was simulated, apart."""
    before, rest = text.split(BEGIN)
    measured = {name: told[name] for name in PARALLEL if name in told}
    points = told.get("grid", {}).get("points", [])
    parts = ["### Measured here\n", section(measured, PARALLEL), losses(points), scale(told.get("scale", {}))]
    return f"{before}{BEGIN}\n{''.join(part + chr(10) for part in parts if part)}{END}{rest.split(END)[1]}"


def losses(points: list[dict[str, Any]]) -> str:
    """What a fixed choice loses over the points of the grid, and how near the predictions are."""
    if not points:
        return ""
    ratios = [_against_best(point["times"], point["work"]["num_experts"]) for point in points]
    lines = list[tuple[str, ...]]()
    for strategy in STRATEGIES:
        own = [[ratio for name, ratio in each.items() if name.split(",")[0] == strategy] for each in ratios]
        least, most = [min(each) for each in own], [max(each) for each in own]
        lines.append((f"`{strategy}`", str(least.count(1.0)), *_spread(least), *_spread(most)))
    everywhere = set.intersection(*(set(each) for each in ratios)) - {AUTO}
    if everywhere:
        once = min(everywhere, key=lambda name: (geometric_mean(each[name] for each in ratios), name))
        lines.append(_alone(f"one plan for all: {once}", [each[once] for each in ratios]))
    lines.append(_alone(f"`{AUTO}`", [each[AUTO] for each in ratios]))
    header = ("", "best at", *("its best plan, mean", "median", "at most"), *("its worst, mean", "median", "at most"))
    return (
        f"**What a fixed choice loses** (the {len(points)} points of the grid)\n\n"
        "Times over that of the point's best fixed plan, by medians of all rounds (so what the best takes is a little "
        "flattered, and `auto` stands worse than in the targets). A strategy's *best plan* is another one at each "
        "point, as nobody can fix it beforehand; *one plan for all* loses least over all points, which one knows "
        "afterwards only. Means are geometric.\n\n"
        f"{markdown(header, lines)}\n"
        "![Predicted against measured times of every plan of the grid](assets/parallel-model.png)\n"
    )


def _against_best(times: dict[str, list[float]], experts: int) -> dict[str, float]:
    """Of each plan; in a hybrid's name is which part of the experts it fetches, not how many."""
    best = best_of(times)[1]
    parts = {"the hottest": 1, "an eighth": max(1, experts // 8), "half": experts // 2}
    told: dict[str, float] = {}
    for name, each in times.items():
        hot = re.search(r" (\d+) fetched", name)
        same = [part for part, number in parts.items() if hot and number == int(hot[1])]
        names = [name.replace(hot[0], f" {part} fetched") for part in same] if hot else [name]
        told |= dict.fromkeys(names, median(each) / best)
    return told


def _alone(name: str, ratios: list[float]) -> tuple[str, ...]:
    return name, str(sum(ratio <= 1 for ratio in ratios)), *_spread(ratios), "", "", ""


def _spread(ratios: list[float]) -> tuple[str, str, str]:
    return f"{geometric_mean(ratios):.2f}x", f"{median(ratios):.2f}x", f"{max(ratios):.2f}x"


def scale(told: dict[str, Any]) -> str:
    """What was simulated, with the figures that went into it."""
    if not told:
        return ""
    devices = {device: DEVICES[device] for device, _, _ in CLUSTERS.values()}
    wires = {wire: WIRES[wire] for _, *both in CLUSTERS.values() for wire in both}
    figures = [(name, f"{it.tflops:g} TFLOP/s, memory {it.gbytes:g} GB/s", it.source) for name, it in devices.items()]
    figures += [
        (name, f"{it.gbytes:g} GB/s one way, {it.micros:g} µs a message", it.source) for name, it in wires.items()
    ]
    work = told["title"].partition(": ")[2]
    return (
        f"### Simulated, not measured\n\n**{work[0].upper()}{work[1:]}**\n\n"
        "Nothing here has run: it is the cost model whose errors are told above, asked about clusters by published "
        "figures, with 8 ranks a host and matrix products at half of the peak. Static expert parallelism: tokens "
        "travel, directly, in one chunk, none dropped. `auto` alone pays for the exchange of counts, and 6 ns of "
        "planning for each of ranks times experts; every plan pays 1 ms a pass and 0.6 ms a chunk on its host, figures "
        "of a CPU. Each point is one drawn routing. The model was "
        "checked on the small machine above, never on GPUs or so many ranks. `moesaic plan` gives other points.\n\n"
        f"{markdown(told['header'], told['rows'])}\n"
        "![Simulated speed-up over static expert parallelism, by ranks](assets/parallel-scale.png)\n\n"
        f"{markdown(('', 'figures', 'source'), figures)}\n"
        "Latencies are those of NCCL's own cost model (`src/graph/tuning.cc`).\n"
    )


def main(folder: Path) -> None:
    """Write the pages of what was measured."""
    if (folder / "experts.json").exists():
        document = json.loads((folder / "experts.json").read_text(encoding="utf-8"))
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), document), encoding="utf-8")
        if document["rows"]:
            shutil.copyfile(folder / "roofline.png", ASSETS / "roofline.png")
    if told := read(folder / "null_slots.json"):
        PAGE.write_text(with_null_slots(PAGE.read_text(encoding="utf-8"), told), encoding="utf-8")
    if told := read(folder / "serving.json"):
        SERVING_PAGE.write_text(serving_page(SERVING_PAGE.read_text(encoding="utf-8"), told), encoding="utf-8")
    if told := read(folder / "parallel.json"):
        PARALLEL_PAGE.write_text(parallel_page(PARALLEL_PAGE.read_text(encoding="utf-8"), told), encoding="utf-8")
        for picture in folder.glob("parallel-*.png"):
            shutil.copyfile(picture, ASSETS / picture.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
