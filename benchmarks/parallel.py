"""Expert layers over ranks against their targets: ``python benchmarks/parallel.py [--only grid,hot] [--out FOLDER]``.

Ranks are processes on this machine, and "hosts" network namespaces behind links of limited rate, which need root and
iproute2; without them those parts are skipped. Prints a table for each part when it is measured, then the verdicts.
``parallel.json`` and the pictures are written after every part and keep what earlier runs measured of the others.
Nothing else may run meanwhile. Afterwards ``scripts/benchmark_page.py`` puts the tables into docs/parallelism.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from moesaic.bench.limits import machine
from moesaic.bench.parallel.parts import PARTS
from moesaic.bench.parallel.pictures import write_predictions, write_scale
from moesaic.bench.parallel.run import Run
from moesaic.bench.part import Part
from moesaic.bench.report import make_folder
from moesaic.bench.results import add, read
from moesaic.bench.targets import HEADER, Verdict
from moesaic.cli.output import print_table
from moesaic.errors import UsageError

FILE = "parallel.json"


def main() -> int:
    """0, or 130 where it was interrupted: what was measured is then written."""
    parser = argparse.ArgumentParser(
        description="Expert layers over ranks against their targets. All parts take about an hour, on a machine that "
        "does nothing else. The parts with several hosts are skipped without root and iproute2 (ip, tc): hosts are "
        "network namespaces behind links of limited rate.",
        epilog="Then scripts/benchmark_page.py writes docs/parallelism.md.",
    )
    parser.add_argument(
        "--only", help=f"some of {', '.join(PARTS)}, with commas; all by default", default=",".join(PARTS)
    )
    parser.add_argument("--quick", action="store_true", help="fewer points and rounds")
    parser.add_argument(
        "--seconds", type=float, help="begin no further point of the grid after so long; no limit by default"
    )
    parser.add_argument("--resume", action="store_true", help="keep the points of the grid that the file has")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="the folder to write; %(default)s by default"
    )
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}: allowed: {', '.join(PARTS)}")
    try:
        make_folder(options.out)
    except UsageError as error:
        parser.error(str(error))
    run = Run(_progress, options.quick, options.seconds)
    if run.lab:
        _progress(f"no hosts, only ranks on one machine: {run.lab}")
    verdicts = list[Verdict]()
    for name in names:
        if run.interrupted:
            break
        _progress(f"measuring {name}")
        told = read(options.out / FILE).get("grid", {})
        run.earlier = told if name == "model" or options.resume else {}
        try:
            verdicts += keep(name, PARTS[name](run), options.out)
        except KeyboardInterrupt:
            run.interrupted = True
    print_table(f"Targets, {machine()['cpu']['model']}", HEADER, [each.cells() for each in verdicts])  # type: ignore[index]
    print(f"{sum(each.passed for each in verdicts)} of {len(verdicts)} targets reached")
    print(f"{time.perf_counter() - run.start:.0f} s, written to {options.out / FILE}")
    return 130 if run.interrupted else 0


def keep(name: str, part: Part, out: Path) -> list[Verdict]:
    """Print and write a part."""
    print_table(part.title, part.header, part.rows)
    for line in part.lines:
        print(line)
    add(name, part, machine(), read(out / FILE), out / FILE)
    if name == "grid" and part.points:
        write_predictions(part.points, out / "parallel-model.png")
    if name == "scale":
        write_scale(part.points, out / "parallel-scale.png")
    return part.verdicts


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
