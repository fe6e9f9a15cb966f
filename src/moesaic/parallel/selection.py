"""Which of a rank's tokens go where: the rows of every exchange of a step, and back to their tokens.

T tokens · K slots per token · N rows that are sent · R rows that arrive · B blocks of experts · W ranks.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.parallel.schedule import Schedule
from moesaic.parallel.workload import IntArray

NOBODY = (1 << 31) - 1
"""The id of a slot that is not for the rank that the row goes to: that of a null slot, whatever number of experts."""


def blocks_wanted(ids_TK: Tensor, block_of_id: Tensor, blocks: int) -> Tensor:
    """``[T, B]`` boolean: which blocks a token has slots for.

    Args:
        block_of_id: ``[E + 1]``, the block of each expert; B where it is none, and for null slots.
    """
    wanted = torch.zeros(ids_TK.shape[0], blocks + 1, dtype=torch.bool, device=ids_TK.device)
    wanted.scatter_(1, block_of_id[ids_TK], torch.ones_like(ids_TK, dtype=torch.bool))
    return wanted[:, :blocks]


class Selection:
    """The rows that one rank sends in a step, in the chunks of its plan.

    Args:
        ids_TK: ``[T, K]`` int64, null slots being E.
    """

    def __init__(self, schedule: Schedule, rank: int, ids_TK: Tensor) -> None:
        self.schedule, self.rank, self.ids_TK = schedule, rank, ids_TK
        layout = schedule.workload.layout
        fetched_E = torch.from_numpy(schedule.fetches_WE[rank])
        block_of_id = torch.from_numpy(layout.block_of_expert).masked_fill(fetched_E, layout.blocks)
        first_of_block = [layout.experts_of_block(block).start for block in range(layout.blocks)]
        device = ids_TK.device
        self._block_of_id = functional.pad(block_of_id, (0, 1), value=layout.blocks).to(device)
        self._first_of_block = torch.tensor(first_of_block, device=device)
        self._tokens, self._blocks = self._rows()

    @property
    def chunks(self) -> int:
        return self.schedule.plan.overlap

    def sizes(self, chunk: int) -> IntArray:
        """``[from, to]``: rows that travel in one chunk: every pair of ranks splits its own evenly."""
        rows_WW, chunks = self.schedule.rows_WW, self.chunks
        return rows_WW * (chunk + 1) // chunks - rows_WW * chunk // chunks

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

    def _rows(self) -> tuple[list[Tensor], list[Tensor]]:
        """Token and block of every row of every chunk; -1 for a row that fills up."""
        layout, rank = self.schedule.workload.layout, self.rank
        wanted_TB = blocks_wanted(self.ids_TK, self._block_of_id, layout.blocks)
        planned_B = self.schedule.block_rows_WB[rank]
        tokens_of_block, labels_of_block = [], []
        for block in range(layout.blocks):
            tokens = wanted_TB[:, block].nonzero().squeeze(1)
            # Rows for nobody fill up to what the others expect, see Schedule.block_rows_WB.
            missing = int(planned_B[block]) - len(tokens)
            tokens_of_block.append(functional.pad(tokens, (0, missing)))
            labels_of_block.append(functional.pad(torch.full_like(tokens, block), (0, missing), value=-1))
        receiving = [receiver // layout.slices for receiver in np.flatnonzero(self.schedule.rows_WW[rank]).tolist()]
        none = self.ids_TK.new_empty(0)
        tokens_of_chunk, blocks_of_chunk = [], []
        for index in range(self.chunks):
            parts, labels = [none], [none]
            for block in receiving:
                size = int(planned_B[block])
                part = slice(size * index // self.chunks, size * (index + 1) // self.chunks)
                parts.append(tokens_of_block[block][part])
                labels.append(labels_of_block[block][part])
            tokens_of_chunk.append(torch.cat(parts))
            blocks_of_chunk.append(torch.cat(labels))
        return tokens_of_chunk, blocks_of_chunk
