"""Serving against its targets: ``python benchmarks/serving.py [--only batching,decode] [--out FOLDER]``.

Prints a table for each part when it is measured, then the verdicts. ``serving.json`` is written after every part, and
keeps what earlier runs measured of the others, so that parts may run one at a time; each takes under three minutes and
15 GB. Afterwards ``scripts/benchmark_page.py`` puts the tables into docs/serving.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from moesaic.bench.limits import machine
from moesaic.bench.report import make_folder
from moesaic.bench.results import add, read
from moesaic.bench.serving import PARTS, olmoe_folder
from moesaic.bench.serving.parts import DEMO
from moesaic.bench.targets import HEADER, Verdict
from moesaic.cli.output import print_table
from moesaic.errors import UsageError

FILE = "serving.json"


def main() -> int:
    """0, or 130 where it was interrupted: what was measured is then written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}, with commas", default=",".join(PARTS))
    parser.add_argument("--demo", type=Path, default=Path("runs/demo/model"), help="the demo model's folder")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder to write")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}: allowed: {', '.join(PARTS)}")
    if DEMO in names and not (options.demo / "config.json").is_file():
        parser.error(
            f"there is no model in {options.demo}: `moesaic train` makes it, --demo names another, --only skips it"
        )
    try:
        make_folder(options.out)
    except UsageError as error:
        parser.error(str(error))
    start, verdicts = time.perf_counter(), list[Verdict]()
    try:
        for name in names:
            verdicts += run(name, options.demo if name == DEMO else olmoe_folder(), options.out)
        code = 0
    except KeyboardInterrupt:
        code = 130
    told = machine()
    print_table(f"Targets, {told['cpu']['model']}", HEADER, [each.cells() for each in verdicts])  # type: ignore[index]
    print(f"{sum(each.passed for each in verdicts)} of {len(verdicts)} targets reached")
    print(f"{time.perf_counter() - start:.0f} s, written to {options.out / FILE}")
    return code


def run(name: str, folder: Path, out: Path) -> list[Verdict]:
    """Measure a part, print and keep it."""
    _progress(f"measuring {name} on {folder}")
    part = PARTS[name](folder, _progress)
    print_table(part.title, part.header, part.rows)
    for line in part.lines:
        print(line)
    add(name, part, machine(), read(out / FILE), out / FILE)
    return part.verdicts


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
