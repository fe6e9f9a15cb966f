"""Every way to route, trained alike: ``python benchmarks/routing.py [--only NAME,NAME] [--jobs 2] [--steps N]``.

Trains each recipe of ``recipes/routing`` with three seeds, several single-threaded processes side by side; measures the
speed of all trained models in one process; writes docs/routing.md with its picture: every figure, and for each recipe
whether what its paper claims shows. What has been done is not done again, and Ctrl-C loses nothing: the same command
goes on. What is claimed and what is said stands in ``benchmarks/routing.toml``; the command ends with 1 where that
does not fit the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.bench.limits import machine
from moesaic.bench.report import make_folder, write
from moesaic.bench.study.entries import Entry, chosen, load_entries
from moesaic.bench.study.figures import figures_of
from moesaic.bench.study.page import BEGIN, END, Study, contradictions, replaced, section
from moesaic.bench.study.picture import write_picture
from moesaic.bench.study.runs import Task, run_all, tasks, work
from moesaic.bench.study.speed import measure_speed
from moesaic.errors import ConfigError, MoesaicError
from moesaic.train.display import ConsoleDisplay
from moesaic.train.job import Training

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "routing"
TABLE = Path(__file__).with_suffix(".toml")
PAGE = ROOT / "docs" / "routing.md"
PICTURE = ROOT / "docs" / "assets" / "routing.png"
SEEDS = "0,1,2"


def main(words: Sequence[str] | None = None) -> int:
    """0; 1 where a run failed or a sentence does not fit the figures; 2 for wrong usage; 130 where interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of recipes, with commas; then docs/ is left as it is")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; %(default)s by default")
    parser.add_argument("--steps", type=int, help="so many in place of the recipes' own; then docs/ is left as it is")
    parser.add_argument("--seeds", default=SEEDS, help="whole numbers, with commas; %(default)s by default")
    parser.add_argument("--out", type=Path, default=Path("runs/routing"), help="the folder to write")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page from what is there")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # NAME-SEED: what one process of the pool does
    options = parser.parse_args(words)
    try:
        return _main(options)
    except MoesaicError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _main(options: argparse.Namespace) -> int:
    entries = load_entries(RECIPES, TABLE)
    if options.run:
        name, _, seed = options.run.rpartition("-")
        work(Task(entries[name], int(seed), options.out / options.run, options.steps), ConsoleDisplay())
        return 0
    seeds = _seeds(options.seeds)
    if options.jobs < 1 or (options.steps is not None and options.steps < 1):
        raise ConfigError("--jobs and --steps must be at least 1")
    picked = chosen(entries, [name for name in options.only.split(",") if name])
    out = options.out if options.steps is None else options.out / f"steps-{options.steps}"
    make_folder(out)
    runs = tasks(list(picked.values()), seeds, out, options.steps)
    failed = [] if options.page else _train(runs, options.jobs)
    path = out / ("speed-only.json" if options.only else "speed.json")  # rates of one pass only can be compared
    speeds = _speed(runs, seeds[0], path, measure=not options.page)
    study = _gather(entries, runs, speeds)
    if not study.rows:
        print("nothing has been trained yet", file=sys.stderr)
        return 1
    whole = set(study.rows) == set(entries) and options.steps is None and options.seeds == SEEDS
    problems = _write(study, out, in_docs=whole and all(task.result() for task in runs))
    return int(bool(failed or problems))


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds is {text!r}: it must be whole numbers with commas between") from None


def _train(runs: Sequence[Task], jobs: int) -> list[Task]:
    todo = [task for task in runs if task.result() is None]
    _say(f"{len(runs) - len(todo)} of {len(runs)} runs are done")
    if todo:
        Training(todo[0].recipe).read(None)  # once, before several processes need it
    return run_all(todo, jobs, _command, _say)


def _command(task: Task) -> list[str]:
    words = [sys.executable, __file__, "--run", task.name, "--out", str(task.folder.parent)]
    # A tuned choice of kernels hangs on who else is running; numbers shall not.
    alone = ["env", "OMP_NUM_THREADS=1", "MOESAIC_TUNE=off"]
    return [*alone, *words, *(["--steps", str(task.steps)] if task.steps is not None else [])]


def _speed(runs: Sequence[Task], seed: int, path: Path, *, measure: bool) -> dict[str, Any]:
    """Rates of the first seed's models, measured anew where a model has come since; what is there otherwise."""
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ready = {task.entry.name: task for task in runs if task.seed == seed and task.result()}
    stamps = {name: (task.folder / "study.json").stat().st_mtime for name, task in ready.items()}
    if measure and ready and any(told.get("stamps", {}).get(name) != stamp for name, stamp in stamps.items()):
        os.environ["MOESAIC_TUNE"] = "off"
        told = {"machine": machine(), "stamps": stamps, "rates": measure_speed(list(ready.values()), say=_say)}
        write(told, path)
    return dict(told)


def _gather(entries: Mapping[str, Entry], runs: Sequence[Task], speeds: Mapping[str, Any]) -> Study:
    rates = speeds.get("rates", {})
    found: dict[str, list[dict[str, Any]]] = {}
    for task in runs:
        if (result := task.result()) is not None:
            found.setdefault(task.entry.name, []).append(result)
    rows = {name: figures_of(found[name], rates.get(name)) for name in entries if name in found}
    return Study(entries, rows, _in_words(speeds["machine"]) if rates else "")


def _in_words(machine: Mapping[str, Any]) -> str:
    cpu, versions = machine["cpu"], machine["versions"]
    return f"one thread of {cpu['model']} with {cpu['cores']} cores ({cpu['capability']}), PyTorch {versions['torch']}"


def _write(study: Study, out: Path, *, in_docs: bool) -> list[str]:
    """The page into the folder of the runs, and into docs/ where every run is there; returns what does not fit."""
    write_picture(study, out / PICTURE.name)
    (out / PAGE.name).write_text(f"{BEGIN}{section(study, PICTURE.name)}{END}", encoding="utf-8")
    if in_docs:
        write_picture(study, PICTURE)
        made = section(study, f"assets/{PICTURE.name}")
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    problems = contradictions(study)
    for problem in problems:
        _say(problem)
    _say(f"written: {PAGE if in_docs else out / PAGE.name}")
    return problems


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
