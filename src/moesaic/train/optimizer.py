"""AdamW with decay where it belongs, the gradient's norm, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.train.recipe import TrainSettings


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Decoupled Weight Decay Regularization, algorithm 2) of the parameters that require a gradient, in groups
    with and without decay.

    Decay is for weight matrices, the router's and the experts' included. Norms and biases have a scale of their own,
    and a row of the embedding would shrink whenever its token is absent: these are left alone.
    """
    kept = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    # One fused kernel takes tensors of one device mesh, or plain ones.
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in kept
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((is_matrix, mesh), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: not group[0][0])
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": settings.weight_decay if decays else 0.0}
            for (decays, _), members in ordered
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """What this rank holds of the gradients: of sharded ones its shard, without those of which it holds nothing."""
    held = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in held]
    return [gradient for gradient in local if gradient.numel()]


def clip(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients in place so that their norm, which is ``norm`` now, is at most ``limit``; 0 leaves them alone.

    It is PyTorch's ``clip_grads_with_norm_``, which takes no part of a gradient.
    """
    if limit and gradients:
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Of step ``step``, counted from 0: linear warm-up, then half a cosine down to ``final_learning_rate`` of the peak.

    Source of the decay: SGDR, equation 5, without restarts.
    """
    peak, warmup = settings.learning_rate, settings.warmup
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    floor = settings.final_learning_rate
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
