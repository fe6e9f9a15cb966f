"""What the parts found, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesaic.bench.part import Part
from moesaic.bench.report import markdown, write
from moesaic.bench.targets import HEADER, Verdict


def read(path: Path) -> dict[str, Any]:
    """Earlier parts, by name; none where nothing has been measured."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def add(name: str, part: Part, machine: Mapping[str, object], earlier: dict[str, Any], path: Path) -> None:
    """Write a part beside the earlier ones; each keeps the machine and the time of its own."""
    told = asdict(part) | {"machine": dict(machine)}
    for verdict, each in zip(part.verdicts, told["verdicts"], strict=True):
        each["passed"] = verdict.passed
    write(earlier | {name: told}, path)


def section(told: Mapping[str, Any], before: Mapping[str, str] | None = None) -> str:
    """The measured part of a page: all targets, then a table for each part, in the order of the file.

    Args:
        before: by part, what is said between its title and its table.
    """
    verdicts = [
        Verdict(**{key: value for key, value in each.items() if key != "passed"})
        for part in told.values()
        for each in part["verdicts"]
    ]
    parts = [f"{sum(each.passed for each in verdicts)} of {len(verdicts)} targets reached.\n"]
    parts.append(markdown(HEADER, [each.cells() for each in verdicts]))
    for name, part in told.items():
        said = f"{before[name]}\n\n" if before and name in before else ""
        table = markdown(part["header"], part["rows"]) if part["rows"] else ""
        lines = "".join(f"\n{line[0].upper()}{line[1:]}.\n" for line in part["lines"])
        parts.append(f"**{part['title']}** ({where_of(part['machine'])})\n\n{said}{table}{lines}")
    return "\n".join(parts)


def where_of(machine: Mapping[str, Any]) -> str:
    """The machine, the versions and the time, in one line."""
    cpu, versions = machine["cpu"], machine["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("moesaic", "torch", "transformers"))
    hardware = f"{cpu['model']}, {cpu['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
    return f"{hardware}; {packages}; {machine['measured']}"
