"""The process groups of our own, and what belongs to one: made once, for all models over the same ranks.

A group costs threads and connections for as long as the process lives, so it is kept and used again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

Made = TypeVar("Made")


class _Kept:
    """What there is in this life of the default process group."""

    job: Any = None
    made: ClassVar[dict[Hashable, Any]] = {}


def kept(key: Hashable, make: Callable[[], Made]) -> Made:
    """What ``make`` gave when the default process group first met ``key``; all ranks that take part ask alike."""
    if _Kept.job is not dist.group.WORLD:
        _Kept.job = dist.group.WORLD
        _Kept.made.clear()
    if key not in _Kept.made:
        _Kept.made[key] = make()
    made: Made = _Kept.made[key]
    return made


def group_of(ranks: Sequence[int], purpose: str, timeout: float | None = None) -> Any:
    """A process group; a collective call by its ranks.

    Args:
        purpose: what others send on groups of their own at the same time (FSDP, checkpoints) cannot come between.
        timeout: seconds; the default group's by default.
    """
    seconds = timeout_of(dist.group.WORLD) if timeout is None else timeout
    # Only its own ranks need to come; but their names for it, which count groups, then differ where some of them have
    # been in groups without the others. Of all ranks all come.
    some = len(ranks) < dist.get_world_size()

    def make() -> Any:
        return dist.new_group(list(ranks), timeout=timedelta(seconds=seconds), use_local_synchronization=some)

    return kept(("group", purpose, tuple(ranks), seconds), make)


def group_among(parts: Sequence[Sequence[int]], purpose: str, timeout: float | None = None) -> Any:
    """This rank's group where a mesh falls into several; a collective call by all ranks of the mesh.

    Args:
        parts: the ranks of each; the same on all ranks.
        purpose, timeout: as in :func:`group_of`.
    """
    mine = next(part for part in parts if dist.get_rank() in part)
    if sum(map(len, parts)) < dist.get_world_size():
        return group_of(mine, purpose, timeout)
    seconds = timeout_of(dist.group.WORLD) if timeout is None else timeout

    def make() -> Any:
        # All ranks make all of them: then names agree whatever groups some ranks have been in.
        made = [dist.new_group(list(part), timeout=timedelta(seconds=seconds)) for part in parts]
        return made[parts.index(mine)]

    return kept(("groups", purpose, tuple(map(tuple, parts)), seconds), make)


def timeout_of(group: Any) -> float:
    """Seconds after which a group's collectives fail."""
    options = [group._get_backend(device).options for device in group._device_types]
    times = [each._timeout for each in options if each is not None]  # PyTorch's fake backend has none
    return float(min(times, default=default_pg_timeout).total_seconds())
