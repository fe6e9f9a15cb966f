"""How near a model stays to another one, its parent: the same next token, and the distance between distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from moesaic.train.evaluate import DomainResult, result_of, windows_for
from moesaic.train.loss import rows_at_once, token_losses
from moesaic.train.precision import autocast


@dataclass(frozen=True)
class Agreement:
    """What a model keeps of its parent on one domain, both on the same tokens.

    Attributes:
        agreement: share of the predicted tokens where both hold the same next token for the most probable one.
        kl: KL(parent ‖ model) of the next token's distribution, mean over the predicted tokens, in nats.
        parent: the parent's own result.
        ratio: the model's perplexity over the parent's.
    """

    agreement: float
    kl: float
    parent: DomainResult
    ratio: float


@torch.no_grad()
def evaluate_against(
    model: nn.Module,
    parent: nn.Module,
    tokens: Mapping[str, npt.NDArray[Any]],
    *,
    sequence_length: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    precision: str = "fp32",
    bytes_per_token: Mapping[str, float] | None = None,
) -> tuple[dict[str, DomainResult], dict[str, Agreement]]:
    """What :func:`moesaic.train.evaluate.evaluate` tells of ``model``, and its agreement with ``parent``, by domain.

    Both models see the same windows; the arguments and what is raised are those of ``evaluate``. Both are left in the
    mode (training or not) in which they came. The logits of a batch are held for both models at once; what is
    compared of them is float32, some rows at a time.
    """
    windows = windows_for(
        (model, parent), tokens, sequence_length=sequence_length, batch_size=batch_size, max_tokens=max_tokens
    )
    device = next(model.parameters()).device
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in tokens}
    counts = dict.fromkeys(tokens, 0)
    modes = model.training, parent.training
    model.eval(), parent.eval()
    try:
        with autocast(device, precision):
            for domain, ids in windows:
                ids_on_device, targets = ids.to(device)[:, :-1], ids.to(device)[:, 1:]
                ours, theirs = (each(input_ids=ids_on_device, use_cache=False).logits for each in (model, parent))
                same, kl = compare_logits(ours, theirs)
                parts = token_losses(ours, targets), token_losses(theirs, targets), same, kl
                sums[domain] += torch.stack([part.double().sum().cpu() for part in parts])
                counts[domain] += targets.numel()
    finally:
        model.train(modes[0]), parent.train(modes[1])
    results, agreements = {}, {}
    for name, (loss, parent_loss, same_sum, kl_sum) in ((name, total.tolist()) for name, total in sums.items()):
        count, width = counts[name], (bytes_per_token or {}).get(name)
        results[name], told = result_of(loss, count, width), result_of(parent_loss, count, width)
        gap = results[name].loss - told.loss
        ratio = math.exp(gap) if gap < 700 else math.inf
        agreements[name] = Agreement(same_sum / count, kl_sum / count, told, ratio)
    return results, agreements


def compare_logits(logits: Tensor, parent_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the most probable token is the same, bool ``[B, S]``, and KL(parent ‖ model) in nats, float32 ``[B, S]``.

    Args:
        logits, parent_logits: ``[B, S, V]``, of any dtype.
    """
    ours_NV, theirs_NV = logits.flatten(0, 1), parent_logits.flatten(0, 1)
    same, kl = [], []
    size = rows_at_once(ours_NV)
    for ours, theirs in zip(ours_NV.split(size), theirs_NV.split(size), strict=True):
        same.append(ours.argmax(-1) == theirs.argmax(-1))
        log_p, log_q = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
    shape = logits.shape[:-1]
    return torch.cat(same).view(shape), torch.cat(kl).view(shape)
