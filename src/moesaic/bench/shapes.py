"""What an expert layer must do at least: shapes by name, and the bytes and operations that follow from them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moesaic.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Shape:
    """The sizes of one layer of SwiGLU experts: E experts, K slots per token, D model width, F expert hidden width."""

    num_experts: int
    top_k: int
    d_model: int
    d_ff: int

    def __str__(self) -> str:
        named = next((name for name, shape in SHAPES.items() if shape == self), None)
        return named or f"E{self.num_experts}K{self.top_k}D{self.d_model}F{self.d_ff}"

    def weights_of_expert(self) -> int:
        """Elements of one expert: gate, up and down projection."""
        return 3 * self.d_model * self.d_ff

    def flops(self, rows: int) -> float:
        """Floating-point operations of ``rows`` routed rows; a multiply and an add count as two."""
        return 2.0 * rows * self.weights_of_expert()


# Granularities in use: OLMoE's, Mixtral's (at a quarter of its width), Qwen3-MoE's.
SHAPES = {
    "A": Shape(64, 8, 2048, 1024),
    "B": Shape(8, 2, 1024, 3584),
    "C": Shape(128, 8, 2048, 768),
}


def parse_shape(text: str) -> Shape:
    """``"A"``, ``"B"``, ``"C"``, or sizes such as ``"E64K8D2048F1024"``.

    Raises:
        ConfigError: for anything else, a size of zero, or more slots than experts.
    """
    if text in SHAPES:
        return SHAPES[text]
    sizes = re.fullmatch(r"E(\d+)K(\d+)D(\d+)F(\d+)", text)
    if not sizes:
        raise ConfigError(f"unknown shape {text!r}: {did_you_mean(text, [*SHAPES, 'E64K8D2048F1024'])}")
    shape = Shape(*map(int, sizes.groups()))
    if min(shape.num_experts, shape.top_k, shape.d_model, shape.d_ff) < 1 or shape.top_k > shape.num_experts:
        raise ConfigError(f"shape {text!r}: every size must be at least 1, and K at most E")
    return shape


def told_tokens(count: int) -> str:
    """``"1 token"``, ``"2 tokens"``, ..."""
    return f"{count} token{'' if count == 1 else 's'}"
