"""The readable reference: one expert after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.dispatch import Dispatch
from moesaic.experts.backend import BACKENDS, Backend
from moesaic.experts.weights import ExpertWeights


class LoopBackend(Backend):
    """A Python loop over the experts that have rows; runs everything, everywhere, and judges the other backends."""

    preference = 0

    def run(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
        x_ND = dispatch.gather(x_TD)
        outputs, start = [], 0
        for expert, end in enumerate(dispatch.offsets.tolist()):
            if end == start:
                continue
            h_NG = F.linear(x_ND[start:end], weights.up_GD(expert, x_ND.dtype), _bias(weights.up_bias, expert))
            h_NF = weights.activation.apply(h_NG)
            y_ND = F.linear(h_NF, weights.down_DF(expert, x_ND.dtype), _bias(weights.down_bias, expert))
            outputs.append(y_ND if weights.post_norm is None else weights.post_norm(y_ND))
            start = end
        outputs.append(torch.zeros_like(x_ND[start:]))  # the rows that belong to nobody
        return dispatch.combine(torch.cat(outputs))


def _bias(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


BACKENDS.register("loop")(LoopBackend())
