"""The pools themselves: what a broken rank does to a test, and what is left of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.parallel import harness
from torch import Tensor

SIZE = 3
BROKEN_PARENT = """
from tests.parallel import harness, test_harness
if __name__ == "__main__":
    print(*harness.pool(3).run(test_harness.who), flush=True)
    harness.pool(3).run(test_harness.hangs, timeout=600)
"""


def who() -> int:
    return os.getpid()


def total(mine: int) -> Tensor:
    sum_ = torch.tensor(mine * (1 + dist.get_rank()))
    dist.all_reduce(sum_)
    return sum_


def raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("out of tokens")
    dist.barrier()


def dies() -> None:
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hangs() -> None:
    if dist.get_rank() > 0:
        dist.barrier()


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"


def test_every_rank_answers() -> None:
    pool = harness.pool(SIZE)
    before = pool.run(who)
    assert [answer.item() for answer in pool.run(total, 5)] == [30] * SIZE
    assert pool.run(who) == before


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"rank 1 of 3:\nTraceback(.|\n)*ValueError: out of tokens"),
        (dies, r"rank 2 of 3:\nthe process ended \(exit code -9\)"),
        (hangs, r"no answer from ranks \[(0, )?1, 2\] of 3"),  # on a busy machine none may answer in time
    ],
)
def test_a_failure_names_its_rank_and_leaves_nothing(function: Callable[[], None], message: str) -> None:
    pool = harness.pool(SIZE)
    before = pool.run(who)
    with pytest.raises(harness.RankFailure, match=message):
        pool.run(function, timeout=1 if function is hangs else harness.TIMEOUT)
    assert not any(alive(process) for process in before)
    assert [answer.item() for answer in pool.run(total, 1)] == [6] * SIZE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ranks_go_with_their_parent() -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", BROKEN_PARENT], cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        ranks = [int(process) for process in re.findall(r"\d+", parent.stdout.readline())]
        parent.kill()
    assert len(ranks) == SIZE
    deadline = time.monotonic() + 120
    while any(alive(process) for process in ranks):
        assert time.monotonic() < deadline, "ranks outlive a parent that was killed"
        os.sched_yield()
