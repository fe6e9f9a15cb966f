"""Weights in 8 and 4 bits: the formats of ``native/moesaic.h``, made from floats and read back.

A matrix of E experts maps I inputs to O outputs and is always stored as ``[E, O, I]``: a row of codes an output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.errors import ConfigError, did_you_mean
from moesaic.experts.scales import int4_scales, without_subnormals

FORMATS = ("int8", "int4")
GROUPS = (32, 64)
DEFAULT_GROUP = 64
# Inputs of one block of packed codes: four per 16-bit word, 32 words.
_BLOCK = 128
# Values that are worked on at a time: all that one pass reads and writes stays in the cache between two passes.
_CHUNK = 1 << 19


@dataclass(frozen=True)
class QuantFormat:
    """How weights are stored in few bits; symmetric, so that a code times a scale is the value.

    ``int8``: int8 codes ``[E, O, I]`` in -127..127 and one float32 scale per output, ``[E, O]``. ``int4``: codes in
    -8..7, two per byte in the block order that :func:`pack_int4` describes, uint8 ``[E, O, P / 2]`` with P the number
    of inputs rounded up to 128, and one bfloat16 scale per ``group`` consecutive inputs, ``[E, O, P / group]``.

    Args:
        bits: 8 or 4.
        group: 32 or 64 for 4 bits; 0 (one scale per output) for 8.
    """

    bits: int
    group: int

    @staticmethod
    def named(name: str, group: int | None = None) -> QuantFormat:
        """The format called ``"int8"`` or ``"int4"``.

        Args:
            group: inputs per scale of int4, 32 or 64 (the default); not for int8.

        Raises:
            ConfigError: for another name or group.
        """
        if not isinstance(name, str):  # as a configuration file may have it
            raise ConfigError(f"the weight format is {name!r}: it must be one of {', '.join(FORMATS)}")
        if name not in FORMATS:
            raise ConfigError(f"unknown weight format {name!r}: {did_you_mean(name, FORMATS)}")
        if name == "int8":
            if group:
                raise ConfigError(f"group is {group}: int8 has one scale per output; only int4 has groups")
            return QuantFormat(8, 0)
        if group is not None and group not in GROUPS:
            raise ConfigError(f"group is {group!r}: it must be one of {', '.join(map(str, GROUPS))}")
        return QuantFormat(4, group or DEFAULT_GROUP)

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def codes_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits == 8 else torch.uint8

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.bits == 8 else torch.bfloat16

    def codes_shape(self, num_experts: int, outputs: int, inputs: int) -> tuple[int, int, int]:
        return (num_experts, outputs, inputs if self.bits == 8 else padded(inputs) // 2)

    def scale_shape(self, num_experts: int, outputs: int, inputs: int) -> tuple[int, ...]:
        shape = (num_experts, outputs)
        return shape if self.bits == 8 else (*shape, padded(inputs) // self.group)

    def empty(
        self, num_experts: int, outputs: int, inputs: int, device: torch.device | str | None = None
    ) -> QuantizedMatrix:
        """A matrix with room for codes and scales, which hold anything."""
        codes = torch.empty(self.codes_shape(num_experts, outputs, inputs), dtype=self.codes_dtype, device=device)
        scale = torch.empty(self.scale_shape(num_experts, outputs, inputs), dtype=self.scale_dtype, device=device)
        return QuantizedMatrix(self, codes, scale, inputs)

    def quantize(self, w_EOI: Tensor, importance_EI: Tensor | None = None) -> QuantizedMatrix:
        """The nearest matrix in this format, on the device of ``w_EOI``; a chunk of rows at a time.

        int8 takes the scale that makes the row's largest magnitude 127; for int4 each group's scale is searched for
        (:func:`moesaic.experts.scales.int4_scales`).

        Args:
            w_EOI: ``[E, O, I]`` of any floating dtype and memory order.
            importance_EI: ``[E, I]``, what a squared error of each input's weights counts; alike where it is None.

        Raises:
            ConfigError: where a weight is not finite, or the shapes do not go together.
        """
        num_experts, outputs, inputs = w_EOI.shape
        if importance_EI is not None and importance_EI.shape != (num_experts, inputs):
            raise ConfigError(
                f"importance has shape {list(importance_EI.shape)}: it must be {[num_experts, inputs]}, "
                "one number per expert and input"
            )
        made = self.empty(num_experts, outputs, inputs, w_EOI.device)
        rows = max(1, _CHUNK // max(1, inputs))
        for expert in range(num_experts):
            weight_OI = w_EOI[expert].detach()
            # All at once: checking chunk by chunk would wait for the device at each.
            if not bool(torch.isfinite(weight_OI).all()):
                raise ConfigError(f"expert {expert} has weights that are not finite: they cannot be quantized")
            importance_I = None if importance_EI is None else importance_EI[expert]
            for start in range(0, outputs, rows):
                part = slice(start, min(outputs, start + rows))
                codes, scale = self._rows(weight_OI[part].float(), importance_I)
                made.codes[expert, part], made.scale[expert, part] = codes, scale
        return made

    def _rows(self, w_OI: Tensor, importance_I: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.bits == 8:
            scale_O = without_subnormals(w_OI.abs().amax(dim=1) / 127)
            return _codes(w_OI, scale_O.unsqueeze(1), -127, 127).to(torch.int8), scale_O
        outputs, inputs = w_OI.shape
        w_OGg = F.pad(w_OI, (0, padded(inputs) - inputs)).view(outputs, -1, self.group)
        weight_Gg = None
        if importance_I is not None:
            weight_Gg = F.pad(importance_I.float(), (0, padded(inputs) - inputs)).view(-1, self.group)
        scale_OG = int4_scales(w_OGg, weight_Gg)
        codes_OGg = _codes(w_OGg, scale_OG.float().unsqueeze(2), -8, 7)
        return pack_int4(codes_OGg.to(torch.int8).view(outputs, -1)), scale_OG


@dataclass(frozen=True)
class QuantizedMatrix:
    """The codes and scales of E matrices from ``inputs`` to O features, as :class:`QuantFormat` describes them."""

    format: QuantFormat
    codes: Tensor
    scale: Tensor
    inputs: int

    def __getitem__(self, experts: slice) -> QuantizedMatrix:
        """Some of the experts."""
        return QuantizedMatrix(self.format, self.codes[experts], self.scale[experts], self.inputs)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[E, O, I]``, each value rounded to ``dtype`` once."""
        if self.format.bits == 8:
            return (self.codes.float() * self.scale.unsqueeze(-1)).to(dtype)
        codes = unpack_int4(self.codes)
        grouped = codes.float().unflatten(-1, (-1, self.format.group))
        values: Tensor = (grouped * self.scale.float().unsqueeze(-1)).to(dtype).flatten(-2)
        return values[..., : self.inputs]


def padded(inputs: int) -> int:
    """The number of inputs that int4 codes are stored for: a multiple of 128."""
    return -(-inputs // _BLOCK) * _BLOCK


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes in -8..7, ``[..., P]``, to uint8 ``[..., P / 2]``.

    A code is stored as the nibble ``code + 8``. Each 128 inputs are 32 little-endian 16-bit words; bits 4p..4p+3 of
    word i hold input 32p + i of the 128. So a load of 64 bytes and four shifts give four runs of 32 consecutive inputs.
    """
    nibbles = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 4, 32))
    first, second, third, fourth = nibbles.unbind(-2)
    return torch.stack((first | second << 4, third | fourth << 4), dim=-1).flatten(-3)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`: uint8 ``[..., P / 2]`` to int8 ``[..., P]``."""
    low, high = packed.unflatten(-1, (-1, 32, 2)).unbind(-1)
    nibbles = torch.stack((low & 15, low >> 4, high & 15, high >> 4), dim=-2).flatten(-3)
    return nibbles.to(torch.int8) - 8


def _codes(w: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    # A row or group of zeros has scale zero, and code zero.
    return (w / torch.where(scale == 0, 1.0, scale)).round_().clamp_(lowest, highest)
