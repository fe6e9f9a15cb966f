"""Low-rank parts of experts that were linear layers of their own when they were trained (transformers before 5).

There each expert had its gate, up and down projection; now a layer's are one parameter ``gate_up_proj`` and one
``down_proj``. The parts of a gate and of an up projection become one of both: their A below one another, and their B
in two blocks on the diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from moesaic.adapters.lora import LoraPart, Target
from moesaic.errors import CheckpointError

_EXPERT = re.compile(r"(?P<layer>.*\blayers\.\d+)\..*\bexperts\.(?P<expert>\d+)\.(?P<matrix>\w+)")
# What each matrix is in its expert: the gate and the up projection share a parameter, in this order.
_UP, _DOWN = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1}, ("w2", "down_proj")


def find_fused(path: str, targets: Mapping[str, Target]) -> tuple[Target, int, int]:
    """What has become of an expert's own linear layer: the fused parameter, the expert, and the place in its rows.

    Raises:
        CheckpointError: where it is of no expert, or the base keeps gate and up otherwise than one after the other.
    """
    met = _EXPERT.fullmatch(path)
    stack = [] if met is None else _experts_of(met["layer"], targets)
    if met is None or met["matrix"] not in (*_UP, *_DOWN) or len(stack) != 2:
        raise CheckpointError(f"it has a part for {path}: the base has no such linear layer or targeted experts")
    up, down = stack
    if met["matrix"] in _DOWN:
        return down, int(met["expert"]), 0
    if not getattr(up.module, "is_concatenated", True):
        raise CheckpointError(f"it has a part for {path}, but the base keeps gate and up interleaved")
    has_gate = up.outputs > down.inputs
    return up, int(met["expert"]), _UP[met["matrix"]] if has_gate else 0


def fuse(single: Mapping[str, LoraPart], targets: Mapping[str, Target]) -> dict[str, LoraPart]:
    """The parts of experts' own linear layers (by module path) as parts of the fused parameters (by full name).

    Raises:
        CheckpointError: as :func:`find_fused`, and for a part of another shape.
    """
    found: dict[str, dict[int, dict[int, LoraPart]]] = {}
    for path, part in single.items():
        target, expert, place = find_fused(path, targets)
        found.setdefault(target.name, {}).setdefault(expert, {})[place] = part
    return {name: _stack(targets[name], experts) for name, experts in found.items()}


def _experts_of(layer: str, targets: Mapping[str, Target]) -> list[Target]:
    """Up and down of the one experts module of a layer."""
    return [each for each in targets.values() if each.num_experts is not None and each.path.startswith(f"{layer}.")]


def _stack(target: Target, experts: Mapping[int, Mapping[int, LoraPart]]) -> LoraPart:
    ids, every = sorted(experts), [part for parts in experts.values() for part in parts.values()]
    rank, scaling = max(part.rank for part in every), max(part.scaling for part in every)
    height = every[0].b.shape[0]
    blocks = target.outputs // height
    a = every[0].a.new_zeros(len(ids), blocks * rank, target.inputs)
    b = every[0].b.new_zeros(len(ids), target.outputs, blocks * rank)
    for index, expert in enumerate(ids):
        for place, part in experts[expert].items():
            columns = slice(place * rank, place * rank + part.rank)
            _put(a[index, columns], part.a, target)
            weight = part.scaling / scaling if scaling else 1.0
            _put(b[index, place * height : (place + 1) * height, columns], part.b * weight, target)
    return LoraPart(a, b, scaling, tuple(ids))


def _put(room: Tensor, matrix: Tensor, target: Target) -> None:
    if room.shape != matrix.shape:
        raise CheckpointError(
            f"a part of one expert of {target.name} is {list(matrix.shape)}, but must be {list(room.shape)}"
        )
    room.copy_(matrix)
