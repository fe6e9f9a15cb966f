"""Tutel's MoE layer as a contender: https://github.com/microsoft/tutel, built for CPUs.

T tokens · D model width · E experts · F expert hidden width.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from importlib import util

import torch
from torch import distributed, nn

from moesaic.bench.parallel.work import Work
from moesaic.layer import MoE

PATH_VARIABLE = "MOESAIC_TUTEL_PATH"


def missing() -> str | None:
    """Why Tutel cannot take part, or None."""
    _look_there()
    if util.find_spec("tutel") is None:
        return (
            f"tutel is not installed, and {PATH_VARIABLE} names no folder with its source, built in place by "
            "`NO_CUDA=1 python setup.py build_ext --inplace`"
        )
    if util.find_spec("tutel_custom_kernel") is None:
        return "tutel's extension is not built: `NO_CUDA=1 python setup.py build_ext --inplace`"
    return None


def tutel_layer(whole: MoE, work: Work, capacity_factor: float) -> nn.Module:
    """Tutel's layer with this rank's share of the weights and with the gate of ``whole``; SwiGLU, fp32.

    Args:
        capacity_factor: 0 is dropless in Tutel as here: each expert's rows are padded to as many as the fullest has.
    """
    _look_there()
    moe_layer = importlib.import_module("tutel.moe").moe_layer
    logging.getLogger().setLevel(logging.ERROR)  # it logs at every step otherwise
    rank, size = distributed.get_rank(), distributed.get_world_size()
    own = work.num_experts // size
    layer: nn.Module = moe_layer(
        gate_type={"type": "top", "k": work.top_k, "capacity_factor": capacity_factor, "fp32_gate": True},
        model_dim=work.d_model,
        experts={"type": "llama_ffn", "num_experts_per_device": own, "hidden_size_per_expert": work.d_ff},
        scan_expert_func=None,
    )
    bank, F = whole.experts, work.d_ff  # noqa: N806
    mine = slice(rank * own, (rank + 1) * own)
    values = {
        "experts.W_fc1": bank.up[mine, :F].transpose(1, 2),
        "experts.W_fc2": bank.up[mine, F:].transpose(1, 2),
        "experts.W_fc3": bank.down[mine].transpose(1, 2),
        "gates.0.wg.weight": whole.router.weight,
    }
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(values.pop(name).reshape(parameter.shape))
    return layer


def _look_there() -> None:
    folder = os.environ.get(PATH_VARIABLE)
    if folder and folder not in sys.path:
        sys.path.append(folder)
