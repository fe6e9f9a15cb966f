"""Which rank owns which part of the expert weights: fixed by E, F and W alone, whatever is chosen at run time.

E experts · F expert hidden width · W ranks · B blocks of experts · S slices of the hidden width (W = B · S).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moesaic.errors import ConfigError


@dataclass(frozen=True)
class ExpertLayout:
    """The layout of one layer's experts over ``ranks`` (Tutel: Adaptive Mixture-of-Experts at Scale, section 3.1).

    With E ≥ W every rank is a block and owns whole experts, the first ones on rank 0, split as ``torch.chunk`` splits:
    the last ranks may own fewer, or none. With E < W the ranks form gcd(E, W) blocks of equally many experts, and the
    ranks of a block own one slice of the hidden width each, of all its experts. Rank ``block · slices + slice``.

    Raises:
        ConfigError: for a number below 1.
    """

    num_experts: int
    d_ff: int
    ranks: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "d_ff", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")

    @property
    def blocks(self) -> int:
        return self.ranks if self.num_experts >= self.ranks else math.gcd(self.num_experts, self.ranks)

    @property
    def slices(self) -> int:
        return self.ranks // self.blocks

    def place(self, rank: int) -> tuple[int, int]:
        """(block, slice) of a rank."""
        return divmod(rank, self.slices)

    def experts_of(self, rank: int) -> range:
        """The experts of the rank's block."""
        return self.experts_of_block(rank // self.slices)

    def experts_of_block(self, block: int) -> range:
        return chunk(self.num_experts, self.blocks, block)

    def hidden_of(self, rank: int) -> range:
        """The hidden features, of each of those experts, that the rank owns."""
        return chunk(self.d_ff, self.slices, rank % self.slices)

    @cached_property
    def block_of_expert(self) -> npt.NDArray[np.int64]:
        """``[E]``."""
        return np.arange(self.num_experts) // -(-self.num_experts // self.blocks)

    @cached_property
    def first_of_block(self) -> npt.NDArray[np.int64]:
        """``[B]``: a block's first expert; E where it has none."""
        return np.minimum(np.arange(self.blocks) * -(-self.num_experts // self.blocks), self.num_experts)


def chunk(length: int, parts: int, index: int) -> range:
    """The part ``index`` of ``length`` things, as ``torch.chunk`` and DTensor's ``Shard`` split them."""
    size = -(-length // parts)
    return range(min(index * size, length), min((index + 1) * size, length))
