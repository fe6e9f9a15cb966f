"""The machine's limits, measured between the contenders' runs: what a fraction reached is a fraction of."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from moesaic import hardware
from moesaic.bench.timing import timed
from moesaic.bench.workload import Bank
from moesaic.experts.native import library

_READ_BYTES = 128 << 20
_MATMUL_SIZE = 2048
_REGISTER_SECONDS = 0.01

# Key -> what it is, in words; a key's rate is in bytes/s for "read", in FLOP/s for the others.
LIMITS = {
    "read": "streaming read of the weights, all threads",
    "registers": "multiply-adds on registers only, all threads",
    "matmul": f"torch.mm of {_MATMUL_SIZE} x {_MATMUL_SIZE} matrices",
}


def limits(banks: list[Bank], dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """Functions that measure one limit of ``LIMITS`` once, on ``torch.get_num_threads()`` threads.

    Without the native kernels reading is the sum of an int64 tensor, and there is no rate of registers.
    """
    chunks, threads = cycle(list(_chunks(banks))), torch.get_num_threads()
    a_NN = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE).to(dtype)

    def matmul() -> float:
        return float(2 * _MATMUL_SIZE**3 / timed(lambda: a_NN @ a_NN))

    def read() -> float:
        chunk = next(chunks)
        if library.missing():
            return chunk.nbytes / timed(lambda: chunk.view(torch.int64).sum())
        return chunk.nbytes / timed(lambda: library.read(chunk.data_ptr(), chunk.nbytes, threads))

    found = {"read": read, "matmul": matmul}
    if library.missing() is None and dtype != torch.float16:
        found["registers"] = _registers(dtype, threads)
    return found


def _registers(dtype: torch.dtype, threads: int) -> Callable[[], float]:
    def measure(steps: int) -> tuple[float, float]:
        start = time.perf_counter()
        done = library.multiply_adds(dtype, steps, threads)
        return done, time.perf_counter() - start

    steps = 1024
    # The shortest of three: one that somebody else disturbed would make the steps too few.
    while min(measure(steps)[1] for _ in range(3)) < _REGISTER_SECONDS:
        steps *= 2

    def rate() -> float:
        done, seconds = measure(steps)
        return done / seconds

    return rate


def _chunks(banks: list[Bank]) -> Iterator[Tensor]:
    """The weights of all banks in pieces that a cache does not hold."""
    for bank in banks:
        for tensor in (bank.up, bank.down):
            flat = tensor.view(-1)
            # A multiple of 8 bytes, for the sum of an int64 tensor.
            step = min(flat.nbytes // 8 * 8, _READ_BYTES) // flat.element_size()
            for start in range(0, len(flat) - step + 1, step):
                yield flat[start : start + step]


class OtherProcesses:
    """What else the machine does while we measure, where Linux tells it: a build beside a benchmark spoils all of it.

    Args:
        ours: CPU seconds that child processes of the benchmark have used so far.
    """

    def __init__(self, ours: float) -> None:
        self.start = self._now(ours)

    def share(self, ours: float) -> float | None:
        """The share of all CPUs' time that was neither idle nor ours, since this was made."""
        before, now = self.start, self._now(ours)
        if before is None or now is None or now[1] <= before[1]:
            return None
        return max(0.0, (now[0] - before[0]) / (now[1] - before[1]))

    @staticmethod
    def _now(ours: float) -> tuple[float, float] | None:
        """Seconds that others were busy, and seconds in all."""
        try:
            told = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, idle, waiting, *interrupts = (int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in told)
        busy = user + nice + system + sum(interrupts)
        return busy - time.process_time() - ours, busy + idle + waiting


def machine() -> dict[str, object]:
    """What a reader needs to know beside a time: the CPU, threads, versions, and when it was."""
    return {
        "cpu": asdict(hardware.cpu()),
        "memory_bytes": hardware.devices()[0].memory,
        "versions": hardware.versions(),
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
