"""Batched rerouting: adapters' experts in slots behind the base's, and each token's expert ids rewritten to them.

The experts' memory becomes the first rows of an address range (:mod:`moesaic.experts.ranges`); an adapter's copies of
some experts lie in rows behind them. One table of ``[adapters + 1, E + 1]`` slots says where each adapter's version of
each expert lies, so that a batch of any mix of adapters is one gather away from an ordinary call over more experts: no
backend knows of it (ExpertWeave, section "Batched rerouting").

T tokens · K slots per token of the router's choice · E experts of the base · S expert slots, the base's E first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.eager import is_eager
from moesaic.errors import ConfigError, UnsupportedError, UsageError
from moesaic.experts.low_rank import LowRank
from moesaic.experts.ranges import AddressRange, reserve
from moesaic.experts.weights import ExpertWeights


class BatchAdapters:
    """Which adapter each token of the running forward pass belongs to; one object shared by all layers of a model."""

    def __init__(self) -> None:
        self.index_T: Tensor | None = None
        self._starts: dict[int, npt.NDArray[np.int64]] = {}

    @contextmanager
    def using(self, index_T: Tensor | None) -> Iterator[None]:
        """For one forward pass.

        Args:
            index_T: ``[T]`` int64, 0 for the base, in the order of the flattened tokens; None: the base for all.
        """
        # Without an adapter in the batch, every layer takes its ordinary way.
        if index_T is not None and index_T.is_cpu and not index_T.any():
            index_T = None
        before = self.index_T, self._starts
        self.index_T, self._starts = index_T, {}
        try:
            yield
        finally:
            self.index_T, self._starts = before

    def starts(self, width: int) -> npt.NDArray[np.int64]:
        """``[T, 1]``: where each token's row begins in a table of rows of ``width``; computed once for all layers."""
        if width not in self._starts:
            assert self.index_T is not None
            self._starts[width] = self.index_T.numpy()[:, None] * width
        return self._starts[width]


@dataclass
class _Matrix:
    """One parameter's rows: the addresses, and the tensor ``[S, ...]`` over all of them."""

    memory: AddressRange
    rows: Tensor


class ExpertSlots:
    """The expert slots of one layer. Their parameters become views of the range's first E rows: nothing is held twice.

    :meth:`reroute` and :attr:`weights` serve forward passes. :meth:`publish` and :meth:`withdraw` belong between two of
    them; the other methods may run beside them in another thread, one at a time, and :meth:`write` beside those too.

    Args:
        weights: of the module, whose parameters it holds; float weights on the CPU or a CUDA device.
        room: slots for adapters' experts.
        max_adapters: highest index of an adapter.
        batch: who the tokens belong to.

    Attributes:
        num_experts: E.
        total: S. in_use: the slots that forward passes see: those up to the last that a published adapter has.
        weights: ``[in_use, ...]`` tensors for a backend.

    Raises:
        UnsupportedError: for quantized weights, and other devices.
        UsageError: where there are not enough addresses or memory.
    """

    def __init__(self, weights: ExpertWeights, room: int, max_adapters: int, batch: BatchAdapters) -> None:
        if weights.format is not None:
            raise UnsupportedError(
                f"the experts are stored as {weights.format.name} codes: adapters' experts can be served beside float "
                "weights only"
            )
        self.num_experts, self.total = weights.num_experts, weights.num_experts + room
        self._batch, self._base = batch, weights
        self._taken = bytearray(b"\1" * self.num_experts + bytes(room))
        self._matrices: dict[str, _Matrix] = {}
        try:
            for name, tensor in weights.tensors().items():
                self._matrices[name] = _move(tensor, self.total)
        except UsageError:
            self.close()
            raise
        self._experts: dict[int, list[int]] = {}
        # The column behind the experts' is the null slots': they stay beyond all slots.
        row = [*range(self.num_experts), self.total]
        self._table = torch.tensor([row] * (max_adapters + 1), device=weights.up.device)
        self._flat = self._table.view(-1).numpy() if self._table.is_cpu else None
        self._expert_of_slot = np.zeros(self.total, dtype=np.int64)
        self._expert_of_slot[: self.num_experts] = range(self.num_experts)
        self._see()

    @property
    def is_idle(self) -> bool:
        """Whether the running forward pass needs the base's experts only."""
        return self._batch.index_T is None or self.in_use == self.num_experts

    def reroute(self, ids_TK: Tensor) -> Tensor:
        """The slots of the experts that each token's adapter, by the running forward pass, has in their place.

        Args:
            ids_TK: ``[T, K]`` int64; ids from E on are null slots'.

        Returns:
            ``[T, K]`` int64, S for null slots.

        Raises:
            ConfigError: where the forward pass was announced with another number of tokens.
        """
        index_T = self._batch.index_T
        assert index_T is not None
        if len(index_T) != len(ids_TK):
            raise ConfigError(f"{len(index_T)} tokens have an adapter index, but the layer got {len(ids_TK)} tokens")
        if self._flat is not None and index_T.is_cpu and is_eager(ids_TK):
            places = np.minimum(ids_TK.numpy(), self.num_experts)
            places += self._batch.starts(self.num_experts + 1)
            return torch.from_numpy(self._flat.take(places))
        return self._table[index_T.to(ids_TK.device)[:, None], ids_TK.clamp(max=self.num_experts)]

    def by_expert(self, counts: Tensor) -> Tensor:
        """``[E]`` int64: rows per slot as rows per expert of the base, adapters' copies counted as their expert.

        Args:
            counts: ``[E]`` or ``[in_use]`` int64: the module's ``last_counts``.
        """
        rows_S = counts.cpu().numpy()
        folded = np.bincount(self._expert_of_slot[: len(rows_S)], weights=rows_S, minlength=self.num_experts)
        return torch.from_numpy(folded.astype(np.int64))

    def weights_with(self, low_rank: LowRank | None) -> ExpertWeights:
        """:attr:`weights`, with what low-rank adapters add in this forward pass."""
        self.weights.low_rank = low_rank
        return self.weights

    @property
    def used(self) -> int:
        """Slots beyond the base's that are allocated."""
        return self._taken.count(1) - self.num_experts

    @property
    def free(self) -> int:
        """Slots that are not."""
        return self._taken.count(0)

    @property
    def row_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(matrix.memory.row_bytes for matrix in self._matrices.values())

    @property
    def committed(self) -> int:
        """Bytes of memory that base and adapters take, in whole pages."""
        return sum(matrix.memory.committed for matrix in self._matrices.values())

    def allocate(self, count: int) -> list[int]:
        """The lowest free slots, ascending, with memory behind them.

        Raises:
            UsageError: where there are not as many, or no memory for them; nothing is changed then.
        """
        if count > self.free:
            raise UsageError(
                f"{count} expert slots are needed, but {self.free} of {self.total - self.num_experts} are free"
            )
        slots, at = [], 0
        for _ in range(count):
            at = self._taken.index(0, at)
            self._taken[at] = 1
            slots.append(at)
        done: list[tuple[AddressRange, int, int]] = []
        try:
            for matrix in self._matrices.values():
                for first, last, _ in _runs(slots):
                    matrix.memory.commit(first, last)
                    done.append((matrix.memory, first, last))
        except BaseException:
            for memory, first, last in done:
                memory.release(first, last)
            self._give_up(slots)
            raise
        return slots

    def write(self, slots: Sequence[int], experts: Sequence[int], rows: Mapping[str, Tensor]) -> None:
        """Fill allocated slots that no published adapter has.

        Args:
            experts: what each slot is a copy of.
            rows: for each of :meth:`ExpertWeights.tensors` the copies, ``[len(slots), ...]``, of any float dtype; what
                is left out is the base's.
        """
        for name, matrix in list(self._matrices.items()):  # close() may empty it meanwhile
            for first, last, at in _runs(slots):
                into = matrix.rows[first:last]
                _copy(
                    into,
                    rows[name][at : at + last - first]
                    if name in rows
                    else matrix.rows[experts[at : at + last - first]],
                )

    def release(self, slots: Sequence[int]) -> None:
        """Free slots, and give their memory back; no forward pass may be reading them."""
        for matrix in self._matrices.values():
            for first, last, _ in _runs(slots):
                matrix.memory.release(first, last)
        self._give_up(slots)

    def publish(self, adapter: int, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Send the tokens of an adapter to ``slots`` instead of ``experts`` from now on; one table write."""
        row = self._table[0].cpu().clone()
        row[list(experts)] = torch.tensor(slots, dtype=row.dtype)
        self._expert_of_slot[list(slots)] = experts
        self._experts[adapter] = list(slots)
        self._see()
        self._table[adapter].copy_(row)

    def withdraw(self, adapter: int) -> list[int]:
        """Send the tokens of an adapter to the base's experts again; returns the slots that it had."""
        self._table[adapter].copy_(self._table[0])
        slots = self._experts.pop(adapter, [])
        self._see()
        return slots

    def close(self) -> None:
        """Give the module's parameters memory of their own again, and all of the range back."""
        self.weights = self._base
        for name, tensor in self._base.tensors().items():
            if self._matrices.pop(name, None):
                tensor.data = tensor.detach().clone(memory_format=torch.preserve_format)

    def _give_up(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._taken[slot] = 0

    def _see(self) -> None:
        self.in_use = max((slots[-1] + 1 for slots in self._experts.values() if slots), default=self.num_experts)
        seen: dict[str, Any] = {name: matrix.rows[: self.in_use] for name, matrix in self._matrices.items()}
        self.weights = replace(self._base, base_experts=self.num_experts, **seen)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a module, or one that is saved whole, has the base's experts only.
        return _no_slots, ()


def _no_slots() -> None:
    return None


def _move(tensor: Tensor, rows: int) -> _Matrix:
    """Move a parameter's values into a range of ``rows`` rows, in the memory order that its experts have."""
    experts, expert = len(tensor), tensor.detach()[0]
    strides = expert.stride() if _is_dense(expert) else torch.empty(expert.shape, device="meta").stride()
    memory = reserve(rows, expert.numel() * expert.element_size(), tensor.device)
    memory.use_huge_pages(experts)
    memory.commit(0, experts)

    def seen(count: int) -> Tensor:
        flat = memory.view(count, tensor.dtype)
        return flat.as_strided((count, *expert.shape), (expert.numel(), *strides))

    base = seen(experts)  # a storage without the adapters': what is saved or copied of the parameter ends with the base
    base.copy_(tensor.detach())
    tensor.data = base
    return _Matrix(memory, seen(rows))


def _is_dense(expert: Tensor) -> bool:
    return expert.is_contiguous() or (expert.ndim == 2 and expert.t().is_contiguous())


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Ascending slots as (first, last, position of the first): the slots ``[first, last)`` follow one another."""
    start = 0
    for position in range(1, len(slots) + 1):
        if position == len(slots) or slots[position] != slots[position - 1] + 1:
            yield slots[start], slots[position - 1] + 1, start
            start = position


def _copy(into: Tensor, values: Tensor) -> None:
    alike = into.dtype == values.dtype and into.is_contiguous() and values.is_contiguous()
    if into.is_cpu and values.is_cpu and alike:
        # In one thread, and without Python's lock: forward passes go on in another one meanwhile.
        np.copyto(into.view(torch.uint8).numpy(), values.detach().view(torch.uint8).numpy())
    else:
        into.copy_(values)
