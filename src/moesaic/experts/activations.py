"""What stands between an expert's up and down projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from moesaic.registry import Registry

ACTIVATIONS: Registry[Activation] = Registry("activation")


@dataclass(frozen=True)
class Activation:
    """``[N, G]`` to ``[N, F]``.

    Args:
        name: a name of ``ACTIVATIONS`` (concatenated layout: the gate's columns, then the up projection's), by which a
            kernel may fuse it; ``"custom"`` where only ``apply`` knows what is computed.
        gated: whether G is 2F (a gate and an up projection in one matrix) or F.
        apply: the function itself, on a tensor of any floating dtype.
    """

    name: str
    gated: bool
    apply: Callable[[Tensor], Tensor]


def _gated(function: Callable[[Tensor], Tensor], h_NG: Tensor) -> Tensor:
    gate_NF, up_NF = h_NG.chunk(2, dim=-1)
    return function(gate_NF) * up_NF


def _gelu_tanh(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


# GLU Variants Improve Transformer, equations 5 and 6, for the gated ones.
for _name, _gate, _function in (
    ("swiglu", True, F.silu),
    ("geglu", True, F.gelu),
    ("geglu_tanh", True, _gelu_tanh),
    ("relu", False, F.relu),
    ("gelu", False, F.gelu),
    ("gelu_tanh", False, _gelu_tanh),
):
    # A partial, not a closure: a module that holds one can be pickled.
    ACTIVATIONS.register(_name)(Activation(_name, _gate, partial(_gated, _function) if _gate else _function))
