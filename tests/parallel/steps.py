"""Workloads with a chosen routing, topologies on paper and speeds for what decides about steps.

W ranks · E experts · T tokens · K slots per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moesaic.autotune.prior import Cost
from moesaic.parallel.choice.compute import Compute, Overhead
from moesaic.parallel.choice.links import Link, Links
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import Workload

D_MODEL, D_FF = 256, 512
GIGABIT = Links(Link(5e-5, 5e-10), Link(1e-4, 8e-9, 8e-9))
FAST = Links(Link(1e-5, 1e-11), Link(1e-5, 1e-11))
COMPUTE = Compute(Cost(1e-4, 2e-5, 1e-5), Cost(1e-4, 4e-5, 2e-5), copy=2e-10, overhead=Overhead(3e-4, 1e-4))


def topology(hosts: Sequence[int], machines: Sequence[int] = ()) -> Topology:
    """Rank 0's view of ranks on these hosts."""
    ranks = tuple(range(len(hosts)))
    return Topology(0, len(hosts), ranks, tuple(hosts), "cpu", machines=tuple(machines))


def workload(
    ranks: int,
    experts: int,
    tokens: int | Sequence[int] = 256,
    top_k: int = 2,
    *,
    skew: float = 0.0,
    grad: bool = True,
    seed: int = 0,
) -> Workload:
    """A random routing: the i-th expert is chosen in proportion to 1 / i ** skew."""
    layout = ExpertLayout(experts, D_FF, ranks)
    top_k = min(top_k, experts)
    random = np.random.default_rng(seed)
    chance_E = -skew * np.log(np.arange(1, experts + 1))
    tokens_W = np.array([tokens] * ranks if isinstance(tokens, int) else tokens, dtype=np.int64)
    counts_WE = np.zeros((ranks, experts), dtype=np.int64)
    rows_WB = np.zeros((ranks, layout.blocks), dtype=np.int64)
    for rank, number in enumerate(tokens_W.tolist()):
        ids_TK = np.argsort(-(chance_E + random.gumbel(size=(number, experts))), axis=1)[:, :top_k]
        counts_WE[rank] = np.bincount(ids_TK.ravel(), minlength=experts)
        wanted_TB = np.zeros((number, layout.blocks), dtype=bool)
        wanted_TB[np.arange(number)[:, None], layout.block_of_expert[ids_TK]] = True
        rows_WB[rank] = wanted_TB.sum(0)
    return Workload(
        layout=layout,
        counts_WE=counts_WE,
        rows_WB=rows_WB,
        tokens_W=tokens_W,
        d_model=D_MODEL,
        top_k=top_k,
        dtype=torch.float32,
        slice_elements=tuple(3 * D_MODEL * len(layout.hidden_of(rank)) for rank in range(layout.slices)),
        grad=grad,
    )
