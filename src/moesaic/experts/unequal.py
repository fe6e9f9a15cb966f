"""Experts of unequal hidden width: one bank for each run of experts of one width.

T tokens · D model width · E experts · K slots per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from torch import nn

from moesaic.experts.bank import ExpertBank
from moesaic.experts.choice import Choice


class UnequalExperts(nn.Module):
    """E experts of which each may have another hidden width (Duo-LLM: A Framework for Studying Adaptive Computation in
    Large Language Models, section 2: a big and a small feed-forward side by side in each layer; with a zero expert, the
    choice to skip it).

    Experts of one width that stand next to each other are an :class:`ExpertBank`, ``banks[i]``: what the backends,
    :func:`moesaic.quantize`, :func:`moesaic.parallelize` and adapters take is still a bank, and a token pays for the
    widths that it takes. So experts of equal width should stand together: ``[64, 64, 256]`` are two banks,
    ``[64, 256, 64]`` three.

    Args:
        d_ffs: hidden width of each expert.
    """

    def __init__(self, d_model: int, d_ffs: Sequence[int], activation: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.num_experts = len(d_ffs)
        runs = [(d_ff, len(list(run))) for d_ff, run in groupby(d_ffs)]
        self.banks = nn.ModuleList(ExpertBank(d_model, d_ff, number, activation, bias) for d_ff, number in runs)
        ends = [sum(number for _, number in runs[: index + 1]) for index in range(len(runs))]
        self.ranges = [range(end - number, end) for end, (_, number) in zip(ends, runs, strict=True)]

    @property
    def last_choice(self) -> Choice | None:
        """Which backend computed the last forward's widest experts, and why."""
        choice: Choice | None = self._widest().last_choice
        return choice

    @property
    def last_decision(self) -> Any:
        """How ranks carried out the last forward of the widest experts; None in one process."""
        return self._widest().last_decision

    def _widest(self) -> Any:
        # PEFT puts a wrapper in a bank's place.
        banks: list[Any] = [getattr(bank, "base_layer", bank) for bank in self.banks]
        return max(banks, key=lambda bank: bank.d_ff)


def experts_of_widths(d_model: int, d_ffs: Sequence[int], activation: str, bias: bool) -> ExpertBank | UnequalExperts:
    """A bank where all experts are of one width, else several."""
    if len(set(d_ffs)) == 1:
        return ExpertBank(d_model, d_ffs[0], len(d_ffs), activation, bias)
    return UnequalExperts(d_model, d_ffs, activation, bias)


def banks_of(experts: nn.Module, num_experts: int) -> Iterator[tuple[Any, range]]:
    """The banks of a layer's experts, each with the ids of its own; PEFT may have put a wrapper in a bank's place."""
    if isinstance(experts, UnequalExperts):
        yield from zip(experts.banks, experts.ranges, strict=True)
    else:
        yield experts, range(num_experts)
