"""How alike the experts of a layer are: in their weights, and in what they make of the same tokens.

T tokens · D model width · E experts. A cosine is 1 for the same direction, 0 for nothing in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.errors import UnsupportedError
from moesaic.experts import ExpertBank, ExpertWeights
from moesaic.hf.experts import weights_of
from moesaic.inspect.trace import FloatArray

SAMPLE = 64
"""Tokens, evenly spread over the first forward, on which experts' outputs are compared."""

_CHUNK = 1 << 18
"""Columns of the flattened matrices that are turned into float32 at a time."""


def expert_output(x_ND: Tensor, weights: ExpertWeights, expert: int) -> Tensor:
    """``[N, D]``: one expert's outputs for these rows, before any routing weight; in the dtype of ``x_ND``."""
    up_bias, down_bias = (None if b is None else b[expert] for b in (weights.up_bias, weights.down_bias))
    h_NF = weights.activation.apply(F.linear(x_ND, weights.up_GD(expert, x_ND.dtype), up_bias))
    y_ND = F.linear(h_NF, weights.down_DF(expert, x_ND.dtype), down_bias)
    return y_ND if weights.post_norm is None else weights.post_norm(y_ND)


@torch.no_grad()
def output_cosines(x_TD: Tensor, banks: Sequence[ExpertWeights]) -> Tensor:
    """``[E, E]`` float64: mean over the tokens of cos(f_i(x), f_j(x)), all experts given the same tokens.

    An output of zeros has cosine 0 with everything, itself too.

    Args:
        banks: the layer's experts, those of unequal width in banks one after the other.
    """
    outputs = (expert_output(x_TD, bank, expert).float() for bank in banks for expert in range(bank.num_experts))
    directions_ETD = torch.stack([y / y.norm(dim=-1, keepdim=True).clamp(min=1e-30) for y in outputs])
    flat_EN = directions_ETD.flatten(1)
    return (flat_EN @ flat_EN.t()).double() / max(1, len(x_TD))


@torch.no_grad()
def weight_cosines(weights: ExpertWeights) -> Tensor:
    """``[E, E]`` float64: cosine of the experts' matrices (gate, up and down as one long vector).

    Two experts with the same neurons in another order compute the same, but are not alike here. Experts that began as
    copies of one feed-forward (upcycled ones) stay alike for long; others have cosines near 0.
    """
    plain = weights if weights.format is None else weights.dequantize(torch.float32)
    return cosines([plain.up.flatten(1), plain.down.flatten(1)])


def cosines(pieces: Iterable[Tensor]) -> Tensor:
    """``[E, E]`` float64: cosines of E vectors given in pieces ``[E, N]``; zeros have cosine 0 with everything."""
    gram_EE: Tensor | None = None
    for piece_EN in pieces:
        for start in range(0, piece_EN.shape[1], _CHUNK):
            part_EN = piece_EN[:, start : start + _CHUNK].detach().float()
            part_EE = (part_EN @ part_EN.t()).double().cpu()
            gram_EE = part_EE if gram_EE is None else gram_EE + part_EE
    assert gram_EE is not None
    norm_E = gram_EE.diagonal().sqrt().clamp(min=1e-30)
    return gram_EE / (norm_E[:, None] * norm_E)


class Likeness:
    """Compares the experts of one layer when it first runs; ``found`` is ``[E, E]`` by name, as in a
    :class:`~moesaic.inspect.trace.LayerTrace`.

    Nothing is found for experts that are sharded over ranks, or stored in a way that is not known; no ``"weights"`` for
    experts of unequal width.

    Args:
        banks: the modules that hold the experts, in the order of their ids.
    """

    def __init__(self, banks: Sequence[nn.Module]) -> None:
        self.found: dict[str, FloatArray] = {}
        self._banks = banks
        self._is_done = False

    def watch(self) -> Any:
        """Put a hook on the experts; returns its handle."""
        return self._banks[0].register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x_TD = args[0] if args else next(iter(kwargs.values()))
        if self._is_done or not len(x_TD):
            return
        self._is_done = True
        try:
            weights = [bank.weights() if isinstance(bank, ExpertBank) else weights_of(bank) for bank in self._banks]
        except UnsupportedError:
            return
        x_SD = x_TD[:: max(1, len(x_TD) // SAMPLE)][:SAMPLE]
        self.found["outputs"] = output_cosines(x_SD, weights).cpu().numpy()
        if len(weights) == 1:
            self.found["weights"] = weight_cosines(weights[0]).numpy()
