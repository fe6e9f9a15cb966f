"""What a plan does with a workload: who sends what to whom, and who computes what. Every rank derives the same.

The executor takes its sizes from here, the cost model and the simulator their quantities.

W ranks · E experts · B blocks · S slices of an expert's hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moesaic.errors import ConfigError
from moesaic.parallel.layout import chunk
from moesaic.parallel.plan import Plan
from moesaic.parallel.workload import IntArray, Workload

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Parcel:
    """Part of one expert's slice on its way: elements ``[first, last)`` of the slice, all its fields in a row."""

    sender: int
    receiver: int
    expert: int
    slice_: int
    first: int
    last: int


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

    def slices_needed(self, rank: int) -> dict[int, range]:
        """Expert to slices that the rank's block needs for its own rows beside the one that it owns; members > 1."""
        layout, members = self.workload.layout, self.members
        if members == 1:
            return {}
        first = rank % layout.slices // members * members
        return {
            expert: range(first, first + members)
            for expert in layout.experts_of(rank)
            if self.own_slots_WE[rank, expert]
        }

    def needs(self) -> Iterator[tuple[int, int, list[int]]]:
        """(expert, slice, receivers) of everything that travels, the same order on every rank."""
        layout = self.workload.layout
        shared = [self.slices_needed(rank) for rank in range(layout.ranks)]
        used = self.fetches_WE.any(0)
        for needed in shared:
            used[list(needed)] = True
        for expert in np.flatnonzero(used).tolist():
            for slice_ in range(layout.slices):
                owner = layout.rank_at(int(layout.block_of_expert[expert]), slice_)
                receivers = [
                    rank
                    for rank in range(layout.ranks)
                    if rank != owner and (self.fetches_WE[rank, expert] or slice_ in shared[rank].get(expert, ()))
                ]
                if receivers:
                    yield expert, slice_, receivers

    @cached_property
    def gather_phases(self) -> list[list[Parcel]]:
        """The exchanges of weights, one after the other; gradients take them the other way round, last phase first."""
        layout, direct, relayed = self.workload.layout, [], []
        for expert, slice_, receivers in self.needs():
            owner = layout.rank_at(int(layout.block_of_expert[expert]), slice_)
            size = self.workload.slice_elements[slice_]
            if self.plan.gather == "direct" or len(receivers) == 1:
                direct += [Parcel(owner, receiver, expert, slice_, 0, size) for receiver in receivers]
                continue
            for index, relay in enumerate(receivers):
                piece = chunk(size, len(receivers), index)
                direct.append(Parcel(owner, relay, expert, slice_, piece.start, piece.stop))
                relayed += [
                    Parcel(relay, receiver, expert, slice_, piece.start, piece.stop)
                    for receiver in receivers
                    if receiver != relay
                ]
        return [phase for phase in (direct, relayed) if phase]

    @cached_property
    def weights_WW(self) -> list[IntArray]:
        """``[from, to]`` elements of weights, a matrix for each phase."""
        ranks = self.workload.layout.ranks
        matrices = []
        for phase in self.gather_phases:
            elements_WW = np.zeros((ranks, ranks), dtype=np.int64)
            for parcel in phase:
                elements_WW[parcel.sender, parcel.receiver] += parcel.last - parcel.first
            matrices.append(elements_WW)
        return matrices
