"""Workers of torchrun die and hang at random moments: the run goes on from its last checkpoint, and ends as if not."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.train import tiny
from tests.train.test_ranks import ROOT, note, wait_for_step, wide, words_of

from moesaic.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")]

KILLS, STEPS = 20, 150
LIMIT = 600.0  # seconds for a run, its restarts included, on a busy machine


class Killer(threading.Thread):
    """Kills a worker, which one and when are drawn, in each of the first lives of a run.

    Attributes:
        newest, victims: of each life that it has ended, the step of the newest checkpoint at that moment, and whom it
            has killed, as errors name it.
    """

    def __init__(self, process: subprocess.Popen[str], out: Path, pids: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.newest: list[int] = []
        self.victims: list[str] = []
        self._process, self._out, self._pids, self._draw = process, out, pids, random.Random(seed)

    def run(self) -> None:
        while len(self.newest) < KILLS and self._process.poll() is None:
            life = self._wait_for_life(len(self.newest))
            wait_for_step(self._out, life + self._draw.randint(1, 4), self._process)
            time.sleep(self._draw.random() * self._step_seconds())
            rank = self._draw.randrange(2)
            victim = int((self._pids / str(rank)).read_text())
            self.victims.append(f"rank {rank} (host {socket.gethostname()}, pid {victim})")
            saved = (self._out / "checkpoints").glob("step-*[0-9]")
            self.newest.append(max((int(path.name.removeprefix("step-")) for path in saved), default=0))
            os.kill(victim, signal.SIGKILL)

    def _wait_for_life(self, number: int) -> int:
        """After which step that life has begun."""
        while self._process.poll() is None:
            lives = note(self._out)["lives"] if (self._out / "run.json").exists() else []
            if len(lives) > number:
                begun: int = lives[number]["from_step"]
                return begun
            time.sleep(0.01)
        return 0

    def _step_seconds(self) -> float:
        lines = read_metrics(self._out / "metrics.jsonl")
        speed = [line["tokens_per_second"] for line in lines if line["kind"] == "step"][-1]
        return float(8 * 16 / speed)


def quick_torchrun(out: Path, words: list[str], pids: Path, *options: str) -> subprocess.Popen[str]:
    """torchrun as in ``launcher.py``, with two workers."""
    line = [sys.executable, "-m", "tests.train.launcher", "--nproc-per-node", "2", *options]
    return subprocess.Popen(
        [*line, "train", *words, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PIDS": str(pids)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    """Launchers; those that are still there at the end go, and their workers with them."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.terminate()  # torchrun ends its workers then
        process.communicate()


def test_killed_twenty_times(
    corpus: list[str], out: Path, tmp_path: Path, running: list[subprocess.Popen[str]]
) -> None:
    # A fixed way over the ranks, as the automatic one may be another in each life, which rounds otherwise.
    way = ["parallel.strategy=tokens", "parallel.overlap=1", "parallel.exchange=direct"]
    words = words_of(wide(corpus, f"steps={STEPS}", "save_every=3", "threads=1", *way), tmp_path)
    straight = quick_torchrun(tmp_path / "straight", words, tmp_path)
    running.append(straight)
    assert straight.communicate(timeout=LIMIT)[1].count(f"step {STEPS}/{STEPS}") == 1
    process = quick_torchrun(out, words, tmp_path, "--max-restarts", str(KILLS + 5))
    running.append(process)
    killer = Killer(process, out, tmp_path, seed=0)
    killer.start()
    _, told = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, told
    assert len(killer.newest) == KILLS
    errors = [line for line in told.splitlines() if line.startswith("moesaic: error: ")]
    assert len(errors) == KILLS
    for victim, error in zip(killer.victims, errors, strict=True):
        assert f"{victim} has died; it was last seen " in error
    begun = [life["from_step"] for life in note(out)["lives"]]
    assert begun[0] == 0
    assert len(begun) == KILLS + 1
    # Nothing is lost beyond the newest checkpoint; the one that was being written may have been finished.
    assert [step for step, newest in zip(begun[1:], killer.newest, strict=True) if step < newest] == []
    assert sorted(tiny.losses(out)) == list(range(1, STEPS + 1))
    assert tiny.losses(out) == tiny.losses(tmp_path / "straight")  # to the bit
    assert note(out)["results"]["after"] == note(tmp_path / "straight")["results"]["after"]


def test_a_rank_that_stops_is_named_and_the_run_goes_on(
    corpus: list[str], out: Path, tmp_path: Path, running: list[subprocess.Popen[str]]
) -> None:
    recipe = wide(corpus, "steps=60", "threads=1", "parallel.timeout=10")
    process = quick_torchrun(out, words_of(recipe, tmp_path), tmp_path, "--max-restarts", "1")
    running.append(process)
    wait_for_step(out, 5, process)
    victim = int((tmp_path / "1").read_text())
    os.kill(victim, signal.SIGSTOP)
    assert process.stderr is not None
    (line,) = [next(line for line in process.stderr if "moesaic: error: " in line)]
    os.kill(victim, signal.SIGCONT)  # or torchrun waits for half a minute before it kills
    _, told = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, told
    assert "moesaic: error: rank 0 waited " in line
    assert f"pid {victim}) is stopped and has not answered for " in line
    assert len(note(out)["lives"]) == 2
    assert sorted(tiny.losses(out)) == list(range(1, 61))
