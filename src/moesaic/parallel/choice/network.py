"""The links between the ranks of a job as they measure, for ``moesaic doctor --network``."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moesaic.parallel.choice import links
from moesaic.parallel.choice.links import Links
from moesaic.parallel.topology import Topology


@dataclass(frozen=True)
class Network:
    """What was measured.

    Attributes:
        ranks, hosts, machines: numbers of them; machines are told apart by whose cores they share.
        links: None for a single rank: there is nobody to talk to.
        has_inside, has_between: whether any two ranks share a host, and any two do not.
    """

    rank: int
    ranks: int
    hosts: int
    machines: int
    links: Links | None
    has_inside: bool
    has_between: bool


def measure_job() -> Network:
    """Measure the links of the job that torchrun started, in a process group of its own where there is none yet; alone,
    nothing is measured."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 and not dist.is_initialized():
        return Network(0, 1, 1, 1, None, False, False)
    is_ours = not dist.is_initialized()
    on_gpu = torch.cuda.is_available()
    if is_ours:
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (dist.get_world_size(),))
        topology = Topology.of(mesh)
        measured = links.measure(topology) if topology.size > 1 else None
        machines = max(topology.machines) + 1
        has_inside = topology.size > topology.num_hosts
        return Network(
            topology.rank, topology.size, topology.num_hosts, machines, measured, has_inside, topology.num_hosts > 1
        )
    finally:
        if is_ours:
            dist.destroy_process_group()
