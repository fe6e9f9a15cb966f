"""Every row of the table of targets: ``python benchmarks/experts.py [--only decode,prefill] [--out FOLDER]``.

Prints each row when it is measured, then the verdicts; writes ``experts.json`` and ``roofline.png`` after every row, so
that an interruption loses only the row that was being measured. Afterwards ``scripts/benchmark_page.py`` puts the
tables into docs/benchmarks.md. All of it takes less than 15 minutes and 12 GiB on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesaic.bench import Plan, Row, measure
from moesaic.bench.field import PEERS
from moesaic.bench.generation import run_generation
from moesaic.bench.report import HEADER, cells, document, make_folder, notes, title, write
from moesaic.bench.roofline import write_roofline
from moesaic.bench.targets import GROUPS, batches, model_verdicts, row_verdicts, trace_verdicts
from moesaic.bench.targets import HEADER as VERDICT_HEADER
from moesaic.bench.trace import run_trace
from moesaic.cli.output import print_table
from moesaic.errors import UsageError


def main() -> int:
    """0, or 130 where it was interrupted: what was measured is then written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"some of {', '.join(GROUPS)}, with commas", default=",".join(GROUPS))
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long one row of expert layers may take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder to write")
    options = parser.parse_args()
    groups = options.only.split(",")
    if unknown := [group for group in groups if group not in GROUPS]:
        parser.error(f"unknown group {unknown[0]!r}: allowed: {', '.join(GROUPS)}")
    if not 0 < options.seconds <= 3600:
        parser.error(f"--seconds is {options.seconds}: it must be above 0, and 3600 at most")
    try:
        make_folder(options.out)
    except UsageError as error:
        parser.error(str(error))
    run = Run(options.out, options.seconds)
    start = time.perf_counter()
    try:
        run.all(groups)
        code = 0
    except KeyboardInterrupt:
        code = 130
    run.tell()
    print(f"{time.perf_counter() - start:.0f} s, written to {options.out}")
    return code


class Run:
    """What has been measured so far, and where it goes."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.seconds = out, seconds
        self.rows: list[Row] = []
        self.verdicts: list[Any] = []
        self.more: dict[str, Any] = {}

    def all(self, groups: list[str]) -> None:
        """Every group, in the table's order."""
        absent = {name: reason for name, missing in PEERS.items() if (reason := missing())}
        self.more["absent"] = absent
        for name, reason in absent.items():
            print(f"{name} does not take part: {reason}")
        for batch in batches(groups, [name for name in PEERS if name not in absent]):
            for row in measure(Plan(batch.works, batch.ours, batch.against, self.seconds), tell=_progress):
                self.add(row)
        if "trace" in groups:
            _progress("measuring the tuner on a mixed trace")
            trace = run_trace(5 * self.seconds)
            self.more["trace"] = asdict(trace)
            self.verdicts += trace_verdicts(trace)
            self.save()
        if "model" in groups:
            _progress("measuring generation by a whole model")
            generations = run_generation(["moesaic", "grouped_mm", "eager"], 5 * self.seconds)
            self.more["model"] = [asdict(each) for each in generations]
            self.verdicts += model_verdicts(generations)
            self.save()

    def add(self, row: Row) -> None:
        """Print and keep a row."""
        self.rows.append(row)
        self.verdicts += row_verdicts(row)
        print_table(title(row), HEADER, [cells(row, result) for result in row.results])
        for line in notes(row):
            print(line)
        self.save()

    def save(self) -> None:
        """Write everything."""
        verdicts = [{**asdict(each), "passed": each.passed} for each in self.verdicts]
        write({**document(self.rows), **self.more, "verdicts": verdicts}, self.out / "experts.json")
        if self.rows:
            write_roofline(self.rows, self.out / "roofline.png")

    def tell(self) -> None:
        """Print the verdicts."""
        order = list(GROUPS)
        verdicts = sorted(self.verdicts, key=lambda each: order.index(each.group))
        print_table("Targets", VERDICT_HEADER, [each.cells() for each in verdicts])
        print(f"{sum(each.passed for each in verdicts)} of {len(verdicts)} targets reached")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
