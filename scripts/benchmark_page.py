"""Write what ``benchmarks/experts.py`` and ``serving.py`` measured into docs/benchmarks.md and docs/serving.md.

    .venv/bin/python scripts/benchmark_page.py [benchmarks/results]

Copies the roofline picture of that folder to ``docs/assets/roofline.png``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from moesaic.bench.report import HEADER, cells, markdown, milliseconds, notes, rows_of, title
from moesaic.bench.results import read, section
from moesaic.bench.targets import GROUPS, Verdict
from moesaic.bench.targets import HEADER as VERDICT_HEADER

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
SERVING_PAGE = ROOT / "docs" / "serving.md"
PICTURE = ROOT / "docs" / "assets" / "roofline.png"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: made by scripts/benchmark_page.py -->\n", "<!-- end of results -->\n"


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


def serving_page(text: str, told: dict[str, Any]) -> str:
    """The page on serving with its results made anew from the JSON document of a run."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section(told)}\n{END}{rest.split(END)[1]}"


def main(folder: Path) -> None:
    """Write the pages of what was measured."""
    if (folder / "experts.json").exists():
        document = json.loads((folder / "experts.json").read_text(encoding="utf-8"))
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), document), encoding="utf-8")
        if document["rows"]:
            shutil.copyfile(folder / "roofline.png", PICTURE)
    if told := read(folder / "serving.json"):
        SERVING_PAGE.write_text(serving_page(SERVING_PAGE.read_text(encoding="utf-8"), told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
