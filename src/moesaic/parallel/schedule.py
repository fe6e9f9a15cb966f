"""What a plan does with a workload: who sends what to whom, and who computes what. Every rank derives the same.

The executor asks for what one rank does, which grows with the number of ranks, not with its square; the matrices of all
ranks are for the cost model and for tests.

W ranks · E experts · B blocks · S slices of an expert's hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moesaic.errors import ConfigError
from moesaic.parallel import parcels
from moesaic.parallel.parcels import Parcels, Parts
from moesaic.parallel.plan import Plan
from moesaic.parallel.workload import IntArray, Workload

BoolArray = npt.NDArray[np.bool_]
_ALL = slice(None)
# Ranks or experts that are looked at together in a search for one of a kind.
_TOGETHER = 16


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
    def _fetched_E(self) -> BoolArray:
        fetched_E = np.zeros(self.workload.layout.num_experts, dtype=bool)
        fetched_E[list(self.plan.fetched)] = True
        return fetched_E

    # What one rank does

    def fetches(self, ranks: IntArray | slice, experts: IntArray | slice) -> BoolArray:
        """``[n, m]``: whether ranks compute their own slots for experts themselves, with fetched weights; a slice is
        all of them."""
        layout, counts_WE = self.workload.layout, self.workload.counts_WE
        fetches: BoolArray = _part(counts_WE, ranks, experts) >= max(1, self.plan.least)
        if not self._fetched_E[experts].all():
            fetches &= self._fetched_E[experts]
        if layout.slices == 1:  # a rank has its own already
            owner_m = layout.block_of_expert[experts]
            if isinstance(ranks, slice):
                fetches[owner_m, np.arange(len(owner_m))] = False
            else:
                fetches &= ranks[:, None] != owner_m
        return fetches

    def block_rows(self, ranks: IntArray | slice, blocks: IntArray | slice) -> IntArray:
        """``[n, m]``: rows that ranks send to each replica of blocks.

        A token's row travels once for all its experts of the block. Where a rank fetches some of a block's experts, the
        others cannot know for how many tokens those were all that they wanted there: then it is a row for each slot.
        """
        layout, rows = self.workload.layout, _part(self.workload.rows_WB, ranks, blocks)
        if not self.plan.fetched:
            return rows
        rows = rows.copy()
        first_n = layout.first_of_block[blocks]
        sizes_n = np.append(layout.first_of_block, layout.num_experts)[np.arange(layout.blocks)[blocks] + 1] - first_n
        there_n = sizes_n > 0
        starts_n = np.cumsum(sizes_n) - sizes_n
        experts = (
            _ALL if isinstance(blocks, slice) else np.repeat(first_n - starts_n, sizes_n) + np.arange(sizes_n.sum())
        )
        fetches = self.fetches(ranks, experts)
        slots = np.where(fetches, 0, _part(self.workload.counts_WE, ranks, experts))
        # Never more rows than were wanted of the block: those of fetched experts were counted too.
        fewer = np.minimum(np.add.reduceat(slots, starts_n[there_n], axis=1), rows[:, there_n])
        mixed = np.logical_or.reduceat(fetches, starts_n[there_n], axis=1)
        rows[:, there_n] = np.where(mixed, fewer, rows[:, there_n])
        return rows

    def rows(self, senders: IntArray, receivers: IntArray) -> IntArray:
        """``[n, m]``: token rows from ranks to ranks; those for a rank itself too."""
        layout, members = self.workload.layout, self.members
        if layout.slices == 1:
            return self.block_rows(senders, receivers)
        blocks, which = np.unique(receivers // layout.slices, return_inverse=True)
        chosen = receivers % members == senders[:, None] % members
        return np.where(chosen, self.block_rows(senders, blocks)[:, which], 0)

    @cached_property
    def moves_rows(self) -> bool:
        """Whether any rank has rows for another one: if not, no rank takes part in exchanges of rows."""
        layout = self.workload.layout
        if len(set(self.plan.fetched)) == layout.num_experts and self.plan.least <= 1:
            # Every rank computes all of its slots itself.
            return False
        first, together = 0, _TOGETHER
        while first < layout.ranks:  # it nearly always ends with the first ones
            ranks = np.arange(first, min(first + together, layout.ranks))
            rows_nB = self.block_rows(ranks, _ALL)
            if self.replicas == 1:  # what is for the own block is for oneself
                rows_nB = rows_nB.copy()
                rows_nB[np.arange(len(ranks)), ranks // layout.slices] = 0
            if rows_nB.any():
                return True
            first, together = first + together, 2 * together
        return False

    @property
    def most_relays(self) -> int:
        """Relays that a part may have, see :func:`moesaic.parallel.parcels.relays`; 1 where nothing is relayed."""
        if self.plan.gather != "relay":
            return 1
        layout = self.workload.layout
        parts = len(self.plan.fetched) * layout.slices  # that a rank may need
        if self.members > 1:
            parts += self.members * -(-layout.num_experts // layout.blocks)
        return max(1, parcels.MOST_PIECES // max(1, parts))

    def receivers(self, experts: IntArray, slices: IntArray) -> BoolArray:
        """``[W, N]``: which ranks need slices of experts that they do not own."""
        layout, members = self.workload.layout, self.members
        ranks = np.arange(layout.ranks)
        needs_WN = self.fetches(_ALL, experts)
        if members > 1:
            # Of a rank's own experts with rows, the slices between its replica and the next.
            sent_WN = np.where(needs_WN, 0, self.workload.counts_WE[:, experts])
            sums_MN = sent_WN.reshape(-1, members, len(experts)).sum(0)
            is_near_WN = ranks[:, None] // layout.slices == layout.block_of_expert[experts]
            is_near_WN &= (ranks % layout.slices // members)[:, None] == slices // members
            needs_WN |= is_near_WN & (sums_MN[ranks % members] > 0)
        needs_WN[layout.block_of_expert[experts] * layout.slices + slices, np.arange(len(experts))] = False
        return needs_WN

    def gather(self, rank: int) -> list[Parcels]:
        """What a rank sends and receives in the exchanges of weights, of which all ranks have equally many, one after
        the other; gradients take them the other way round, last phase first."""
        phases = self._gather_phases
        if not phases:
            return []
        if phases == 1:
            return [Parcels(self._own_parcels(rank))]
        parts = self.parts(*(self._needed_ES(rank) | self._owned_ES(rank)).nonzero())
        receives_WN = self.receivers(parts.expert_N, parts.slice_N)
        return [Parcels(rows) for rows in parcels.relayed(parts, receives_WN, self.most_relays, rank)]

    def _own_parcels(self, rank: int) -> IntArray:
        """Where all parts go directly: of those that a rank only gets it need not know who else does."""
        sent = self.parts(*self._owned_ES(rank).nonzero())
        got = self.parts(*self._needed_ES(rank).nonzero())
        is_rank_WN = np.broadcast_to(
            (np.arange(self.workload.layout.ranks) == rank)[:, None], (self.workload.layout.ranks, len(got.expert_N))
        )
        rows = [parcels.direct(sent, self.receivers(sent.expert_N, sent.slice_N)), parcels.direct(got, is_rank_WN)]
        return np.concatenate(rows)

    def _owned_ES(self, rank: int) -> BoolArray:
        """``[E, S]``: the rank's own parts, of those that may travel."""
        layout = self.workload.layout
        block, slice_ = layout.place(rank)
        owned_ES = np.zeros((layout.num_experts, layout.slices), dtype=bool)
        may_travel = layout.experts_of_block(block) if self.members > 1 else self.plan.fetched
        own = [expert for expert in may_travel if layout.block_of_expert[expert] == block]
        owned_ES[own, slice_] = True
        return owned_ES

    def _needed_ES(self, rank: int) -> BoolArray:
        """``[E, S]``: the parts that a rank gets from others."""
        layout, members = self.workload.layout, self.members
        block, slice_ = layout.place(rank)
        needed_ES = np.repeat(self.fetches(np.array([rank]), _ALL)[0, :, None], layout.slices, axis=1)
        if members > 1:
            own, first = np.array(layout.experts_of_block(block)), slice_ // members * members
            sharing = np.arange(rank % members, layout.ranks, members)  # whose tokens come to this rank
            sent_nN = np.where(self.fetches(sharing, own), 0, _part(self.workload.counts_WE, sharing, own))
            needed_ES[own, first : first + members] |= (sent_nN.sum(0) > 0)[:, None]
        needed_ES[layout.block_of_expert == block, slice_] = False
        return needed_ES

    def parts(self, expert_N: IntArray, slice_N: IntArray) -> Parts:
        """What is to be known of slices of experts, to send them."""
        layout = self.workload.layout
        turn_E = np.zeros(layout.num_experts, dtype=np.int64)
        turn_E[list(self.plan.fetched)] = np.arange(len(self.plan.fetched))
        elements_S = np.array(self.workload.slice_elements)
        return Parts(
            expert_N,
            slice_N,
            layout.block_of_expert[expert_N] * layout.slices + slice_N,
            elements_S[slice_N],
            (turn_E[expert_N] * layout.slices + slice_N) * self.most_relays,
        )

    @cached_property
    def _gather_phases(self) -> int:
        """How many exchanges bring the weights: found with the first part that has two receivers."""
        layout = self.workload.layout
        experts = np.arange(layout.num_experts) if self.members > 1 else np.array(self.plan.fetched, dtype=np.int64)
        phases, wanted = 0, 1 + (self.most_relays > 1)
        first, together = 0, _TOGETHER
        while first < len(experts) and phases < wanted:
            some = np.repeat(experts[first : first + together], layout.slices)
            receivers_N = self.receivers(some, np.tile(np.arange(layout.slices), len(some) // layout.slices)).sum(0)
            phases = max(phases, min(wanted, int(receivers_N.max())))
            first, together = first + together, 2 * together
        return phases

    # What all ranks do

    @cached_property
    def fetches_WE(self) -> BoolArray:
        """``[W, E]``: see :meth:`fetches`."""
        return self.fetches(_ALL, _ALL)

    @cached_property
    def rows_WW(self) -> IntArray:
        """``[from, to]``: token rows; the diagonal are a rank's rows for itself."""
        ranks = np.arange(self.workload.layout.ranks)
        return self.rows(ranks, ranks)

    @cached_property
    def own_slots_WE(self) -> IntArray:
        """``[W, E]``: slots that a rank computes on its block's experts, at 1/replicas of an expert's hidden width."""
        layout, members = self.workload.layout, self.members
        ranks = np.arange(layout.ranks)
        sent_WE = np.where(self.fetches_WE, 0, self.workload.counts_WE)
        sums = np.stack([sent_WE[ranks % members == member].sum(0) for member in range(members)])
        slots_WE = sums[ranks % layout.slices % members]
        slots_WE[layout.block_of_expert[None, :] != (ranks // layout.slices)[:, None]] = 0
        return slots_WE

    @cached_property
    def fetched_slots_WE(self) -> IntArray:
        """``[W, E]``: slots that a rank computes with fetched weights."""
        return np.where(self.fetches_WE, self.workload.counts_WE, 0)


def _part(matrix: IntArray, ranks: IntArray | slice, columns: IntArray | slice) -> IntArray:
    """``[n, m]``: some rows and columns; a view of the matrix, perhaps."""
    if isinstance(ranks, slice) or isinstance(columns, slice):
        return matrix[ranks][:, columns]
    return matrix[ranks[:, None], columns]
