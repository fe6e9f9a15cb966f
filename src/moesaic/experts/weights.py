"""The weights of E experts as plain tensors: what every backend takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import UnsupportedError
from moesaic.experts.activations import Activation
from moesaic.experts.low_rank import LowRank
from moesaic.experts.quantized import QuantFormat, QuantizedMatrix


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
        format: None where ``up`` and ``down`` are floats; else they are codes and the two scales are there too, all
            shaped as :class:`QuantFormat` says, and never transposed.
        up_scale, down_scale: the scales of quantized weights, or None.
        low_rank: adapters' parts, which no backend computes, but :func:`compute_and_tell` does; or None.
        base_experts: where experts of adapters follow those of a base, how many the base has; else None.
    """

    up: Tensor
    down: Tensor
    activation: Activation
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    transposed: bool = False
    post_norm: Callable[[Tensor], Tensor] | None = None
    format: QuantFormat | None = None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    low_rank: LowRank | None = None
    base_experts: int | None = None

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    @property
    def d_model(self) -> int:
        return self.down.shape[2 if self.transposed else 1]

    @property
    def d_ff(self) -> int:
        if self.format is None:
            return self.down.shape[1 if self.transposed else 2]
        return self.up.shape[1] // 2 if self.activation.gated else self.up.shape[1]

    def up_EDG(self) -> Tensor:
        """``[E, D, G]``, as the right factor of a matmul (a view); only of float weights."""
        self._refuse_codes()
        return self.up if self.transposed else self.up.transpose(1, 2)

    def down_EFD(self) -> Tensor:
        """``[E, F, D]``, as the right factor of a matmul (a view); only of float weights."""
        self._refuse_codes()
        return self.down if self.transposed else self.down.transpose(1, 2)

    def up_codes(self) -> QuantizedMatrix:
        """``up`` of quantized weights, D to G features."""
        assert self.format is not None and self.up_scale is not None
        return QuantizedMatrix(self.format, self.up, self.up_scale, self.d_model)

    def down_codes(self) -> QuantizedMatrix:
        """``down`` of quantized weights, F to D features."""
        assert self.format is not None and self.down_scale is not None
        return QuantizedMatrix(self.format, self.down, self.down_scale, self.d_ff)

    def up_GD(self, expert: int, dtype: torch.dtype) -> Tensor:
        """``[G, D]``: one expert's; a view of float weights, which are in ``dtype`` already, else dequantized to it."""
        if self.format is not None:
            return self.up_codes()[expert : expert + 1].dequantize(dtype)[0]
        return self.up_EDG()[expert].t()

    def down_DF(self, expert: int, dtype: torch.dtype) -> Tensor:
        """``[D, F]``: as :meth:`up_GD`."""
        if self.format is not None:
            return self.down_codes()[expert : expert + 1].dequantize(dtype)[0]
        return self.down_EFD()[expert].t()

    def dequantize(self, dtype: torch.dtype) -> ExpertWeights:
        """Quantized weights as floats of ``dtype``, all experts at once; float weights as :meth:`to` gives them."""
        if self.format is None:
            return self.to(dtype)
        plain = replace(
            self,
            up=self.up_codes().dequantize(dtype),
            down=self.down_codes().dequantize(dtype),
            format=None,
            up_scale=None,
            down_scale=None,
        )
        return plain.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that share the layer's dtype, by name: not the codes and scales of quantized weights."""
        named = {"up": self.up, "down": self.down, "up_bias": self.up_bias, "down_bias": self.down_bias}
        codes = ("up", "down") if self.format is not None else ()
        return {name: tensor for name, tensor in named.items() if tensor is not None and name not in codes}

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """The same weights in ``dtype``, themselves where they all are in it already; codes and scales stay."""
        if all(tensor.dtype == dtype for tensor in self.tensors().values()):
            return self
        converted: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in self.tensors().items()}
        return replace(self, **converted)

    def _refuse_codes(self) -> None:
        if self.format is not None:
            raise UnsupportedError(f"the weights are {self.format.name} codes: there is no float matrix to view")
