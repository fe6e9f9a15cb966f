"""The search for the scales of 4-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor

# The extreme value of a group may be given these codes. 7 is the plain choice; -8 uses the code that has no positive
# counterpart, with a negative scale where the extreme is positive; beyond 7 and -8 the extreme is clipped and all the
# others get finer steps.
_EXTREMES = (7.0, -8.0, 7.6, -8.6, 8.2, -9.2, -7.4, 6.6)


def int4_scales(w_OGg: Tensor, importance_Gg: Tensor | None) -> Tensor:
    """bfloat16 ``[O, G]``: for each group of g weights the scale that gives the least weighted squared error.

    A grid of scales is tried, all of them rounded as they are stored, then the least-squares scale of the best codes;
    the plain ``max |w| / 7`` is among them, so that none does worse. After AWQ: Activation-aware Weight Quantization
    for LLM Compression and Acceleration, section 3 (what the inputs' magnitudes say about the weights), and llama.cpp's
    importance matrix and ``make_qx_quants``.

    Args:
        w_OGg: ``[O, G, g]`` float32. importance_Gg: ``[G, g]`` float32, not negative, or None.
    """
    extreme_OG = w_OGg.gather(2, w_OGg.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    best, least, scratch = torch.zeros_like(extreme_OG), torch.full_like(extreme_OG, torch.inf), torch.empty_like(w_OGg)
    for code in _EXTREMES:
        scale = _stored(extreme_OG / code)
        error = _error(w_OGg, scale, importance_Gg, scratch)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    scale = _stored(_least_squares(w_OGg, best, importance_Gg))
    error = _error(w_OGg, scale, importance_Gg, scratch)
    return torch.where(error < least, scale, best).bfloat16()


def without_subnormals(scale: Tensor) -> Tensor:
    """Scales whose reciprocal may be infinite, and which a kernel may take for zero, as zero."""
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 0.0, scale)


def _stored(scale: Tensor) -> Tensor:
    return without_subnormals(scale.bfloat16().float())


def _rounded(w_OGg: Tensor, scale_OG: Tensor, out: Tensor) -> Tensor:
    inverse = torch.where(scale_OG == 0, 0.0, 1 / scale_OG)
    return torch.mul(w_OGg, inverse.unsqueeze(2), out=out).round_().clamp_(-8, 7)


def _error(w_OGg: Tensor, scale_OG: Tensor, importance_Gg: Tensor | None, scratch: Tensor) -> Tensor:
    off = _rounded(w_OGg, scale_OG, scratch).mul_(scale_OG.unsqueeze(2)).sub_(w_OGg)
    if importance_Gg is None:
        return off.square_().sum(dim=2)
    return off.square_().mul_(importance_Gg).sum(dim=2)


def _least_squares(w_OGg: Tensor, scale_OG: Tensor, importance_Gg: Tensor | None) -> Tensor:
    """The scale that fits the codes which ``scale_OG`` gives; itself where all codes are zero."""
    codes = _rounded(w_OGg, scale_OG, torch.empty_like(w_OGg))
    weighted = codes if importance_Gg is None else codes * importance_Gg
    square = (weighted * codes).sum(dim=2)
    return torch.where(square > 0, (weighted * w_OGg).sum(dim=2) / square, scale_OG)
