"""ORDER: a :class:`Routing` as rows grouped by expert, and back.

T tokens · D model width · E experts · K slots per token · N routed rows. Slot ``t·K + k`` is token t's k-th choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.eager import is_eager
from moesaic.routing import Routing, expert_capacity
from moesaic.routing.routing import count_slots


@dataclass
class Dispatch:
    """Which row of the expert-grouped order holds which slot; computed once per layer call, used by every backend.

    Args:
        permutation: ``[N]`` int64, the slot of each row; rows of expert 0 first, then expert 1, ..., and within an
            expert in the order of the tokens. A padding row carries ``T · K``, the id that follows the last slot.
        inverse: ``[T, K]`` int64, the row of each slot; ``N`` for a null slot.
        counts: ``[E]`` int64, rows per expert (padding rows included).
        offsets: ``[E]`` int32, the row that follows each expert's last one: ``counts.cumsum(0)``. Rows from
            ``offsets[-1]`` on belong to nobody: no backend computes them, and nothing reads what they hold.
        weights: ``[T, K]``, the routing weights, applied by :meth:`combine`.
    """

    permutation: Tensor
    inverse: Tensor
    counts: Tensor
    offsets: Tensor
    weights: Tensor

    @property
    def num_tokens(self) -> int:
        return self.weights.shape[0]

    @property
    def top_k(self) -> int:
        return self.weights.shape[1]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @staticmethod
    def from_routing(routing: Routing, capacity_factor: float = 0.0) -> Dispatch:
        """Group the slots of ``routing`` by expert.

        With ``capacity_factor > 0`` every expert gets exactly ``expert_capacity(...)`` rows, the missing ones being
        padding, so that all shapes follow from T, K and E alone; slots beyond that are treated as null (use
        ``limit_capacity`` first to choose and count them). Otherwise each expert gets as many rows as it has slots.
        """
        ids_TK, weights_TK = routing.expert_ids, routing.weights
        if capacity_factor > 0:
            capacity = expert_capacity(ids_TK.shape[0], ids_TK.shape[1], routing.num_experts, capacity_factor)
            return _padded(ids_TK, weights_TK, routing.num_experts, capacity)
        return Dispatch.from_slots(ids_TK, weights_TK, routing.num_experts)

    @staticmethod
    def from_slots(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Dispatch:
        """The same without capacity, of bare slots: any id from ``num_experts`` on is a null slot's."""
        if ids_TK.device.type == "cpu" and is_eager(ids_TK):
            return _dropless_on_host(ids_TK, weights_TK, num_experts)
        return _dropless(ids_TK, weights_TK, num_experts)

    def gather(self, x_TD: Tensor) -> Tensor:
        """``[T, D]`` to ``[N, D]``: each row gets its token's features; padding rows get zeros."""
        x_ND: Tensor = _GatherRows.apply(x_TD, self.permutation, self.inverse)  # type: ignore[no-untyped-call]
        return x_ND

    def combine(self, y_ND: Tensor) -> Tensor:
        """``[N, D]`` to ``[T, D]``: each token's rows, weighted and summed in float32, in the dtype of ``y_ND``.

        A null slot adds nothing, whatever the memory of rows that nobody computed holds.
        """
        y_TD: Tensor = _CombineRows.apply(y_ND, self.weights, self.permutation, self.inverse)  # type: ignore[no-untyped-call]
        return y_TD

    def expert_of_row(self) -> Tensor:
        """``[N]`` int64: the expert of each row, ``E`` for the rows that belong to nobody."""
        rows = torch.arange(self.permutation.shape[0], device=self.offsets.device, dtype=self.offsets.dtype)
        return torch.searchsorted(self.offsets, rows, right=True)


def _dropless_on_host(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Dispatch:
    # NumPy, because with few tokens PyTorch's overhead for some fifteen small operations is what decode would wait for;
    # and in 16 bits, because NumPy sorts those by radix.
    ids = np.minimum(ids_TK.reshape(-1).numpy(), num_experts)
    counts = np.bincount(ids, minlength=num_experts + 1)[:num_experts]
    offsets = counts.cumsum()
    # The null slots are sorted to the end: cut them off where reading their number costs nothing.
    num_rows = int(offsets[-1])
    narrow = ids.astype(np.uint16) if num_experts < 1 << 16 else ids
    permutation = narrow.argsort(kind="stable")[:num_rows]
    inverse = np.full(ids.size, num_rows)
    inverse[permutation] = np.arange(num_rows)
    return Dispatch(
        torch.from_numpy(permutation),
        torch.from_numpy(inverse).view(ids_TK.shape),
        torch.from_numpy(counts),
        torch.from_numpy(offsets.astype(np.int32)),
        weights_TK,
    )


def _dropless(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Dispatch:
    # The null slots stay as rows that belong to nobody, and N is T·K: no shape depends on the data.
    ids = ids_TK.reshape(-1).clamp(max=num_experts)
    counts = count_slots(ids, num_experts)
    offsets = counts.cumsum(0).to(torch.int32)
    permutation = torch.sort(ids, stable=True).indices
    num_rows = permutation.numel()
    rows = torch.arange(num_rows, device=ids.device)
    inverse = torch.full_like(ids, num_rows).scatter_(0, permutation, rows).masked_fill_(ids >= num_experts, num_rows)
    return Dispatch(permutation, inverse.view_as(ids_TK), counts, offsets, weights_TK)


def _padded(ids_TK: Tensor, weights_TK: Tensor, num_experts: int, capacity: int) -> Dispatch:
    ids = ids_TK.reshape(-1)
    num_slots, num_rows = ids.numel(), num_experts * capacity
    counts = count_slots(ids, num_experts)
    order = torch.sort(ids, stable=True).indices
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    expert = ids[order]
    place = torch.arange(num_slots, device=ids.device) - starts[expert.clamp(max=num_experts)]
    row = (expert * capacity + place).masked_fill_((expert >= num_experts) | (place >= capacity), num_rows)
    # One row more than there are takes what the null slots write.
    permutation = torch.full((num_rows + 1,), num_slots, device=ids.device).scatter_(0, row, order)[:num_rows]
    inverse = torch.empty_like(ids).scatter_(0, order, row)
    offsets = torch.arange(1, num_experts + 1, device=ids.device, dtype=torch.int32) * capacity
    return Dispatch(permutation, inverse.view_as(ids_TK), torch.full_like(counts, capacity), offsets, weights_TK)


def _rows_of_slots(y_ND: Tensor, inverse_TK: Tensor) -> Tensor:
    """``[T, K, D]``: the row of each slot, zeros for null slots."""
    return _take(y_ND, inverse_TK.reshape(-1)).view(*inverse_TK.shape, y_ND.shape[1])


def _tokens_of_rows(x_TD: Tensor, permutation: Tensor, top_k: int) -> Tensor:
    """``[N, D]``: the token of each row, zeros for padding rows."""
    return _take(x_TD, permutation // top_k)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``x`` by their ids; the id that follows the last one gives zeros.

    Appending a row of zeros costs a copy of ``x``, a fraction of what masking the result would cost.
    """
    return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, rows)


def _accumulator(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


# Gather and combine are each other's transposes, and the permutation is a bijection: both directions are plain
# gathers, so no scatter with atomics runs and the result is deterministic on every device. Autograd would not know.


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(x_TD: Tensor, permutation: Tensor, inverse_TK: Tensor) -> Tensor:
        return _tokens_of_rows(x_TD, permutation, inverse_TK.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_TK,) = ctx.saved_tensors
        grad_TD = _rows_of_slots(grad_ND, inverse_TK).sum(dim=1, dtype=_accumulator(grad_ND))
        return grad_TD.to(grad_ND.dtype), None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(y_ND: Tensor, weights_TK: Tensor, permutation: Tensor, inverse_TK: Tensor) -> Tensor:
        rows_TKD = _rows_of_slots(y_ND, inverse_TK)
        weights_TK = weights_TK.to(_accumulator(y_ND))
        sum_TD = weights_TK.new_zeros(rows_TKD.shape[0], rows_TKD.shape[2])
        for k in range(rows_TKD.shape[1]):  # a pass a slot needs no wide copy of all rows, as one contraction would
            sum_TD.addcmul_(rows_TKD[:, k], weights_TK[:, k : k + 1])
        # A copy: PyTorch 2.11's compiler loses the gradient of an output that shares its memory with an intermediate.
        return sum_TD.to(y_ND.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, weights_TK, permutation, inverse_TK = ctx.saved_tensors
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_ND = _tokens_of_rows(grad_TD, permutation, weights_TK.shape[1])
            flat = torch.cat([weights_TK.reshape(-1), weights_TK.new_zeros(1)])
            grad_y = grad_ND * flat[permutation].unsqueeze(-1).to(grad_ND.dtype)
        if ctx.needs_input_grad[1]:
            wide, rows_TKD = _accumulator(y_ND), _rows_of_slots(y_ND, inverse_TK)
            grad_weights = (rows_TKD.to(wide) * grad_TD.to(wide).unsqueeze(1)).sum(dim=-1).to(weights_TK.dtype)
        return grad_y, grad_weights, None, None
