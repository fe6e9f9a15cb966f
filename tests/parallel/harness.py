"""Pools of processes that make up a Gloo group and run one small case after another.

Importing torch is what starting a process costs, so one server imports it once and forks the ranks, and the ranks stay.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 300.0  # seconds for one case; on a busy machine the first one imports torch for longer than a minute
GRACE = 2.0  # seconds for the others after a rank has failed: they may be waiting for it

# Forked from a server that has one thread and has used none of torch, which is safe. On macOS it is not: Apple's
# libraries do not bear it.
START = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PRELOAD = ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "moesaic", "moesaic.hf.modeling", "pytest"]


class RankFailure(AssertionError):
    """What went wrong in which rank: its traceback, or that it was late."""


class Pool:
    """``size`` processes, each a rank of one Gloo group; started with the first case, and again after a failure."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        self._folder = ""

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Call ``function(*arguments)`` on every rank, and return what each returned.

        Args:
            function: of a module's own, by whose name the ranks find it. Inside, ``torch.distributed`` has its group.

        Raises:
            RankFailure: where a rank raised an exception, died, or took longer than ``timeout`` seconds.
        """
        if not self._ranks:
            self._start()
        case = pickle.dumps((function, arguments))
        for _, connection in self._ranks:
            connection.send_bytes(case)
        answers = self._collect(time.monotonic() + timeout)
        failed = {rank: what for rank, (good, what) in answers.items() if not good}
        if failed or len(answers) < self.size:
            self.stop()
            late = [rank for rank in range(self.size) if rank not in answers]
            told = [f"rank {rank} of {self.size}:\n{what}" for rank, what in sorted(failed.items())]
            if late:
                told.append(f"no answer from ranks {late} of {self.size}")
            raise RankFailure("\n".join(told))
        return [answers[rank][1] for rank in range(self.size)]

    def stop(self) -> None:
        """Kill the ranks; the next case starts new ones."""
        for process, connection in self._ranks:
            process.kill()
            connection.close()
        for process, _ in self._ranks:
            process.join()
        self._ranks = []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        START.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.mkdtemp()
        for rank in range(self.size):
            ours, theirs = START.Pipe()
            process = START.Process(target=_serve, args=(rank, self.size, self._folder, theirs), daemon=True)
            self._ranks.append((process, ours))
            process.start()
            theirs.close()

    def _collect(self, deadline: float) -> dict[int, tuple[bool, Any]]:
        """(whether it went well, result or traceback) of every rank that answers in time."""
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    process = self._ranks[rank][0]
                    process.join(GRACE)
                    answers[rank] = (False, f"the process ended (exit code {process.exitcode})")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers


def _serve(rank: int, size: int, folder: str, connection: Connection) -> None:
    """What a rank does all its life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    torch.set_num_threads(1)
    cases: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, cases), daemon=True).start()
    store = dist.FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    while True:
        try:
            function, arguments = pickle.loads(cases.get())
            answer = pickle.dumps((True, function(*arguments)))
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


def _listen(connection: Connection, cases: queue.SimpleQueue[bytes]) -> None:
    """A thread of its own, so that a rank goes when the parent does, even from the midst of a collective."""
    try:
        while True:
            cases.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)


_POOLS: dict[int, Pool] = {}


def pool(size: int) -> Pool:
    """The pool of that size; it lives until :func:`stop_pools`."""
    return _POOLS.setdefault(size, Pool(size))


@contextmanager
def pools_stopped_at_end() -> Iterator[None]:
    try:
        yield
    finally:
        for each in _POOLS.values():
            each.stop()
        _POOLS.clear()
