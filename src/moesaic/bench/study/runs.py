"""The runs: one trains a recipe with one seed and measures what came of it; a pool of processes does all of them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from moesaic.bench.report import write
from moesaic.bench.study.entries import Entry
from moesaic.bench.study.measure import measure_routing
from moesaic.errors import Interrupted, UsageError
from moesaic.hf.load import load_model
from moesaic.train.display import Display
from moesaic.train.folder import NOTE, RunFolder
from moesaic.train.job import Training
from moesaic.train.precision import choose_device, choose_precision
from moesaic.train.recipe import Recipe
from moesaic.train.recipe_file import recorded_recipe
from moesaic.train.run import train

RESULT = "study.json"
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Task:
    """A recipe to be trained with a seed; ``folder`` is the run's own."""

    entry: Entry
    seed: int
    folder: Path
    steps: int | None = None

    @property
    def name(self) -> str:
        return f"{self.entry.name}-{self.seed}"

    @property
    def recipe(self) -> Recipe:
        return self.entry.run(self.seed, self.steps)

    def result(self) -> dict[str, Any] | None:
        """What :func:`work` found; None where it has not been done, or by another recipe."""
        try:
            told: dict[str, Any] = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return told if told.get("recipe") == self.recipe.flat() else None


def tasks(entries: Sequence[Entry], seeds: Sequence[int], out: Path, steps: int | None = None) -> list[Task]:
    """All runs, one seed after the other, so that whoever stops early has every recipe."""
    return [Task(entry, seed, out / f"{entry.name}-{seed}", steps) for seed in seeds for entry in entries]


def work(task: Task, display: Display | None = None) -> dict[str, Any]:
    """Train, or go on with what was interrupted; measure; write ``study.json`` as the last thing.

    Raises:
        MoesaicError: as :func:`moesaic.train.run.train` does; Interrupted after a signal, with the step saved.
    """
    recipe = task.recipe
    resume = _can_go_on(task.folder, recipe)
    result = train(recipe, task.folder, resume=resume, overwrite=not resume, display=display)
    device = choose_device(recipe.train.device)
    model, _ = load_model(result.model, device=device)
    found = measure_routing(
        model,
        Training(recipe).read(None).validation,
        sequence_length=recipe.data.sequence_length,
        batch_size=recipe.train.batch_size // recipe.train.accumulation,
        precision=choose_precision(recipe.train.precision, device),
    )
    told = {
        "recipe": recipe.flat(),
        "seconds": result.seconds,
        "tokens": result.tokens,
        "parameters": result.parameters,
        "validation": {name: asdict(domain) for name, domain in result.after.items()},
        **found,
    }
    write(told, task.folder / RESULT)
    shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)  # three times the model, and there is no more use
    return told


def _can_go_on(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a run of this very recipe."""
    if not (folder / NOTE).is_file():
        return False
    try:
        return not recipe.differences(recorded_recipe(RunFolder(folder).read()["recipe"], str(folder)))
    except (UsageError, LookupError):
        return False


def run_all(
    todo: Sequence[Task], jobs: int, command: Callable[[Task], list[str]], say: Callable[[str], None]
) -> list[Task]:
    """Do the tasks in processes of their own, ``jobs`` at a time; returns those that failed.

    Args:
        command: starts one process, which does one task.
        say: told a line for every task that has ended.

    Raises:
        Interrupted: on SIGINT or SIGTERM; the processes have then been told to save and to end, and have ended.
    """
    waiting, failed, started = list(todo), list[Task](), time.monotonic()
    with _processes() as running:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                running[_start(task, command)] = task
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                task = running.pop(process)
                if process.returncode:
                    failed.append(task)
                done = len(todo) - len(waiting) - len(running)
                left = (time.monotonic() - started) / done * (len(todo) - done)
                say(f"{task.name}: {_told(task, process.returncode)} ({done} of {len(todo)}, {left / 60:.0f} min left)")
            if not ended:
                time.sleep(_LOOK_SECONDS)
    return failed


def _start(task: Task, command: Callable[[Task], list[str]]) -> subprocess.Popen[bytes]:
    task.folder.parent.mkdir(parents=True, exist_ok=True)
    with _log(task).open("wb") as log:
        # A session of its own: Ctrl-C comes to us alone, and each process gets one signal, not two.
        return subprocess.Popen(command(task), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _log(task: Task) -> Path:
    return task.folder.with_name(f"{task.name}.log")


def _told(task: Task, code: int) -> str:
    result = task.result()
    if code or result is None:
        lines = _log(task).read_text(errors="replace").strip().splitlines() or ["nothing was said"]
        return f"failed ({code}): {lines[-1]}; all of it in {_log(task)}"
    losses = ", ".join(f"{name} {domain['loss']:.3f}" for name, domain in result["validation"].items())
    return f"loss {losses}; {sum(result['experts'].values()) / len(result['experts']):.2f} experts a token"


@contextmanager
def _processes() -> Iterator[dict[subprocess.Popen[bytes], Task]]:
    """Those that run; whatever ends the block, none is left behind."""
    running: dict[subprocess.Popen[bytes], Task] = {}

    def kill(number: int, frame: FrameType | None) -> None:
        for process in running:
            process.kill()

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, kill)  # the second one is obeyed at once
        raise Interrupted("stopped: what was running is saved, and the same command goes on from there")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield running
    finally:
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
