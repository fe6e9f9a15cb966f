"""Whether all ranks hold the same: found out before anything is sharded, when nobody could tell any more.

W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesaic.errors import ConfigError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VALUES = ": values "


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Shape, dtype, and a number that depends on every bit, of each parameter and buffer, by name; reads them once.

    Raises:
        ConfigError: for one that has no values, being on the meta device.
    """
    told = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(f"{name} is on the meta device and has no values: load the weights first")
        trained = ", trained" if tensor.requires_grad else ""
        told[name] = f"{list(tensor.shape)} {tensor.dtype}{trained}{_VALUES}{_fingerprint(tensor.detach()):x}"
    return told


def check_alike(told: Mapping[str, str], group: Any) -> None:
    """Compare what ranks say of themselves with what the first one says; a collective call.

    Args:
        told: what must be alike, by name.

    Raises:
        ConfigError: on every rank, with the first rank that differs and the first thing in which it does.
    """
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, dict(told), group=group)
    ranks = dist.get_process_group_ranks(group)
    first = gathered[0]
    for rank, other in zip(ranks[1:], gathered[1:], strict=True):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                difference = _difference(other.get(name), first.get(name))
                raise ConfigError(
                    f"rank {rank} differs from rank {ranks[0]} in {name} ({difference}): "
                    "all ranks must begin with the same weights and settings"
                )


def _fingerprint(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.itemsize])
    rows = bits.view(len(tensor) if tensor.ndim else 1, -1).sum(dim=1, dtype=torch.int64)
    # By place, or rows could change theirs unnoticed; overflow does no harm.
    places = torch.arange(1, 2 * len(rows), 2, device=rows.device)
    return int((rows * places).sum()) & 0xFFFFFFFFFFFFFFFF


def _difference(text: str | None, wanted: str | None) -> str:
    kind, values, _ = (text or "").rpartition(_VALUES)
    if values and (wanted or "").rpartition(_VALUES)[0] == kind:
        return (
            "other values: set the same seed before building it, as by torch.manual_seed(0), or load the same "
            "checkpoint on every rank"
        )
    return f"{_brief(text)} instead of {_brief(wanted)}"


def _brief(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= 80 else f"{text[:77]}..."
