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
from contextlib import contextmanager, nullcontext
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
def isolated(functions: bool = True) -> Iterator[None]:
    """Compute row by row in a ``with`` block; attention is the caller's part.

    Args:
        functions: watch every function that is called. A model for which :func:`needs_no_functions` may go without,
            which saves a call in Python for each of them.

    Raises:
        UnsupportedError: where an operation is met that mixes rows in a way that is not known to be safe.
    """
    with row_invariant(), _Isolated() if functions else nullcontext():
        yield


def needs_no_functions(forward: Callable[[], object]) -> bool:
    """Whether a model's linear layers run on the native kernels and nothing else that it calls has to be replaced.

    Args:
        forward: a pass of the model; what it calls must not depend on the tokens.
    """
    with row_invariant(), _Isolated() as seen:
        forward()
    return not seen.replaced


class _Isolated(TorchFunctionMode):
    """Replaces functions in which rows, or places, matter; ``replaced`` says whether there were any."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced = False

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        replacement = _REPLACED.get(function)
        if replacement is None or _is_safe(function, *args):
            return function(*args, **(kwargs or {}))
        self.replaced = True
        return replacement(function, *args, **(kwargs or {}))


def _is_safe(function: Callable[..., Any], x: Any, other: Any = None, *_: Any) -> bool:
    """Whether a function that is replaced elsewhere gives a row the same bits anywhere in this call."""
    if function in _PRODUCTS:
        # One product a sum, as rotary embeddings have it, has one order.
        return bool(x.shape[-1] == 1)
    if function in _POWERS:
        return not isinstance(other, float)  # squares and the like are products
    # A square root and a division, each rounded as it has to be; in 16 bits it goes by another way.
    return function in _INVERSE_ROOTS and x.dtype in (torch.float32, torch.float64)


def _linear(_: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if reason := linear.refusal(x, weight, bias):
        raise UnsupportedError(f"a linear layer cannot be isolated: {reason}")
    return linear.linear(x, weight, bias, row_invariant=True)


def _matmul(function: Callable[..., Tensor], x: Tensor, other: Tensor) -> Tensor:
    if other.ndim == 2 and x.ndim >= 2 and x.dtype.is_floating_point:
        return _linear(function, x, other.t())
    raise UnsupportedError(
        f"a product of {list(x.shape)} and {list(other.shape)} cannot be isolated: "
        "only products with one matrix for all tokens are known to be safe"
    )


def _addmm(function: Callable[..., Tensor], bias: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return _linear(function, x, other.t(), bias)


def _mixed(function: Callable[..., Tensor], *_: Any, **__: Any) -> Tensor:
    raise UnsupportedError(f"{function.__name__} cannot be isolated: in which order it adds up is not known")


def _elementwise(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``function(x)`` in pieces that are whole vectors and too small for several threads."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point or kwargs.get("inplace"):
        return function(x, *args, **kwargs)
    size = x.numel()
    flat = F.pad(x.reshape(-1), (0, -size % _STEP))
    parts = [function(piece, *args, **kwargs) for piece in flat.split(_PIECES.get(function, _PIECE))]
    return torch.cat(parts)[:size].view(x.shape)


_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
_POWERS = {torch.pow, Tensor.pow, Tensor.__pow__}
_INVERSE_ROOTS = {torch.rsqrt, Tensor.rsqrt}
_REPLACED: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys(_PRODUCTS, _matmul),
    **dict.fromkeys(
        (
            torch.einsum,
            torch.tensordot,
            torch.baddbmm,
            torch.addbmm,
            torch.mv,
            torch.addmv,
            Tensor.baddbmm,
            Tensor.addbmm,
            Tensor.mv,
            Tensor.addmv,
            Tensor.addmm,
            F.bilinear,
            F.conv1d,
            F.scaled_dot_product_attention,
        ),
        _mixed,
    ),
    **dict.fromkeys(
        (
            *_POWERS,
            *_INVERSE_ROOTS,
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
            torch.special.expit,
            Tensor.sigmoid,
            Tensor.tanh,
            Tensor.exp,
        ),
        _elementwise,
    ),
}
