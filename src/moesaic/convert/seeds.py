"""Random numbers that depend on what they are for, not on the order in which tensors are made."""

from __future__ import annotations

import hashlib

import torch


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator seeded by all of ``purpose`` (a seed, the tensor's name, an expert's number, ...).

    A conversion that goes on after an interruption draws what an uninterrupted one would have drawn.
    """
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
