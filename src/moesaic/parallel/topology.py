"""Who takes part, and who shares a host with whom.

W ranks · H hosts · L ranks on each of them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moesaic.errors import ConfigError
from moesaic.parallel.groups import group_among, group_of, kept


@dataclass
class Letter:
    """How long the messages between some ranks are, in words of 32 bits: all of them as the longest one so far."""

    words: int = 0

    def fit(self, words: int) -> bool:
        """Make room for so many; whether there was none."""
        grows = words > self.words
        self.words = max(words, self.words)
        return grows


@dataclass(frozen=True)
class Topology:
    """The ranks of a mesh as the exchanges see them.

    Attributes:
        rank, size: this one's place in the flattened mesh, and W.
        global_ranks: ``[W]``, their ranks in the default process group.
        hosts: ``[W]``, the number of each rank's host, counted from 0 in the order of the ranks.
        device: type of the tensors that collectives take: ``"cpu"`` or ``"cuda"``.
        group: a process group of all ranks, for the exchanges alone.
        machines: ``[W]``, the number of the machine whose cores each rank shares with others: several hosts may be
            containers on one. The hosts by default.
        inside, across: groups of the ranks on this host, and of those with this one's place on every host; None where
            hosts have different numbers of ranks, or there is only one host or one rank on each.
        letter: what they tell each other before each step; every topology of the same ranks has the same one.
    """

    rank: int
    size: int
    global_ranks: tuple[int, ...]
    hosts: tuple[int, ...]
    device: str
    group: Any = None
    inside: Any = None
    across: Any = None
    machines: tuple[int, ...] = ()
    letter: Letter = field(default_factory=Letter, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.machines:
            object.__setattr__(self, "machines", self.hosts)

    @property
    def num_hosts(self) -> int:
        return max(self.hosts) + 1

    @cached_property
    def ranks_by_host(self) -> list[list[int]]:
        """The ranks of each host, in order."""
        by_host: list[list[int]] = [[] for _ in range(self.num_hosts)]
        for rank, host in enumerate(self.hosts):
            by_host[host].append(rank)
        return by_host

    @cached_property
    def is_grid(self) -> bool:
        """Whether there are several hosts with the same number of ranks, more than one: what two dimensions need."""
        by_host = self.ranks_by_host
        if self.num_hosts == 1 or {len(ranks) for ranks in by_host} != {len(by_host[0])}:
            return False
        # Process groups put their ranks in rising order: that must be the order of the hosts.
        return len(by_host[0]) > 1 and all(list(ranks) == sorted(ranks) for ranks in zip(*by_host, strict=True))

    @staticmethod
    def of(mesh: DeviceMesh, timeout: float | None = None) -> Topology:
        """Of a mesh's ranks; a collective call, by all ranks of the mesh.

        A mesh of two dimensions is (host, rank on the host). Otherwise torchrun's ``GROUP_RANK`` says who shares a
        host, and without it the host's name.

        Args:
            timeout: seconds after which an exchange that does not end is an error; the default group's by default.

        Raises:
            ConfigError: for a mesh of more than two dimensions, whose ranks do not rise, or that this process is
                not in.
        """
        if mesh.ndim > 2:
            raise ConfigError(f"the mesh has {mesh.ndim} dimensions: it must have one (rank) or two (host, rank)")
        if mesh.get_coordinate() is None:
            raise ConfigError(f"rank {dist.get_rank()} is not in the mesh {mesh}")
        ranks = tuple(mesh.mesh.flatten().tolist())
        if list(ranks) != sorted(ranks):  # process groups, those of DTensors too, would sort them
            raise ConfigError(f"the mesh has the ranks {list(ranks)}: they must rise")
        rank = ranks.index(dist.get_rank())
        group = group_of(ranks, "exchange", timeout)
        hosts, machines = _gathered(len(ranks), group)
        if mesh.ndim == 2:
            hosts = tuple(index // mesh.shape[1] for index in range(len(ranks)))
        made = Topology(
            rank,
            len(ranks),
            ranks,
            hosts,
            mesh.device_type,
            group,
            machines=machines,
            letter=kept(("letter", ranks), Letter),
        )
        if not made.is_grid:
            return made
        by_host = [[ranks[each] for each in members] for members in made.ranks_by_host]
        inside = group_among(by_host, "exchange inside", timeout)
        across = group_among([list(each) for each in zip(*by_host, strict=True)], "exchange across", timeout)
        return replace(made, inside=inside, across=across)


def _gathered(size: int, group: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Each rank's host and machine, counted in the order of the ranks."""
    host = os.environ.get("GROUP_RANK") or socket.gethostname()
    told: list[Any] = [None] * size
    dist.all_gather_object(told, (host, _machine() or host), group=group)
    hosts, machines = zip(*told, strict=True)
    return _numbered(hosts), _numbered(machines)


def _numbered(names: Sequence[str]) -> tuple[int, ...]:
    first_seen = list(dict.fromkeys(names))
    return tuple(first_seen.index(name) for name in names)


def _machine() -> str | None:
    """What containers on one machine have in common, where the system tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return None
