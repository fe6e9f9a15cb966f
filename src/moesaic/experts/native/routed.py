"""Routes and experts in one native call, for a few tokens: what one costs beside the reading of weights is Python.

T tokens · D model width · E experts · K slots per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.experts.native import call, library
from moesaic.experts.native.call import Arguments
from moesaic.experts.weights import ExpertWeights
from moesaic.routing.gate import Gate


class Routed(NamedTuple):
    """What a call gives.

    Args:
        y_TD: ``[T, D]`` in the dtype of the features.
        expert_ids, weights, scores, logits: as :class:`moesaic.Routing` has them.
        counts: ``[E]`` int64, the rows of each expert.
    """

    y_TD: Tensor
    expert_ids: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor
    counts: Tensor


class RoutedLayer:
    """The weights of a layer's experts, made ready for such calls; it holds them alive.

    Args:
        weights: what the backend ``native`` does not refuse.
        dtype: of features and gate.
    """

    def __init__(self, weights: ExpertWeights, dtype: torch.dtype) -> None:
        self.num_experts, self.d_model = weights.num_experts, weights.d_model
        nothing = torch.empty(0, dtype=torch.int64)
        up_bias, down_bias, up_scale, down_scale = (
            each if each is None else each.contiguous()
            for each in (weights.up_bias, weights.down_bias, weights.up_scale, weights.down_scale)
        )
        self._kept = (weights, up_bias, down_bias, up_scale, down_scale)
        self._layer = call.describe(
            Arguments(
                torch.empty(0, weights.d_model, dtype=dtype),
                nothing,
                nothing,
                torch.empty(0, 1, dtype=torch.float32),
                weights.up,
                weights.down,
                up_bias,
                down_bias,
                up_scale,
                down_scale,
                weights.transposed,
                weights.activation.name,
                weights.format.group if weights.format is not None else 0,
            )
        )

    def run(self, x_TD: Tensor, gate: Gate, top_k: int, mask_T: Tensor | None = None) -> Routed:
        """Decide and compute.

        Args:
            x_TD: ``[T, D]``, the features contiguous. gate: its tensors contiguous; weight, bias and unit_scale in the
                dtype of the features.
            mask_T: ``[T]`` boolean, contiguous, False for tokens that get no expert.
        """
        tokens, num_experts = x_TD.shape[0], self.num_experts
        found = Routed(
            torch.empty_like(x_TD, memory_format=torch.contiguous_format),
            torch.empty((tokens, top_k), dtype=torch.int64),
            torch.empty((tokens, top_k), dtype=torch.float32),  # whatever PyTorch's default is
            torch.empty((tokens, num_experts), dtype=torch.float32),
            torch.empty((tokens, num_experts), dtype=torch.float32),
            torch.empty(num_experts, dtype=torch.int64),
        )
        layer = library.Layer.from_buffer_copy(self._layer)
        layer.tokens, layer.top_k, layer.threads = tokens, top_k, torch.get_num_threads()
        layer.x, layer.x_stride, layer.out = x_TD.data_ptr(), x_TD.stride(0), found.y_TD.data_ptr()
        library.route_and_forward(
            library.Gate(
                gate.weight.data_ptr(),
                *(each if each is None else each.data_ptr() for each in (gate.bias, gate.selection, gate.unit_scale)),
                None if mask_T is None else mask_T.data_ptr(),
                library.SCORES[gate.scores],
                gate.normalize,
                gate.epsilon,
                gate.scale,
                found.logits.data_ptr(),
                found.scores.data_ptr(),
                found.expert_ids.data_ptr(),
                found.weights.data_ptr(),
                found.counts.data_ptr(),
            ),
            layer,
        )
        return found
