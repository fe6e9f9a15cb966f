"""What the processor can do at best, as the native kernels measure it: what their speed is a fraction of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from moesaic.experts.native import library
from moesaic.hardware import typical_time


@dataclass(frozen=True)
class Native:
    """The compiled library, and its measured limits.

    Attributes:
        isa: the instruction-set variant in use.
        isas: the variants that this CPU can run, the best first.
        openmp: whether it uses threads.
        multiply_add_flop_per_second: for each dtype, see :func:`multiply_add_rate`.
    """

    isa: str
    isas: list[str]
    openmp: bool
    multiply_add_flop_per_second: dict[str, float]


def measure() -> Native:
    """Describe and measure the library that is there; takes about a second, and wants the machine otherwise idle."""
    rates = {str(dtype).removeprefix("torch."): multiply_add_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Native(library.isa(), library.isas(), library.has_openmp(), rates)


def read_bandwidth(num_bytes: int = 1 << 29, seconds: float = 0.5) -> float:
    """Bytes per second of reading memory front to back on all of PyTorch's threads.

    Args:
        num_bytes: must exceed the caches for the memory to be what is measured.
        seconds: how long to repeat.
    """
    memory, threads = torch.ones(num_bytes, dtype=torch.uint8), torch.get_num_threads()
    return num_bytes / typical_time(lambda: library.read(memory.data_ptr(), num_bytes, threads), "cpu", seconds)


def multiply_add_rate(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Floating-point operations per second on values in registers, on all of PyTorch's threads.

    The best instruction of the variant in use for ``dtype``, float32 or bfloat16, in as many independent chains as hide
    its latency; a multiply and an add count as two. No matrix product can be faster.
    """
    threads, steps = torch.get_num_threads(), 1 << 12
    # Long enough for starting the threads not to count, short enough to be repeated often.
    while typical_time(partial(library.multiply_adds, dtype, steps, threads), "cpu", 0) < seconds / 50:
        steps *= 2
    work = partial(library.multiply_adds, dtype, steps, threads)
    return work() / typical_time(work, "cpu", seconds)
