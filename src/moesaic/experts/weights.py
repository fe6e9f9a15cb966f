"""The weights of E experts as plain tensors: what every backend takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.experts.activations import Activation


@dataclass
class ExpertWeights:
    """A view of expert weights in the layout in which transformers stores them; nothing is copied.

    Args:
        up: ``[E, G, D]``; gate and up projection, the gate's F columns first where the activation is a named gated one.
        down: ``[E, D, F]``.
        activation: ``[N, G]`` to ``[N, F]``.
        up_bias: ``[E, G]`` or None. down_bias: ``[E, D]`` or None.
        transposed: the matrices are stored as ``[E, D, G]`` and ``[E, F, D]`` instead.
        post_norm: applied to each expert's output rows ``[N, D]`` before they are weighted, or None.
    """

    up: Tensor
    down: Tensor
    activation: Activation
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    transposed: bool = False
    post_norm: Callable[[Tensor], Tensor] | None = None

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    def up_EDG(self) -> Tensor:
        """``[E, D, G]``, as the right factor of a matmul (a view)."""
        return self.up if self.transposed else self.up.transpose(1, 2)

    def down_EFD(self) -> Tensor:
        """``[E, F, D]``, as the right factor of a matmul (a view)."""
        return self.down if self.transposed else self.down.transpose(1, 2)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        named = {"up": self.up, "down": self.down, "up_bias": self.up_bias, "down_bias": self.down_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """The same weights in ``dtype``; themselves where they all are in it already."""
        if all(tensor.dtype == dtype for tensor in self.tensors().values()):
            return self
        converted: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in self.tensors().items()}
        return replace(self, **converted)
