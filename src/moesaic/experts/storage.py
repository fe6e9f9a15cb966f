"""How a module keeps the matrices of its experts: as float parameters, or quantized as buffers of codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.experts.quantized import QuantFormat, QuantizedMatrix

# A dtype of the same width that no conversion of a module's floats touches.
_UNTOUCHED = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class ExpertStorage(nn.Module):
    """A module whose two matrices, up and down, may be quantized in place.

    A quantized matrix is no parameter any more but two buffers, its codes and its scale, as :class:`QuantFormat`
    describes them: ``up`` becomes ``up_codes`` and ``up_scale``, ``gate_up_proj`` becomes ``gate_up_codes`` and
    ``gate_up_scale``. They keep their dtypes when the module is moved to another one (``module.bfloat16()``): the layer
    then computes in it, from the same codes.

    Attributes:
        format: how the matrices are stored; None: as floats.
    """

    format: QuantFormat | None = None

    def matrices(self) -> tuple[str, str]:
        """The names of the parameters up and down."""
        return "up", "down"

    def stored_transposed(self) -> bool:
        """Whether the float parameters are ``[E, I, O]``; codes never are."""
        return False

    def check_quantizable(self) -> None:
        """Refuse what :meth:`quantize` cannot do, before anything has been changed.

        Raises:
            ConfigError: where the matrices are quantized already, sharded over ranks, in an
                :class:`moesaic.adapters.AdapterPool`, or hold a value that is not finite.
        """
        if self.format is not None:
            raise ConfigError(f"the experts are quantized already, as {self.format.name}")
        if self.__dict__.get("parallel") is not None:
            raise ConfigError("the experts are sharded over ranks, which take float weights")
        if self.__dict__.get("slots") is not None:
            raise ConfigError("the experts are in an AdapterPool, which serves float weights: close it first")
        for name in self.matrices():
            if not all(bool(torch.isfinite(weight).all()) for weight in getattr(self, name).detach()):
                raise ConfigError(f"{name} has weights that are not finite: it cannot be quantized")

    def quantize(self, format: QuantFormat, importance: Sequence[Tensor | None] = (None, None)) -> None:
        """Store the matrices in few bits from now on; biases stay. For a whole model: :func:`moesaic.quantize`.

        Args:
            importance: ``[E, D]`` for up and ``[E, F]`` for down, as :meth:`QuantFormat.quantize` takes it.

        Raises:
            ConfigError: as :meth:`check_quantizable`.
        """
        self.check_quantizable()
        for name, importance_EI in zip(self.matrices(), importance, strict=True):
            self.quantize_matrix(name, getattr(self, name), format, importance_EI)
        self.format = format

    def quantize_matrix(
        self, name: str, weight: Tensor, format: QuantFormat, importance_EI: Tensor | None = None
    ) -> None:
        """Quantize ``weight`` and put it in the place of the parameter ``name``; ``format`` is set by the caller."""
        weight_EOI = weight.transpose(1, 2) if self.stored_transposed() else weight
        self._replace(name, format.quantize(weight_EOI, importance_EI))

    def make_room(self, format: QuantFormat) -> None:
        """As :meth:`quantize`, but the buffers hold anything: a checkpoint is about to fill them."""
        for name in self.matrices():
            weight = getattr(self, name)
            weight_EOI = weight.transpose(1, 2) if self.stored_transposed() else weight
            num_experts, outputs, inputs = weight_EOI.shape
            self._replace(name, format.empty(num_experts, outputs, inputs, weight.device))
        self.format = format

    def dequantize(self, dtype: torch.dtype) -> None:
        """Store the matrices as parameters of ``dtype`` again, with the values that the codes stand for."""
        for name, matrix in zip(self.matrices(), self.quantized(), strict=True):
            weight_EOI = matrix.dequantize(dtype)
            weight = weight_EOI.transpose(1, 2).contiguous() if self.stored_transposed() else weight_EOI
            for buffer in buffer_names(name):
                delattr(self, buffer)
            setattr(self, name, nn.Parameter(weight))
        self.format = None

    def quantized(self) -> tuple[QuantizedMatrix, QuantizedMatrix]:
        """Up and down; only where :attr:`format` is not None."""
        assert self.format is not None
        (up, up_scale), (down, down_scale) = (map(self._buffer, buffer_names(name)) for name in self.matrices())
        d_model, width = down.shape[1], up.shape[1]
        d_ff = width // 2 if self.gated() else width
        return (
            QuantizedMatrix(self.format, up, up_scale, d_model),
            QuantizedMatrix(self.format, down, down_scale, d_ff),
        )

    def gated(self) -> bool:
        """Whether up is a gate's matrix and an up projection's in one."""
        raise NotImplementedError

    def _buffer(self, name: str) -> Tensor:
        return getattr(self, name)  # type: ignore[no-any-return]

    def _replace(self, name: str, matrix: QuantizedMatrix) -> None:
        delattr(self, name)
        for buffer, tensor in zip(buffer_names(name), (matrix.codes, matrix.scale), strict=True):
            self.register_buffer(buffer, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = [buffer_names(name)[1] for name in self.matrices()] if self.format is not None else []
        buffers: dict[str, Any] = self._buffers
        for name in scales:
            buffers[name] = buffers[name].view(_UNTOUCHED[buffers[name].dtype])
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]
        finally:
            for name in scales:
                buffers[name] = buffers[name].view(self.format.scale_dtype)  # type: ignore[union-attr]


def buffer_names(matrix: str) -> tuple[str, str]:
    """The names of the codes and the scale that take the place of the parameter ``matrix``.

    They do not begin with the parameter's name: transformers' conversions of checkpoints go by the beginnings of names.
    """
    stem = matrix.removesuffix("_proj")
    return f"{stem}_codes", f"{stem}_scale"
