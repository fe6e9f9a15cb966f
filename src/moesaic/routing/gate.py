"""What compiled code may compute in a router's place: a linear gate, scores, the K best experts, and their weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Gate(NamedTuple):
    """A router's rule: the experts with the largest logits ``W x + bias``, or with the largest scores + ``selection``.

    An expert's weight is its score s, or with ``unit_scale`` u the number 1 + u (2 s - 1); with ``normalize`` divided
    by the sum of the token's weights + ``epsilon``; then multiplied by ``scale``. All in float32.

    Args:
        scores: of the logits: ``"softmax"`` or ``"sigmoid"``.
        weight: ``[E, D]``, W. bias: ``[E]`` in its dtype, or None.
        selection: ``[E]`` float32, or None. unit_scale: ``[E]`` in the weight's dtype, or None.
    """

    scores: str
    weight: Tensor
    bias: Tensor | None = None
    selection: Tensor | None = None
    unit_scale: Tensor | None = None
    normalize: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
