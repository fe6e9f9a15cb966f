"""Which of a rank's tokens go where: the rows of every exchange of a step, and back to their tokens.

T tokens · K slots per token · N rows that are sent · R rows that arrive · B blocks of experts · W ranks.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.parallel.exchange import part, spans
from moesaic.parallel.schedule import Schedule
from moesaic.parallel.workload import IntArray

NOBODY = (1 << 31) - 1
"""The id of a slot that is not for the rank that the row goes to: that of a null slot, whatever number of experts."""


def blocks_wanted(ids_TK: Tensor, block_of_id: Tensor) -> Tensor:
    """``[T, K]``: the blocks that a token has slots for, each of them once and in rising order; B in other places.

    Args:
        block_of_id: ``[E + 1]``, the block of each expert; B where it is none, and for null slots.
    """
    blocks_TK = block_of_id[ids_TK].sort(1).values
    again_TK = functional.pad(blocks_TK[:, 1:] == blocks_TK[:, :-1], (1, 0))
    return torch.where(again_TK, block_of_id[-1], blocks_TK)


class Selection:
    """The rows that one rank sends in a step, in the chunks of its plan.

    Args:
        ids_TK: ``[T, K]`` int64, null slots being E.
    """

    def __init__(self, schedule: Schedule, rank: int, ids_TK: Tensor) -> None:
        self.chunks, self.ids_TK = schedule.plan.overlap, ids_TK
        layout = schedule.workload.layout
        self._nowhere, self._replicas = layout.blocks, schedule.replicas
        fetched_E = torch.from_numpy(schedule.fetches(np.array([rank]), slice(None))[0])
        block_of_id = torch.from_numpy(layout.block_of_expert).masked_fill(fetched_E, layout.blocks)
        device = ids_TK.device
        self._block_of_id = functional.pad(block_of_id, (0, 1), value=layout.blocks).to(device)
        self._first_of_block = torch.from_numpy(layout.first_of_block).to(device)
        self._tokens, self._blocks = self._rows(schedule.block_rows(np.array([rank]), slice(None))[0])

    def tokens(self, chunk: int) -> Tensor:
        """``[N]``: the token of each row that is sent in a chunk."""
        return self._tokens[chunk]

    def ids(self, chunk: int) -> Tensor:
        """``[N, K]``: for each row the slots' experts as their owner counts them, from 0; NOBODY for other slots."""
        ids_NK, blocks_N1 = self.ids_TK[self._tokens[chunk]], self._blocks[chunk].unsqueeze(1)
        here = self._block_of_id[ids_NK] == blocks_N1
        return torch.where(here, ids_NK - self._first_of_block[blocks_N1], NOBODY)

    def collect(self, rows: list[Tensor]) -> Tensor:
        """``[T, ...]``: each token's rows of all chunks, summed; the order of additions is always the same."""
        order, offsets_T = self._by_token
        rows_ND = rows[0] if len(rows) == 1 else torch.cat(rows)
        if not rows_ND.is_cuda and not rows_ND.numel():
            return rows_ND.new_zeros(self.ids_TK.shape[0], rows_ND.shape[1])
        return functional.embedding_bag(order, rows_ND, offsets_T, mode="sum")

    @cached_property
    def _by_token(self) -> tuple[Tensor, Tensor]:
        tokens_N = torch.cat(self._tokens)
        counts_T = torch.bincount(tokens_N, minlength=self.ids_TK.shape[0])
        return torch.argsort(tokens_N, stable=True), counts_T.cumsum(0) - counts_T

    def _rows(self, planned_B: IntArray) -> tuple[list[Tensor], list[Tensor]]:
        """Token and block of every row of every chunk; -1 for a row that fills up.

        Args:
            planned_B: how many rows go to each replica of a block.
        """
        blocks_TK = blocks_wanted(self.ids_TK, self._block_of_id)
        wanted = (blocks_TK < self._nowhere).nonzero()
        blocks_N, order_N = blocks_TK[wanted[:, 0], wanted[:, 1]].sort(stable=True)
        # Rows for nobody fill up to what the others expect, see Schedule.block_rows.
        starts_B = planned_B.cumsum() - planned_B
        found_B = torch.bincount(blocks_N, minlength=self._nowhere)
        shift_B = torch.from_numpy(starts_B).to(found_B.device) - (found_B.cumsum(0) - found_B)
        place_N = torch.arange(len(blocks_N), device=blocks_N.device) + shift_B[blocks_N]
        tokens_P = torch.zeros(int(planned_B.sum()), dtype=torch.int64, device=blocks_N.device)
        labels_P = torch.full_like(tokens_P, -1)
        tokens_P[place_N], labels_P[place_N] = wanted[order_N, 0], blocks_N
        if self.chunks == 1 and self._replicas == 1:
            return [tokens_P], [labels_P]
        tokens_of_chunk, blocks_of_chunk = [], []
        for chunk in range(self.chunks):
            sizes_B = part(planned_B, chunk, self.chunks)
            firsts_B = starts_B + planned_B * chunk // self.chunks
            # To one receiver after the other: all replicas of a block get the same.
            index = torch.from_numpy(spans(firsts_B.repeat(self._replicas), sizes_B.repeat(self._replicas)))
            index = index.to(tokens_P.device)
            tokens_of_chunk.append(tokens_P[index])
            blocks_of_chunk.append(labels_P[index])
        return tokens_of_chunk, blocks_of_chunk
