"""The low-rank parts of many adapters of one target, stacked so that rows of all of them are computed at once.

S-LoRA: Serving Thousands of Concurrent LoRA Adapters computes mixed ranks in one kernel of its own; here every part's
rank is cut into blocks of one width, so that a row with a rank of 40 has three of them and a row with a rank of 8 has
one, and what is computed is a dispatch of rows over blocks, like that of tokens over experts.

N rows · P blocks of the largest part · M rows over blocks, at most N·P · R block width · I input features · O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.adapters.lora import LoraPart, Target
from moesaic.adapters.lora_compute import grouped_rows
from moesaic.dispatch import Dispatch
from moesaic.errors import UsageError
from moesaic.experts.ranges import AddressRange, reserve

WIDTH = 16
# Reserved addresses, of which only those in use take memory: 64 adapters of rank 64 with a part for every expert.
_ROOM = 64 * 64 // WIDTH


@dataclass(frozen=True)
class Placed:
    """One part in its blocks.

    Attributes:
        blocks: their ids, ascending.
        table_EP: ``[E + 1, P]`` int64: the blocks of each expert's part, the null id where there is none; a linear
            layer is its one expert.
        bytes: of the part itself, as it is computed with.
    """

    blocks: list[int]
    table_EP: Tensor
    bytes: int


class LoraBlocks:
    """The parts of all adapters for one target.

    :meth:`put` and :meth:`release` may run in one other thread beside :meth:`add`; :meth:`publish` and
    :meth:`withdraw` belong between two forward passes.

    Attributes:
        adapters: the indices of the published adapters that have a part here.

    Raises:
        UsageError: where the system has not enough addresses.
    """

    def __init__(self, target: Target, dtype: torch.dtype, device: torch.device) -> None:
        self.target = target
        self._experts = target.num_experts or 1
        room = _ROOM * self._experts
        self._memory: list[AddressRange] = []
        self._a_BRI = self._reserve(room, target.inputs, dtype, device)
        self._b_BRO = self._reserve(room, target.outputs, dtype, device)
        self._scaling_B = torch.zeros(room, device=device)
        self._taken = bytearray(room)
        self._placed: dict[int, Placed] = {}
        self.adapters: frozenset[int] = frozenset()
        self._see()

    @property
    def committed(self) -> int:
        """Bytes of memory in whole pages."""
        return sum(memory.committed for memory in self._memory)

    def put(self, part: LoraPart) -> Placed:
        """Copy a part into free blocks, which nothing refers to until it is published.

        Raises:
            UsageError: where there is no room.
        """
        a_XRI, b_XOR = (part.a, part.b) if part.experts is not None else (part.a[None], part.b[None])
        experts = torch.tensor(part.experts if part.experts is not None else (0,))
        each = -(-part.rank // WIDTH)
        missing = each * WIDTH - part.rank
        blocks = self._allocate(len(experts) * each)
        ids = torch.tensor(blocks, device=self._a_BRI.device)
        try:
            with torch.no_grad():
                self._a_BRI[ids] = _to_blocks(F.pad(a_XRI, (0, 0, 0, missing)), self._a_BRI)
                self._b_BRO[ids] = _to_blocks(F.pad(b_XOR, (0, missing)).transpose(1, 2), self._b_BRO)
                self._scaling_B[ids] = part.scaling
        except BaseException:
            self._release(blocks)
            raise
        table_EP = torch.full((self._experts + 1, each), len(self._taken))
        table_EP[experts] = ids.cpu().view(-1, each)
        size = (part.a.numel() + part.b.numel()) * self._a_BRI.element_size()
        return Placed(blocks, table_EP, size)

    def release(self, placed: Placed) -> None:
        """Free a part's blocks, and give their memory back; it must not be published."""
        self._release(placed.blocks)

    def publish(self, adapter: int, placed: Placed) -> None:
        """Let the rows of an adapter find their blocks."""
        self._placed[adapter] = placed
        self._see()

    def withdraw(self, adapter: int) -> Placed:
        """The rows of an adapter have no part here any more."""
        placed = self._placed.pop(adapter)
        self._see()
        return placed

    def add(self, out_NO: Tensor, x_NI: Tensor, adapter_N: Tensor, expert_N: Tensor | int = 0) -> Tensor:
        """``out`` plus every row's part: two grouped matmuls over the blocks, whatever number of adapters there is.

        Args:
            out_NO: of any floating dtype. x_NI: the inputs.
            adapter_N: ``[N]`` int64, the index of each row's adapter; those without a part here add nothing.
            expert_N: ``[N]`` int64, each row's expert; ids from the number of experts on have no part.
        """
        if isinstance(expert_N, Tensor):
            expert_N = expert_N.clamp(max=self._experts)
        ids_NP = self._table_AEP[adapter_N.clamp(max=len(self._table_AEP) - 1), expert_N]
        # The sum over a row's blocks goes in their order, with weights of 1: it depends on no other row.
        blocks = Dispatch.from_slots(ids_NP, torch.ones_like(ids_NP, dtype=torch.float32), self._in_use)
        a_BIR, b_BRO = self._a_BRI[: self._in_use].transpose(1, 2), self._b_BRO[: self._in_use]
        low_MR = grouped_rows(blocks.gather(x_NI.to(a_BIR.dtype)), a_BIR, blocks.offsets)
        block_M = blocks.expert_of_row().clamp(max=len(self._taken) - 1)
        low_MR = (low_MR * self._scaling_B[block_M].unsqueeze(1)).to(low_MR.dtype)
        return out_NO + blocks.combine(grouped_rows(low_MR, b_BRO, blocks.offsets)).to(out_NO.dtype)

    def _see(self) -> None:
        """Put the tables of the published parts into one: ``[A + 1, E + 1, P]``; the last row is for all others."""
        null = len(self._taken)
        each = max((placed.table_EP.shape[1] for placed in self._placed.values()), default=1)
        rows = max(self._placed, default=-1) + 2
        table_AEP = torch.full((rows, self._experts + 1, each), null)
        for adapter, placed in self._placed.items():
            table_AEP[adapter, :, : placed.table_EP.shape[1]] = placed.table_EP
        self._table_AEP = table_AEP.to(self._a_BRI.device)
        self._in_use = max((placed.blocks[-1] + 1 for placed in self._placed.values()), default=0)
        self.adapters = frozenset(self._placed)

    def _reserve(self, room: int, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        memory = reserve(room, WIDTH * features * dtype.itemsize, device)
        self._memory.append(memory)
        return memory.view(room, dtype).view(room, WIDTH, features)

    def _allocate(self, count: int) -> list[int]:
        free = self._taken.count(0)
        if count > free:
            raise UsageError(f"there is room for {free} more blocks of rank {WIDTH} in {self.target.name}, not {count}")
        blocks, at = [], 0
        for _ in range(count):
            at = self._taken.index(0, at)
            self._taken[at] = 1
            blocks.append(at)
        done: list[tuple[AddressRange, int, int]] = []
        try:
            for memory in self._memory:
                for first, last in _runs(blocks):
                    memory.commit(first, last)
                    done.append((memory, first, last))
        except BaseException:
            for memory, first, last in done:
                memory.release(first, last)
            self._give_up(blocks)
            raise
        return blocks

    def _release(self, blocks: Sequence[int]) -> None:
        for first, last in _runs(blocks):
            for memory in self._memory:
                memory.release(first, last)
        self._give_up(blocks)

    def _give_up(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._taken[block] = 0


def _to_blocks(matrix_XRI: Tensor, like: Tensor) -> Tensor:
    """``[X, P · R, I]`` to ``[X · P, R, I]``, in the dtype and on the device of ``like``."""
    return matrix_XRI.detach().reshape(-1, WIDTH, matrix_XRI.shape[2]).to(like)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending ids as ranges ``[first, last)``."""
    start = 0
    for position in range(1, len(blocks) + 1):
        if position == len(blocks) or blocks[position] != blocks[position - 1] + 1:
            yield blocks[start], blocks[position - 1] + 1
            start = position
