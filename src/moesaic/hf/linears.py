"""A model's linear layers on the native kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moesaic.eager import is_eager
from moesaic.experts.native import linear
from moesaic.experts.row_invariance import is_row_invariant
from moesaic.experts.width import WidthProjection

Module = TypeVar("Module", bound=nn.Module)


def use_native_linears(model: nn.Module) -> int:
    """Let the linear layers of a model that lie on a CPU run on the native kernels, in place; how many do.

    They are faster than PyTorch's for the few rows of a decode step (a third to a half of its time for one row, in
    float32 a quarter for four to sixteen), and can be row-invariant. Nor is code generated, and kept, for every new
    number of rows: half a megabyte each in bfloat16. Routers that multiply by a weight of their own do as linear layers
    do. Where gradients are recorded or the call is traced a layer computes as before.
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and _is_native(module):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]
            changed += 1
        elif _is_router(module) and "forward" not in module.__dict__:
            module.forward = partial(_forward_router, module)
            changed += 1
    return changed


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` of its own that somebody else than :func:`use_native_linears` has set."""
    forward = module.__dict__.get("forward")
    ours = isinstance(forward, partial) and forward.func in (_forward, _forward_router) and forward.args == (module,)
    return forward is not None and not ours


def shared_copy(module: Module) -> Module:
    """A copy that shares all tensors and parts of a module, and computes by its own attributes."""
    made = copy.copy(module)
    if "forward" in made.__dict__ and not is_wrapped(module):
        del made.__dict__["forward"]  # that of ``module``
        use_native_linears(made)
    return made


def _is_native(module: nn.Linear) -> bool:
    # Not other subclasses: those of other libraries keep their weights in ways of their own.
    known = type(module) in (nn.Linear, WidthProjection)
    return known and linear.refusal(module.weight, module.weight, module.bias) is None


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return _linear(x, module.weight, module.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")) and is_eager(x, weight)
    if not plain or linear.refusal(x, weight, bias):
        return F.linear(x, weight, bias)
    return linear.linear(x, weight, bias, row_invariant=is_row_invariant())


def _is_router(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own that a method of it multiplies by."""
    weight = module._parameters.get("weight")
    own = not isinstance(module, nn.Linear) and isinstance(weight, nn.Parameter) and weight.ndim == 2
    kinds = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    return own and any(
        any(name.endswith("linear") for name in method.__code__.co_names)  # PyTorch's, or ours in float32
        for kind in kinds
        for method in vars(kind).values()
        if isinstance(method, FunctionType)
    )


def _forward_router(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return type(module).forward(module, *args, **kwargs)
    with _NativeLinears():
        return type(module).forward(module, *args, **kwargs)


class _NativeLinears(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_linear if function is F.linear else function)(*args, **(kwargs or {}))
