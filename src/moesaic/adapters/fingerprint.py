"""Which base model an adapter belongs to: a hash of samples of every tensor."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.errors import UnsupportedError

SAMPLES = 64
"""Values of each matrix: those of one expert, or of a tensor that holds no experts."""
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its multiples spread evenly over any range


def fingerprint(model: nn.Module) -> str:
    """``"v1:"`` and 32 hexadecimal digits that tell one base model from another.

    Hashed are name and shape of every parameter and persistent buffer, and 64 values of each, rounded to bfloat16; of a
    tensor of three dimensions, 64 of every entry of its first: another model's experts would differ in a few only. So a
    base that is loaded in float32 and one that is loaded in bfloat16 have one fingerprint. (In float16 it is another
    one: what was rounded twice may differ.) It reads a few memory pages per expert, not the whole model.

    A model with an adapter applied, or with low-rank parts attached, is another one than its base.

    Raises:
        UnsupportedError: where a tensor has no values here (on the meta device).
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor):
            continue  # a module's extra state, which is no weight
        if tensor.is_meta:
            raise UnsupportedError(f"{name} is on the meta device: a model without values has no fingerprint")
        digest.update(repr((name, tuple(tensor.shape))).encode())
        digest.update(_samples(tensor.detach()))
    return f"v1:{digest.hexdigest()}"


def _samples(tensor: Tensor) -> bytes:
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    stacked = tensor.ndim == 3
    shape = tuple(tensor.shape[1:] if stacked else tensor.shape)
    if not tensor.numel():
        return b""
    # By coordinates, so that a tensor that is not contiguous is not copied.
    places: list[Any] = [axis.to(tensor.device) for axis in _places(shape)]
    values = tensor[(slice(None), *places)] if stacked else tensor[tuple(places)]
    rounded = values.to(torch.bfloat16) if values.is_floating_point() else values
    return rounded.cpu().contiguous().view(torch.uint8).numpy().tobytes()


@lru_cache(maxsize=64)
def _places(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    size = int(np.prod(shape, dtype=np.int64))
    if size <= SAMPLES:
        flat = np.arange(size)
    else:
        turns = np.arange(SAMPLES, dtype=np.uint64) * np.uint64(_GOLDEN)
        flat = np.minimum((turns / 2.0**64 * size).astype(np.int64), size - 1)
    return tuple(torch.from_numpy(np.ascontiguousarray(axis)) for axis in np.unravel_index(flat, shape))
