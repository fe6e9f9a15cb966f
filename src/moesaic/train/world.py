"""The processes that train together: one, or as many ranks as ``torchrun`` has started.

With one process there is no process group, and everything here is what it would be without this file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moesaic.errors import ConfigError, MoesaicError, TrainingError
from moesaic.parallel.liveness.meeting import fresh_store
from moesaic.parallel.liveness.watch import Watch

T = TypeVar("T")

# The stores of the groups that :func:`joined` has made in this process.
joined_by: list[Any] = []

# How long ranks wait where one of them prepares something for all, such as the tokens of a large text. One that dies
# is noticed at once even so.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """All ranks of a run, seen from one of them; without arguments the only process of a run.

    Attributes:
        hosts: on how many machines they run.
        patient, writing: groups on the CPU, for what may take long, and for the thread that writes checkpoints; None
            for one process.
        watch: over the ranks; None for one process.
    """

    rank: int = 0
    size: int = 1
    hosts: int = 1
    patient: dist.ProcessGroup | None = None
    writing: dist.ProcessGroup | None = None
    watch: Watch | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Which of ``rows`` are this rank's: contiguous, in the order of the ranks, as even as can be."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def guard(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context around what the ranks do together, such as ``"step 12"``: where one of them is gone, it raises
        :class:`~moesaic.errors.ParallelError`, which names the rank.
        """
        return contextlib.nullcontext() if self.watch is None else self.watch.guard(name)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the ranks, in float64; all of them call it."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with self.guard("adding up over the ranks"):
            dist.all_reduce(total)
        told: list[float] = total.tolist()
        return told

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, which alone does it; all ranks call it, and what it raises is raised on all.

        The result must be something that can be pickled.
        """
        if self.size == 1:
            return work()
        failure: Exception | None = None
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = work()
            except Exception as error:
                failure, told[1] = error, portable(error)
        with self.guard("waiting for rank 0"):
            dist.broadcast_object_list(told, src=0, group=self.patient)
        if told[1] is not None:
            raise failure or told[1]
        result: T = told[0]
        return result

    def in_turn(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on each rank for itself, done by the others when rank 0 has done it."""
        mine: list[T] = []
        self.first(lambda: mine.append(work()))
        return mine[0] if self.is_first else work()


def launched() -> int:
    """How many processes a launcher such as ``torchrun`` has started for this run; 1 without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch() -> str | None:
    """What tells one start of ``torchrun`` from another one, the same after it has restarted its workers; None without
    it. On several machines that takes a ``--rdzv-id``.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None or run_id != "none":
        return run_id
    agent = os.getppid()
    try:  # numbers of processes are used again, above all in containers
        began = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        began = "?"
    return f"{socket.gethostname()}:{agent}:{began}"


def own_device(device: torch.device) -> torch.device:
    """Of several GPUs that of this rank: ``LOCAL_RANK``'s; raises :class:`ConfigError` where there are too few."""
    if device.type != "cuda" or launched() == 1:
        return device
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise ConfigError(
            f"there are more processes than GPUs on this machine ({count}): start at most that many, "
            "or train on the CPU by train.device=cpu"
        )
    return torch.device("cuda", index)


@contextlib.contextmanager
def joined(device: torch.device, seconds: float) -> Iterator[World]:
    """The ranks of this run, joined in a process group for as long as the context lasts; a group that is there already
    is used, and left as it is.

    Args:
        device: of this rank, see :func:`own_device`.
        seconds: that a rank may be waited for.
    """
    if launched() == 1:
        yield World()
        return
    ours = not dist.is_initialized()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ours:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=seconds)
        store, rank, size = fresh_store(seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        joined_by.append(store)
    try:
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        writing = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, socket.gethostname(), group=patient)
        with Watch.of(timeout=seconds) as watch:
            yield World(dist.get_rank(), dist.get_world_size(), len(set(names)), patient, writing, watch)
    finally:
        if ours:
            dist.destroy_process_group()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def portable(error: BaseException) -> Exception:
    """An error as it can be sent to another rank: of the same kind and message where that is one of ours."""
    if isinstance(error, MoesaicError | OSError):
        return type(error)(*error.args)
    return TrainingError(f"{type(error).__name__}: {error}")
