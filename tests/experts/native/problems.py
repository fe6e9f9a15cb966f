"""Calls of an expert layer with random numbers, and what they give in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic import Dispatch, Routing
from moesaic.experts import ACTIVATIONS, BACKENDS, ExpertWeights, QuantFormat
from moesaic.experts.native import library

needs_library = pytest.mark.skipif(library.missing() is not None, reason=f"no native kernels: {library.missing()}")
ISAS = [] if library.missing() else library.isas()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NAMES = ("x", "up", "down", "up_bias", "down_bias", "weights")


@dataclass
class Problem:
    """One call; ``ids`` of E or more are null slots."""

    tokens: int = 9
    d_model: int = 20
    d_ff: int = 12
    num_experts: int = 5
    top_k: int = 2
    activation: str = "swiglu"
    dtype: torch.dtype = torch.float32
    bias: bool = False
    transposed: bool = False  # [E, in, out] instead of [E, out, in]
    swapped: bool = False  # memory in the other order than the shape says
    capacity: float = 0.0
    null: float = 0.0  # the share of slots without an expert
    weights_dtype: torch.dtype = torch.float32
    seed: int = 0
    idle: frozenset[int] = field(default_factory=frozenset)  # experts that nobody takes

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        width = 2 * self.d_ff if ACTIVATIONS.get(self.activation).gated else self.d_ff
        self.x = normal(self.tokens, self.d_model)
        self.up = self._matrix(normal(self.num_experts, width, self.d_model) / self.d_model**0.5)
        self.down = self._matrix(normal(self.num_experts, self.d_model, self.d_ff) / self.d_ff**0.5)
        self.up_bias = normal(self.num_experts, width) if self.bias else None
        self.down_bias = normal(self.num_experts, self.d_model) if self.bias else None
        self.weights = torch.rand(self.tokens, self.top_k, generator=generator).to(self.weights_dtype)
        used = torch.tensor([e for e in range(self.num_experts) if e not in self.idle])
        chosen = torch.rand(self.tokens, self.num_experts, generator=generator)[:, used].argsort(1)[:, : self.top_k]
        null = torch.rand(self.tokens, self.top_k, generator=generator) < self.null
        self.ids = used[chosen].masked_fill(null, self.num_experts)
        self.format: QuantFormat | None = None

    def _matrix(self, w_EOI: Tensor) -> Tensor:
        w = w_EOI.transpose(1, 2).contiguous() if self.transposed else w_EOI
        return w.transpose(1, 2).contiguous().transpose(1, 2) if self.swapped else w

    def tensors(self) -> list[Tensor]:
        """What has a gradient, in the order of ``NAMES``, without the biases where there are none."""
        return [tensor for name in NAMES if (tensor := getattr(self, name)) is not None]

    def dispatch(self) -> Dispatch:
        routing = Routing(self.ids, self.weights, torch.ones(self.tokens, self.num_experts))
        return Dispatch.from_routing(routing, self.capacity)

    def quantize(self, name: str, group: int | None = None) -> None:
        """Store the weights in fewer bits."""
        self.format = QuantFormat.named(name, group)

    def expert_weights(self) -> ExpertWeights:
        activation = ACTIVATIONS.get(self.activation)
        floats = ExpertWeights(self.up, self.down, activation, self.up_bias, self.down_bias, self.transposed)
        if self.format is None:
            return floats
        up, down = (self.format.quantize(matrix.detach().to(self.dtype)) for matrix in (self.up, self.down))
        codes: dict[str, Any] = {"up": up.codes, "up_scale": up.scale, "down": down.codes, "down_scale": down.scale}
        return replace(floats, format=self.format, **codes)

    def copy(self, dtype: torch.dtype | None = None) -> Problem:
        """The same numbers, in other memory of the same strides, without a graph."""
        other = replace(self)
        for name in NAMES:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(other, name, torch.empty_like(tensor, dtype=dtype).copy_(tensor.detach()))
        other.ids, other.format = self.ids, self.format
        return other

    def part(self, first: int, last: int) -> Problem:
        """The same layer for some of the tokens."""
        other = self.copy()
        other.tokens = last - first
        other.x, other.weights, other.ids = (each[first:last] for each in (other.x, other.weights, other.ids))
        return other

    def run(self, backend: str = "native") -> Tensor:
        return BACKENDS.get(backend).run(self.x, self.dispatch(), self.expert_weights())

    def wanted(self) -> Tensor:
        """The output in float64."""
        double = self.copy(torch.float64)
        weights = double.expert_weights().dequantize(torch.float64)
        return BACKENDS.get("loop").run(double.x, double.dispatch(), weights)

    def gradients(self, backend: str, upstream: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Those of all :meth:`tensors`, for the sum of the output times ``upstream``, computed in ``dtype``."""
        leaves = self.copy(dtype)
        inputs = [tensor.requires_grad_() for tensor in leaves.tensors()]
        found = torch.autograd.grad(leaves.run(backend), inputs, upstream.to(leaves.x.dtype), materialize_grads=True)
        return list(found)


def error(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖; the plain norm where nothing is wanted."""
    assert got.shape == wanted.shape
    size = wanted.double().norm().item()
    return ((got.detach().double() - wanted.detach().double()).norm() / (size or 1.0)).item()
