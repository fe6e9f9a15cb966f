"""What a plan does with a workload: who sends what to whom, and who computes what. Every rank derives the same.

The executor takes its sizes from here, the cost model and the simulator their quantities.

W ranks · E experts · B blocks · S slices of an expert's hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moesaic.errors import ConfigError
from moesaic.parallel.parcels import Parcels, direct, relay
from moesaic.parallel.plan import Plan
from moesaic.parallel.workload import IntArray, Workload

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Schedule:
    """The consequences of a plan.

    Raises:
        ConfigError: where ``plan.replicas`` does not divide the number of slices.
    """

    plan: Plan
    workload: Workload

    def __post_init__(self) -> None:
        if self.plan.replicas and self.workload.layout.slices % self.plan.replicas:
            slices = self.workload.layout.slices
            raise ConfigError(f"replicas is {self.plan.replicas}: it must divide {slices}, the slices of an expert")

    @property
    def replicas(self) -> int:
        return self.plan.replicas or self.workload.layout.slices

    @property
    def members(self) -> int:
        """Ranks that share a replica of a block: each has all of the replica's slices, and a share of the tokens."""
        return self.workload.layout.slices // self.replicas

    @cached_property
    def fetches_WE(self) -> BoolArray:
        """``[W, E]``: whether a rank computes its own slots for an expert itself, with fetched weights."""
        layout, counts_WE = self.workload.layout, self.workload.counts_WE
        fetched_E = np.zeros(layout.num_experts, dtype=bool)
        fetched_E[list(self.plan.fetched)] = True
        fetches_WE: BoolArray = np.logical_and(fetched_E, counts_WE >= max(1, self.plan.least))
        if layout.slices == 1:
            for rank in range(layout.ranks):  # a rank has its own already
                fetches_WE[rank, layout.experts_of(rank)] = False
        return fetches_WE

    @cached_property
    def sent_WE(self) -> IntArray:
        """``[W, E]``: slots of a rank whose tokens go to the expert's owners (to itself, perhaps)."""
        return np.where(self.fetches_WE, 0, self.workload.counts_WE)

    @cached_property
    def block_rows_WB(self) -> IntArray:
        """``[W, B]``: rows that a rank sends to each replica of a block.

        A token's row travels once for all its experts of the block. Where a rank fetches some of a block's experts, the
        others cannot know for how many tokens those were all that they wanted there: then it is a row for each slot.
        """
        layout = self.workload.layout
        firsts = [layout.experts_of_block(block).start for block in range(layout.blocks)]
        whole = [first < layout.num_experts for first in firsts]
        slots_WB = np.zeros((layout.ranks, layout.blocks), dtype=np.int64)
        mixed_WB = np.zeros((layout.ranks, layout.blocks), dtype=bool)
        starts = [first for first, there in zip(firsts, whole, strict=True) if there]
        slots_WB[:, whole] = np.add.reduceat(self.sent_WE, starts, axis=1)
        mixed_WB[:, whole] = np.logical_or.reduceat(self.fetches_WE, starts, axis=1)
        # Never more rows than were wanted of the block: those of fetched experts were counted too.
        return np.where(mixed_WB, np.minimum(slots_WB, self.workload.rows_WB), self.workload.rows_WB)

    @cached_property
    def rows_WW(self) -> IntArray:
        """``[from, to]``: token rows; the diagonal are a rank's rows for itself."""
        layout, members = self.workload.layout, self.members
        ranks = np.arange(layout.ranks)
        block_of, slice_of = ranks // layout.slices, ranks % layout.slices
        chosen_WW = slice_of[None, :] % members == ranks[:, None] % members
        return np.where(chosen_WW, self.block_rows_WB[:, block_of], 0)

    @cached_property
    def own_slots_WE(self) -> IntArray:
        """``[W, E]``: slots that a rank computes on its block's experts, at 1/replicas of an expert's hidden width."""
        layout, members = self.workload.layout, self.members
        ranks = np.arange(layout.ranks)
        sums = np.stack([self.sent_WE[ranks % members == member].sum(0) for member in range(members)])
        slots_WE = sums[ranks % layout.slices % members]
        slots_WE[layout.block_of_expert[None, :] != (ranks // layout.slices)[:, None]] = 0
        return slots_WE

    @cached_property
    def fetched_slots_WE(self) -> IntArray:
        """``[W, E]``: slots that a rank computes with fetched weights."""
        return np.where(self.fetches_WE, self.workload.counts_WE, 0)

    @cached_property
    def gather_phases(self) -> list[Parcels]:
        """The exchanges of weights, one after the other; gradients take them the other way round, last phase first."""
        layout = self.workload.layout
        if not self.plan.fetched and self.members == 1:
            return []
        # Of an expert that a rank fetches, all slices; of its own with rows, those between its replica and the next.
        needs_ESW = np.repeat(self.fetches_WE.T[:, None, :], layout.slices, axis=1)
        owner_ES = layout.block_of_expert[:, None] * layout.slices + np.arange(layout.slices)
        if self.members > 1:
            replica_S = np.arange(layout.slices) // self.members
            replica_W = np.arange(layout.ranks) % layout.slices // self.members
            needs_ESW |= (replica_S[:, None] == replica_W)[None] & (self.own_slots_WE.T > 0)[:, None, :]
        np.put_along_axis(needs_ESW, owner_ES[:, :, None], False, axis=2)
        way = direct if self.plan.gather == "direct" else relay
        return way(needs_ESW, owner_ES, np.array(self.workload.slice_elements))
