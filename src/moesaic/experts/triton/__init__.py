"""Triton kernels for NVIDIA GPUs: a grouped matmul that gathers as it loads and scatters, weighted, as it stores."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from moesaic.dispatch import Dispatch
from moesaic.experts.backend import BACKENDS, Backend
from moesaic.experts.triton.ops import Down, Up
from moesaic.experts.weights import ExpertWeights

# Activations that the first kernel can compute as well; another one is left to PyTorch.
_FUSED = frozenset({"swiglu", "geglu", "geglu_tanh", "relu", "gelu", "gelu_tanh"})
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CAPABILITY = 8  # the oldest GPUs that Triton supports, and that multiply bfloat16
_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton decides this once too, when it is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class TritonBackend(Backend):
    """Grouped matmuls in Triton: two launches and a sum over slots forward, block sizes tuned at the first call.

    The features of routed rows are never copied, the number of rows an expert never travels to the host, and no atomic
    addition makes two runs differ. Where nothing needs a gradient, a named activation is computed in the first
    matmul too; otherwise PyTorch computes it between the two, custom ones included.
    """

    # The interpreter is for tests: "auto" leaves it alone.
    preference = -1 if _INTERPRETED else 20

    def missing(self) -> str | None:
        if not _INSTALLED:
            return "Triton is not installed: pip install 'moesaic[triton]' (on Linux)"
        if _INTERPRETED:
            return None
        if torch.version.hip is not None or not torch.cuda.is_available():
            return "there is no NVIDIA GPU that PyTorch can use"
        return None

    def refusal(self, x_TD: Tensor, weights: ExpertWeights) -> str | None:
        device = x_TD.device
        if device.type != "cuda" and not (_INTERPRETED and device.type == "cpu"):
            return f"it computes on NVIDIA GPUs, and this call is on {device.type}"
        if missing := self.missing():
            return missing
        if device.type == "cuda" and torch.cuda.get_device_properties(device).major < _CAPABILITY:
            return f"it needs a GPU of compute capability {_CAPABILITY}.0 or newer"
        if x_TD.dtype not in _DTYPES:
            return f"it computes in {', '.join(str(dtype) for dtype in _DTYPES)}, not in {x_TD.dtype}"
        if weights.format is not None:
            return f"it multiplies floats, and the weights are {weights.format.name} codes"
        if weights.post_norm is not None:
            return "it has no norm after the experts"
        return None

    def run(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
        order = (dispatch.permutation, dispatch.inverse, dispatch.offsets)
        weights_TK = dispatch.weights.contiguous()
        if _differentiated(x_TD, weights_TK, *weights.tensors().values()) or weights.activation.name not in _FUSED:
            h_NG: Tensor = Up.apply(x_TD, weights.up_EDG(), weights.up_bias, *order)  # type: ignore[no-untyped-call]
            h_NF = weights.activation.apply(h_NG)
        else:
            h_NF = torch.ops.moesaic.triton_matmul(
                x_TD, weights.up_EDG(), weights.up_bias, *order, None, True, False, weights.activation.name
            )
        out_TD: Tensor = Down.apply(h_NF, weights.down_EFD(), weights.down_bias, weights_TK, *order)  # type: ignore[no-untyped-call]
        return out_TD


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


BACKENDS.register("triton")(TritonBackend())
