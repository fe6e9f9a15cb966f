"""The kernels as operators of PyTorch with gradients. Importing this needs no Triton; the first call does.

The experts' outputs ``[T·K, D]`` are not kept for the backward: the gradient of a routing weight is the product of
``h`` with the unweighted gradient of ``h``, which is at hand there anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.experts.activations import ACTIVATIONS


@torch.library.custom_op("moesaic::triton_matmul", mutates_args=())
def matmul(
    a: Tensor,
    w_EIO: Tensor,
    bias_EO: Tensor | None,
    permutation: Tensor,
    inverse_TK: Tensor,
    offsets_E: Tensor,
    weights_TK: Tensor | None,
    gather: bool,
    combine: bool,
    activation: str,
) -> Tensor:
    """``activation(a[n] @ w[e] + bias[e])`` for the rows n of each expert e, weighted where there are weights.

    Args:
        a: ``[T, I]`` with ``gather``: each row reads its token, padding rows read zeros; else ``[N, I]``.
        w_EIO, bias_EO: of any strides.
        permutation, inverse_TK, offsets_E: of a :class:`moesaic.Dispatch`.
        weights_TK: contiguous; only with ``combine``.
        combine: sum each token's rows.
        activation: a name of ``ACTIVATIONS``, or ``""`` for none.

    Returns:
        ``[T, O]`` with ``combine``, else ``[N, O]``, where rows that belong to nobody are zeros; O is halved by a gated
        activation.
    """
    from moesaic.experts.triton import launch

    return launch.matmul(a, w_EIO, bias_EO, permutation, inverse_TK, offsets_E, weights_TK, gather, combine, activation)


@matmul.register_fake
def _(
    a: Tensor,
    w_EIO: Tensor,
    bias_EO: Tensor | None,
    permutation: Tensor,
    inverse_TK: Tensor,
    offsets_E: Tensor,
    weights_TK: Tensor | None,
    gather: bool,
    combine: bool,
    activation: str,
) -> Tensor:
    gated = bool(activation) and ACTIVATIONS.get(activation).gated
    width = w_EIO.shape[2] // 2 if gated else w_EIO.shape[2]
    return a.new_empty(inverse_TK.shape[0] if combine else permutation.shape[0], width)


@torch.library.custom_op("moesaic::triton_outer", mutates_args=())
def outer(
    a: Tensor,
    b: Tensor,
    permutation: Tensor,
    inverse_TK: Tensor,
    offsets_E: Tensor,
    gather_a: bool,
    gather_b: bool,
    transposed: bool,
) -> Tensor:
    """``[E, I, O]``: for each expert, its rows of ``a`` transposed times its rows of ``b``.

    Args:
        a: ``[N, I]``, or ``[T, I]`` with ``gather_a``. b: ``[N, O]``, or ``[T, O]`` with ``gather_b``.
        transposed: return ``[E, O, I]``.
    """
    from moesaic.experts.triton import launch

    sizes = (b.shape[1], a.shape[1]) if transposed else (a.shape[1], b.shape[1])
    out = a.new_empty(offsets_E.shape[0], *sizes)
    (num_slots, top_k), out_EIO = (inverse_TK.numel(), inverse_TK.shape[1]), out.mT if transposed else out
    launch.outer(a, b, permutation, offsets_E, num_slots, top_k, gather_a, gather_b, out_EIO)
    return out


@outer.register_fake
def _(
    a: Tensor,
    b: Tensor,
    permutation: Tensor,
    inverse_TK: Tensor,
    offsets_E: Tensor,
    gather_a: bool,
    gather_b: bool,
    transposed: bool,
) -> Tensor:
    sizes = (b.shape[1], a.shape[1]) if transposed else (a.shape[1], b.shape[1])
    return a.new_empty(offsets_E.shape[0], *sizes)


@torch.library.custom_op("moesaic::triton_weigh", mutates_args=())
def weigh(
    grad_NF: Tensor, h_NF: Tensor, weights_TK: Tensor, permutation: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows times the weight of their slot: ``grad`` ``[N, F]``, ``h`` ``[N, F]``, and the weights' gradient ``[T, K]``.

    The last one is the product of a slot's row of ``grad`` with its row of ``h``; zero for null slots. ``grad`` and
    ``weights`` must be contiguous.
    """
    from moesaic.experts.triton import launch

    return launch.weigh(grad_NF, h_NF, weights_TK, permutation, offsets_E)


@weigh.register_fake
def _(
    grad_NF: Tensor, h_NF: Tensor, weights_TK: Tensor, permutation: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return grad_NF.new_empty(h_NF.shape), grad_NF.new_empty(h_NF.shape), weights_TK.new_empty(weights_TK.shape)


@torch.library.custom_op("moesaic::triton_sum_rows", mutates_args=())
def sum_rows(
    a: Tensor, permutation: Tensor, inverse_TK: Tensor, offsets_E: Tensor, weights_TK: Tensor | None, gather: bool
) -> Tensor:
    """``[E, X]``: the sum of each expert's rows of ``a`` (``[N, X]``, or ``[T, X]`` with ``gather``), weighted where
    there are (contiguous) weights."""
    from moesaic.experts.triton import launch

    num_slots, top_k = inverse_TK.numel(), inverse_TK.shape[1]
    return launch.sum_rows(a, permutation, offsets_E, weights_TK, num_slots, top_k, gather)


@sum_rows.register_fake
def _(
    a: Tensor, permutation: Tensor, inverse_TK: Tensor, offsets_E: Tensor, weights_TK: Tensor | None, gather: bool
) -> Tensor:
    return a.new_empty(offsets_E.shape[0], a.shape[1])


# Calls name the operator in torch.ops, which is what PyTorch's compiler knows best.


class Up(torch.autograd.Function):
    """``[T, D]`` to ``[N, G]``: each row's token times its expert's matrix ``[D, G]``, plus the bias."""

    @staticmethod
    def forward(
        x_TD: Tensor,
        w_EDG: Tensor,
        bias_EG: Tensor | None,
        permutation: Tensor,
        inverse_TK: Tensor,
        offsets_E: Tensor,
    ) -> Tensor:
        """One launch; the rows' features are never written to memory."""
        return torch.ops.moesaic.triton_matmul(  # type: ignore[no-any-return]
            x_TD, w_EDG, bias_EG, permutation, inverse_TK, offsets_E, None, True, False, ""
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what :meth:`backward` reads."""
        x_TD, w_EDG, _, *order = inputs
        ctx.save_for_backward(x_TD, w_EDG, *order)

    @staticmethod
    def backward(ctx: Any, grad_NG: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of features, matrices (in their own memory order) and biases."""
        x_TD, w_EDG, *order = ctx.saved_tensors
        ops = torch.ops.moesaic
        grad_x = grad_w = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.triton_matmul(grad_NG, w_EDG.mT, None, *order, None, False, True, "")
        if ctx.needs_input_grad[1]:
            grad_w = _outer_like(w_EDG, x_TD, grad_NG, order, True, False)
        if ctx.needs_input_grad[2]:
            grad_bias = ops.triton_sum_rows(grad_NG, *order, None, False)
        return grad_x, grad_w, grad_bias, None, None, None


class Down(torch.autograd.Function):
    """``[N, F]`` to ``[T, D]``: each row times its expert's ``[F, D]``, plus the bias, weighted, summed by token."""

    @staticmethod
    def forward(
        h_NF: Tensor,
        w_EFD: Tensor,
        bias_ED: Tensor | None,
        weights_TK: Tensor,
        permutation: Tensor,
        inverse_TK: Tensor,
        offsets_E: Tensor,
    ) -> Tensor:
        """Two launches: rows are stored, weighted, where their slot stands, and slots are summed in order."""
        return torch.ops.moesaic.triton_matmul(  # type: ignore[no-any-return]
            h_NF, w_EFD, bias_ED, permutation, inverse_TK, offsets_E, weights_TK, False, True, ""
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what :meth:`backward` reads."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``h``, matrices (in their own memory order), biases and routing weights."""
        h_NF, w_EFD, bias_ED, weights_TK, *order = ctx.saved_tensors
        permutation, inverse_TK, offsets_E = order
        ops = torch.ops.moesaic
        unweighted_NF = ops.triton_matmul(grad_TD, w_EFD.mT, None, *order, None, True, False, "")
        grad_h, weighted_NF, grad_weights = ops.triton_weigh(unweighted_NF, h_NF, weights_TK, permutation, offsets_E)
        grad_w = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_w = _outer_like(w_EFD, weighted_NF, grad_TD, order, False, True)
        if bias_ED is not None:
            if ctx.needs_input_grad[2]:
                grad_bias = ops.triton_sum_rows(grad_TD, *order, weights_TK, True)
            grad_weights = grad_weights + _product_with_bias(grad_TD, bias_ED, inverse_TK, offsets_E, weights_TK.dtype)
        return grad_h, grad_w, grad_bias, grad_weights, None, None, None


def _product_with_bias(
    grad_TD: Tensor, bias_ED: Tensor, inverse_TK: Tensor, offsets_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """``[T, K]``: each slot's gradient times the bias of its expert; zero for null slots."""
    products_TE = grad_TD.float() @ bias_ED.float().T
    expert_TK = torch.searchsorted(offsets_E, inverse_TK.int(), right=True)
    return torch.nn.functional.pad(products_TE, (0, 1)).gather(1, expert_TK).to(dtype)


def _outer_like(w_EIO: Tensor, a: Tensor, b: Tensor, order: list[Tensor], gather_a: bool, gather_b: bool) -> Tensor:
    transposed = w_EIO.stride(-1) != 1
    out: Tensor = torch.ops.moesaic.triton_outer(a, b, *order, gather_a, gather_b, transposed)
    return out.mT if transposed else out
