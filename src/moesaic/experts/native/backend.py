"""The backend ``native``: one fused call of the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.dispatch import Dispatch
from moesaic.eager import is_eager
from moesaic.errors import ConfigError
from moesaic.experts.backend import BACKENDS, Backend
from moesaic.experts.native import call, library
from moesaic.experts.native.call import Arguments
from moesaic.experts.native.operators import experts
from moesaic.experts.weights import ExpertWeights


class NativeBackend(Backend):
    """C++ kernels for CPUs, with an instruction set chosen at run time: everything from gather to combine in one call.

    bfloat16, float16 and float32 features, accumulated in float32; float weights in either memory order, int8 and int4
    ones; the named activations. Gradients are exact to the order of additions, and the same at every number of threads.
    """

    preference = 20

    def missing(self) -> str | None:
        reason: str | None = library.missing()
        return reason

    def refusal(self, x_TD: Tensor, weights: ExpertWeights) -> str | None:
        if x_TD.device.type != "cpu" or weights.up.device.type != "cpu":
            return f"it computes on a CPU, and the features are on {x_TD.device}, the weights on {weights.up.device}"
        if x_TD.dtype not in library.FLOATS:
            return f"it computes in float32, bfloat16 and float16, and the features are {x_TD.dtype}"
        if weights.activation.name not in library.ACTIVATIONS:
            return f"it has no activation {weights.activation.name!r}, only {', '.join(library.ACTIVATIONS)}"
        if weights.post_norm is not None:
            return "the experts' outputs are normalized before they are weighted"
        for name, matrix in (("up", weights.up), ("down", weights.down)):
            if call.strides(matrix, weights.transposed) is None:
                return f"neither the inputs nor the outputs of {name} are contiguous: its strides are {matrix.stride()}"
            if weights.format is not None and matrix.shape[2] > 1 and matrix.stride(2) != 1:
                return f"the codes of {name} are not in the order in which they are packed: strides {matrix.stride()}"
        return self.missing()

    def run(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
        if dispatch.permutation.device != x_TD.device:
            raise ConfigError(f"features are on {x_TD.device}, but the routing is on {dispatch.permutation.device}")
        weights_TK = dispatch.weights
        arguments = Arguments(
            x_TD,
            dispatch.permutation,
            dispatch.offsets,
            weights_TK if weights_TK.dtype in library.FLOATS else weights_TK.float(),
            weights.up,
            weights.down,
            weights.up_bias,
            weights.down_bias,
            weights.up_scale,
            weights.down_scale,
            weights.transposed,
            weights.activation.name,
            weights.format.group if weights.format is not None else 0,
        )
        return call.forward(arguments, keep=False)[0] if _is_plain(arguments) else experts(arguments)


def _is_plain(arguments: Arguments) -> bool:
    """Whether nobody looks on: no gradient is recorded, and nothing traces or transforms the call."""
    if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
        return False
    return is_eager(arguments.x_TD, arguments.up)


BACKENDS.register("native")(NativeBackend())
