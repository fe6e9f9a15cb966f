"""What a link carries, as Gloo sees it: the rate of large transfers, and the time of small ones."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import distributed

_SMALL = 64


def measure_transfer(mebibytes: int, rounds: int) -> dict[str, float]:
    """Medians over ``rounds``, as rank 0 sees them.

    Returns:
        ``one_way``: bit/s from rank 0 to the last rank. ``all_to_all``: bit/s that each rank sends while every rank
        sends to every other one. ``small``: seconds for 64 bytes to the last rank and back.
    """
    rank, size = distributed.get_rank(), distributed.get_world_size()
    last = size - 1
    large, small = torch.zeros(mebibytes << 20, dtype=torch.uint8), torch.zeros(_SMALL, dtype=torch.uint8)
    received = torch.empty_like(large)
    pieces = _pieces(large.numel(), rank, size)

    def there_and_back(what: torch.Tensor, back: torch.Tensor) -> None:
        if rank == 0:
            distributed.send(what, last)
            distributed.recv(back, last)
        elif rank == last:
            distributed.recv(what, 0)
            distributed.send(back, 0)

    def all_to_all() -> None:
        distributed.all_to_all_single(received, large, pieces, pieces)

    seconds = {
        "one_way": _median(lambda: there_and_back(large, small), rounds),
        "all_to_all": _median(all_to_all, rounds),
        "small": _median(lambda: there_and_back(small, small), rounds),
    }
    sent = large.numel() - pieces[rank]
    return {
        "one_way": 8 * large.numel() / seconds["one_way"],
        "all_to_all": 8 * sent / seconds["all_to_all"],
        "small": seconds["small"],
    }


def _pieces(total: int, rank: int, size: int) -> list[int]:
    """Bytes for each rank, none for oneself; what is left over is for nobody but counted as one's own."""
    each = total // (size - 1)
    pieces = [each] * size
    pieces[rank] = total - each * (size - 1)
    return pieces


def _median(work: object, rounds: int) -> float:
    found = []
    for _ in range(rounds + 1):
        distributed.barrier()
        start = time.perf_counter()
        work()  # type: ignore[operator]
        found.append(time.perf_counter() - start)
    return float(np.median(found[1:]))
