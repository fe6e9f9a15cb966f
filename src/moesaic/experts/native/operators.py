"""The native kernels as operators of PyTorch: fake kernels for tracing, gradients, and gradients of gradients.

E experts · T tokens · K slots per token · N routed rows · D model width · F expert hidden width · G = 2F with a gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moesaic.dispatch import Dispatch
from moesaic.experts.activations import ACTIVATIONS
from moesaic.experts.backend import BACKENDS
from moesaic.experts.native import call
from moesaic.experts.native.call import Arguments
from moesaic.experts.quantized import QuantFormat, QuantizedMatrix
from moesaic.experts.weights import ExpertWeights

_ARGUMENTS = (
    "Tensor x, Tensor permutation, Tensor offsets, Tensor weights, Tensor up, Tensor down, Tensor? up_bias, "
    "Tensor? down_bias, Tensor? up_scale, Tensor? down_scale, bool transposed, str activation, int group"
)
# What has a gradient, in the order in which the backward operator returns them.
_DIFFERENTIABLE = [
    Arguments._fields.index(name) for name in ("x_TD", "up", "down", "up_bias", "down_bias", "weights_TK")
]


def experts(arguments: Arguments) -> Tensor:
    """``[T, D]``, with gradients and for tracing; :func:`call.forward` is the way without."""
    keep = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments)
    # In forward mode too the function is asked, which refuses it; the operator would give no derivative, silently.
    operator = _Experts.apply if keep or _is_forward_mode() else torch.ops.moesaic.experts
    out_TD: Tensor = operator(*arguments, keep)[0]  # type: ignore[no-untyped-call]
    return out_TD


def _is_forward_mode() -> bool:
    if torch.compiler.is_compiling():
        return False
    transform = torch._C._functorch.peek_interpreter_stack()
    is_jvp = transform is not None and transform.key() == torch._C._functorch.TransformType.Jvp
    return is_jvp or forward_ad._current_level >= 0


@torch.library.custom_op("moesaic::experts", mutates_args=(), schema=f"({_ARGUMENTS}, bool keep) -> (Tensor, Tensor)")
def _experts(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The output, and with ``keep`` what goes into the activation; else an empty tensor."""
    out_TD, pre_NG = call.forward(Arguments(*inputs[:-1]), keep=inputs[-1])
    return out_TD, out_TD.new_empty(0) if pre_NG is None else pre_NG


@_experts.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    a, keep = Arguments(*inputs[:-1]), inputs[-1]
    pre_NG = a.x_TD.new_empty(a.permutation.shape[0], a.gate_up_width) if keep else a.x_TD.new_empty(0)
    return a.x_TD.new_empty(a.x_TD.shape), pre_NG


@torch.library.custom_op(
    "moesaic::experts_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor pre, {_ARGUMENTS}, bool[] wanted) -> ({', '.join(['Tensor'] * 6)})",
)
def _experts_backward(*inputs: Any) -> tuple[Tensor, ...]:
    """The gradients that are ``wanted``, empty tensors for the others."""
    grad_TD, pre_NG, arguments, wanted = inputs[0], inputs[1], Arguments(*inputs[2:-1]), inputs[-1]
    made = call.backward(grad_TD, pre_NG, _as_floats(arguments), wanted)
    return tuple(grad_TD.new_empty(0) if each is None else each for each in made)


@_experts_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    arguments, wanted = Arguments(*inputs[2:-1]), inputs[-1]
    made = call.empty_gradients(arguments, wanted)
    return tuple(inputs[0].new_empty(0) if each is None else each for each in made)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _save(ctx, inputs[:-1], output[1])


def _backward(ctx: Any, grad_TD: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * (len(Arguments._fields) + 1)
    if grad_TD is None:
        return tuple(gradients)
    *arguments, pre_NG = _saved(ctx)
    # Codes of quantized weights have no gradient.
    wanted = [ctx.needs_input_grad[index] for index in _DIFFERENTIABLE]
    made = _Gradients.apply(grad_TD, pre_NG, *arguments, wanted)  # type: ignore[no-untyped-call]
    for index, is_wanted, gradient in zip(_DIFFERENTIABLE, wanted, made, strict=True):
        if is_wanted:
            gradients[index] = gradient.to(arguments[index].dtype)
    return tuple(gradients)


class _Experts(torch.autograd.Function):
    """The operator's gradient; ``register_autograd`` alone knows no ``torch.func`` transforms."""

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.moesaic.experts(*inputs)  # type: ignore[no-any-return]


_experts.register_autograd(_backward, setup_context=_setup_context)


class _Gradients(torch.autograd.Function):
    """Backward as a function of its own, whose gradient is the grouped backend's: nobody trains with it every day."""

    @staticmethod
    def forward(  # torch.compile counts the parameters, and so wants them one by one
        grad_TD: Tensor,
        pre_NG: Tensor,
        x_TD: Tensor,
        permutation: Tensor,
        offsets_E: Tensor,
        weights_TK: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        up_scale: Tensor | None,
        down_scale: Tensor | None,
        transposed: bool,
        activation: str,
        group: int,
        wanted: list[bool],
    ) -> tuple[Tensor, ...]:
        arguments = (x_TD, permutation, offsets_E, weights_TK, up, down, up_bias, down_bias, up_scale, down_scale)
        options = (transposed, activation, group, wanted)
        return torch.ops.moesaic.experts_backward(grad_TD, pre_NG, *arguments, *options)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.wanted = inputs[-1]
        _save(ctx, inputs[2:-1], inputs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        *saved, grad_TD = _saved(ctx)
        indices = [index for index, wanted in zip(_DIFFERENTIABLE, ctx.wanted, strict=True) if wanted]
        kept = [each for each, wanted in zip(upstream, ctx.wanted, strict=True) if wanted]
        with torch.enable_grad():
            grad_TD = grad_TD.detach().requires_grad_()
            for index in indices:
                saved[index] = saved[index].detach().requires_grad_()
            inputs = [saved[index] for index in indices]
            first = torch.autograd.grad(_grouped(Arguments(*saved)), inputs, grad_TD, create_graph=True)
            found = torch.autograd.grad(first, [grad_TD, *inputs], kept, allow_unused=True)
        gradients: list[Tensor | None] = [None] * len(saved)
        for index, gradient in zip(indices, found[1:], strict=True):
            gradients[index] = gradient
        return found[0], None, *gradients, None


def _grouped(arguments: Arguments) -> Tensor:
    a = _as_floats(arguments)
    weights = ExpertWeights(
        a.up, a.down, ACTIVATIONS.get(a.activation), a.up_bias, a.down_bias, transposed=a.transposed
    )
    num_rows = a.permutation.shape[0]
    rows = torch.arange(num_rows, device=a.permutation.device)
    # The last place takes what padding rows write; rows that belong to nobody are no slot's.
    inverse = a.permutation.new_full((a.weights_TK.numel() + 1,), num_rows)
    inverse.scatter_(0, a.permutation, torch.where(rows < a.offsets_E[-1], rows, num_rows))
    counts = a.offsets_E.diff(prepend=a.offsets_E.new_zeros(1)).long()
    dispatch = Dispatch(a.permutation, inverse[:-1].view_as(a.weights_TK), counts, a.offsets_E, a.weights_TK)
    return BACKENDS.get("grouped").run(a.x_TD, dispatch, weights)


def _as_floats(a: Arguments) -> Arguments:
    """The arguments with quantized weights as floats of the features' dtype."""
    if a.up_scale is None or a.down_scale is None:
        return a
    quantized = QuantFormat(4, a.group) if a.group else QuantFormat(8, 0)
    up = QuantizedMatrix(quantized, a.up, a.up_scale, a.x_TD.shape[1])
    down = QuantizedMatrix(quantized, a.down, a.down_scale, a.d_ff)
    return a._replace(
        up=up.dequantize(a.x_TD.dtype), down=down.dequantize(a.x_TD.dtype), up_scale=None, down_scale=None, group=0
    )


def _save(ctx: Any, arguments: tuple[Any, ...], last: Tensor) -> None:
    tensors = [each if isinstance(each, Tensor) else None for each in arguments]
    ctx.save_for_backward(*tensors, last)
    ctx.others = [None if isinstance(each, Tensor) else each for each in arguments]


def _saved(ctx: Any) -> list[Any]:
    *tensors, last = ctx.saved_tensors
    return [*(other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)), last]
