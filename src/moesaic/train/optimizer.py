"""AdamW with decay where it belongs, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from moesaic.train.recipe import TrainSettings


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Decoupled Weight Decay Regularization, algorithm 2) of the parameters that require a gradient, in two
    groups.

    Decay is for weight matrices, the router's and the experts' included. Norms and biases have a scale of their own,
    and a row of the embedding would shrink whenever its token is absent: these are left alone.
    """
    kept = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in kept
        (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)


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
