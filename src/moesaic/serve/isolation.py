"""Batch isolation: a request's numbers do not depend on what else is in its batch, bit for bit.

Rows of a matrix product, and elements of a vectorized function, are added up or rounded in ways that depend on how many
there are and where they stand. So somebody who shares a batch can change, if only by a bit, what another's model says:
enough for sampled tokens to part ways, and a channel between requests. (*Architectural backdoors for within-batch data
stealing and model inference manipulation* shows what a model can be made to do with such a channel, and asks for a
proof that no row reads another.) In here every row is computed as if it were alone:

* linear layers and experts: the native kernels, which add up in one order for any number of rows (experts with an
  activation that these do not have: the backend ``loop`` over such linear layers);
* attention: the native kernel, in the order of positions, however a prompt was cut into chunks;
* element-wise functions whose vectorized and plain versions round differently: in pieces that are all vectorized;
* norms, softmax, top-k and the like go row by row in PyTorch already (tests hold that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moesaic.errors import UnsupportedError
from moesaic.experts.native import library, linear
from moesaic.experts.row_invariance import row_invariant

# PyTorch takes whole vectors in steps of at most 64 elements, and shares out what has more than these to threads.
_STEP = 64
_PIECE = 1 << 15
_PIECES = {F.gelu: 1 << 11}


def refusal(model: nn.Module) -> str | None:
    """Why a model cannot be isolated here, or None."""
    if reason := library.missing():
        return f"isolation needs the native kernels: {reason}"
    if any(not parameter.is_cpu for parameter in model.parameters()):
        return "isolation is for models on a CPU"
    if other := {parameter.dtype for parameter in model.parameters()} - set(library.FLOATS):
        return f"isolation is for float32, bfloat16 and float16, and the model has parameters of {other.pop()}"
    return None


@contextmanager
def isolated() -> Iterator[None]:
    """Compute row by row in a ``with`` block; attention is the caller's part.

    Raises:
        UnsupportedError: where an operation is met that mixes rows in a way that is not known to be safe.
    """
    with row_invariant(), _Isolated():
        yield


class _Isolated(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        replacement = _REPLACED.get(function)
        if replacement is None:
            return function(*args, **(kwargs or {}))
        return replacement(function, *args, **(kwargs or {}))


def _linear(_: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if reason := linear.refusal(x, weight, bias):
        raise UnsupportedError(f"a linear layer cannot be isolated: {reason}")
    return linear.linear(x, weight, bias, row_invariant=True)


def _matmul(function: Callable[..., Tensor], x: Tensor, other: Tensor) -> Tensor:
    if other.ndim == 2 and x.ndim >= 2 and x.dtype.is_floating_point:
        return _linear(function, x, other.t())
    # One product a sum, as rotary embeddings have it, has one order; with more inputs the order is not ours.
    if x.shape[-1] == 1:
        return function(x, other)
    raise UnsupportedError(
        f"a product of {list(x.shape)} and {list(other.shape)} cannot be isolated: "
        "only products with one matrix for all tokens are known to be safe"
    )


def _addmm(function: Callable[..., Tensor], bias: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return _linear(function, x, other.t(), bias)


def _elementwise(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``function(x)`` in pieces that are whole vectors and too small for several threads."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point or kwargs.get("inplace"):
        return function(x, *args, **kwargs)
    size = x.numel()
    flat = F.pad(x.reshape(-1), (0, -size % _STEP))
    parts = [function(piece, *args, **kwargs) for piece in flat.split(_PIECES.get(function, _PIECE))]
    return torch.cat(parts)[:size].view(x.shape)


def _power(function: Callable[..., Tensor], x: Tensor, exponent: Any) -> Tensor:
    # Squares and the like are products.
    return _elementwise(function, x, exponent) if isinstance(exponent, float) else function(x, exponent)


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), _matmul
    ),
    **dict.fromkeys(
        (
            F.silu,
            F.gelu,
            F.softplus,
            F.sigmoid,
            F.logsigmoid,
            F.mish,
            F.hardswish,
            F.elu,
            F.tanh,
            torch.sigmoid,
            torch.tanh,
            torch.exp,
            torch.rsqrt,
            torch.special.expit,
            Tensor.sigmoid,
            Tensor.tanh,
            Tensor.exp,
            Tensor.rsqrt,
        ),
        _elementwise,
    ),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _power),
}
