"""The cross entropy of a language model, a part of the logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements whose float32 copies go through log-softmax at once: what a core's cache holds, or what keeps a GPU busy.
# On a CPU this halves the time of the loss, forward and backward, against all logits at once.
_AT_ONCE = {"cpu": 1 << 19}
_AT_ONCE_ELSEWHERE = 1 << 27


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats, float32 ``[B, S]``, whatever the dtype of the logits.

    Args:
        logits: ``[B, S, V]``. targets: ``[B, S]`` int64.
    """
    rows_NV, targets_N = logits.flatten(0, 1), targets.flatten()
    size = rows_at_once(rows_NV)
    parts = zip(rows_NV.split(size), targets_N.split(size), strict=True)
    return torch.cat([F.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in parts]).view_as(
        targets
    )


def rows_at_once(rows_NV: Tensor) -> int:
    """How many rows of logits go through log-softmax at a time, at least one."""
    return max(1, _AT_ONCE.get(rows_NV.device.type, _AT_ONCE_ELSEWHERE) // rows_NV.shape[1])
