"""How a module keeps matrices of experts as floats or, after :func:`quantize_parameter`, as codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from moesaic.experts.quantized import QuantFormat, QuantizedMatrix

# A dtype of the same width that no conversion of a module's floats touches.
_UNTOUCHED = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class ExpertStorage(nn.Module):
    """A module whose expert matrices may be quantized: ``name`` then is no parameter any more, but two buffers,
    ``name_codes`` and ``name_scale``, as :class:`QuantFormat` describes them.

    ``format`` says how they are stored, None where they are floats. The buffers keep their dtypes when the module is
    moved to another one (``module.bfloat16()``): the layer then computes in it, from the same codes.
    """

    format: QuantFormat | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = {name: buffer for name, buffer in self._buffers.items() if name.endswith("_scale")}
        if self.format is None or not scales:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]
        for name, scale in scales.items():
            self._buffers[name] = scale.view(_UNTOUCHED[scale.dtype]) if scale is not None else None
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]
        finally:
            for name in scales:
                scale = self._buffers[name]
                self._buffers[name] = scale.view(self.format.scale_dtype) if scale is not None else None


def quantize_parameter(
    module: nn.Module, name: str, format: QuantFormat, transposed: bool = False, importance_EI: Tensor | None = None
) -> None:
    """Replace the parameter ``name`` of ``module`` by the buffers ``name_codes`` and ``name_scale``.

    Args:
        transposed: it is stored as ``[E, I, O]``; the codes never are.
        importance_EI: as :meth:`QuantFormat.quantize` takes it.
    """
    weight = getattr(module, name).detach()
    _replace(module, name, format.quantize(weight.transpose(1, 2) if transposed else weight, importance_EI))


def make_room(module: nn.Module, name: str, format: QuantFormat, transposed: bool = False) -> None:
    """As :func:`quantize_parameter`, but the buffers hold anything: a checkpoint is about to fill them."""
    weight = getattr(module, name)
    num_experts, outputs, inputs = (weight.transpose(1, 2) if transposed else weight).shape
    _replace(module, name, format.empty(num_experts, outputs, inputs, weight.device))


def _replace(module: Any, name: str, matrix: QuantizedMatrix) -> None:
    delattr(module, name)
    module.register_buffer(f"{name}_codes", matrix.codes)
    module.register_buffer(f"{name}_scale", matrix.scale)
