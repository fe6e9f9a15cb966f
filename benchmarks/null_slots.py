"""Do null slots save their time: ``python benchmarks/null_slots.py [--only B,wide] [--out FOLDER]``.

An MoE layer with its gate, at 2048 tokens, with a tenth to all of its slots in use, by each backend; all of them
alternate in one process. Prints a table for each case when it is measured, then the verdicts; ``null_slots.json`` is
written after every case and keeps what earlier runs measured of the others. Nothing else may run meanwhile: all of it
takes about six minutes. Afterwards ``scripts/benchmark_page.py`` puts the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moesaic.bench.limits import machine
from moesaic.bench.null_slots import CASES, measure
from moesaic.bench.report import make_folder
from moesaic.bench.results import add, read
from moesaic.bench.targets import HEADER, Verdict
from moesaic.cli.output import print_table
from moesaic.errors import UsageError
from moesaic.experts import available

FILE = "null_slots.json"
BACKENDS = ("grouped", "native", "auto")


def main() -> int:
    """0, or 130 where it was interrupted: what was measured is then written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"some of {', '.join(CASES)}, with commas", default=",".join(CASES))
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long the runs of one case may take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder to write")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}: allowed: {', '.join(CASES)}")
    try:
        make_folder(options.out)
    except UsageError as error:
        parser.error(str(error))
    backends = [name for name in BACKENDS if name in ("auto", *available())]
    verdicts: list[Verdict] = []
    code = 0
    for name in names:
        print(f"measuring {CASES[name]}", file=sys.stderr, flush=True)
        try:
            part = measure(CASES[name], backends, options.seconds)
        except KeyboardInterrupt:
            code = 130
            break
        print_table(part.title, part.header, part.rows)
        for line in part.lines:
            print(line)
        add(name, part, machine(), read(options.out / FILE), options.out / FILE)
        verdicts += part.verdicts
    print_table("Targets", HEADER, [each.cells() for each in verdicts])
    return code


if __name__ == "__main__":
    sys.exit(main())
