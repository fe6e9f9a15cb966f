"""Experts that compute next to nothing, beside the feed-forward ones: zero, copy, constant.

T tokens · N rows · D model width · K slots per token · E feed-forward experts · Z zero-computation experts. A kind is a
class with one method, entered in ``EXPERT_KINDS``; :class:`ZeroComputationExperts` holds those of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from moesaic.dispatch import Dispatch
from moesaic.eager import is_eager
from moesaic.errors import ConfigError
from moesaic.experts.row_invariance import is_row_invariant
from moesaic.registry import Registry
from moesaic.routing import Routing
from moesaic.routing.options import is_of

EXPERT_KINDS: Registry[type[ExpertKind]] = Registry("expert kind")


class ExpertKind(nn.Module, ABC):
    """Base of all kinds: built with the tokens' width D, and called with the tokens that chose it.

    ``is_null`` says that it gives zeros for every token: then it is not even called.
    """

    is_null: ClassVar[bool] = False

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    @abstractmethod
    def forward(self, x_ND: Tensor) -> Tensor:
        """``[N, D]`` to ``[N, D]``, each row by itself, in the dtype of ``x_ND``; N may be 0."""

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the parameters anew, where there are any."""


@EXPERT_KINDS.register("zero")
class ZeroExpert(ExpertKind):
    """Discards the token: 0 (MoE++, its zero experts); AdaMoE's null expert is the same."""

    is_null = True

    def forward(self, x_ND: Tensor) -> Tensor:
        return torch.zeros_like(x_ND)


@EXPERT_KINDS.register("copy")
class CopyExpert(ExpertKind):
    """Skips the layer: x (MoE++, its copy experts)."""

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND


@EXPERT_KINDS.register("constant")
class ConstantExpert(ExpertKind):
    """Replaces the token: a₁·x + a₂·v with [a₁, a₂] = softmax(W_c·x) (MoE++, its constant experts).

    Parameters: ``vector`` (v, ``[D]``) and ``weight`` (W_c, ``[2, D]``). Both are drawn as the model's other weights
    are; the published code draws v from a standard normal distribution.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.vector = nn.Parameter(torch.empty(d_model))
        self.weight = nn.Parameter(torch.empty(2, d_model))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.vector, std=std)
        nn.init.normal_(self.weight, std=std)

    def forward(self, x_ND: Tensor) -> Tensor:
        shares_N2 = nn.functional.linear(x_ND, self.weight).float().softmax(dim=-1).to(x_ND.dtype)
        return shares_N2[:, :1] * x_ND + shares_N2[:, 1:] * self.vector.to(x_ND.dtype)


class ZeroComputationExperts(nn.Module):
    """The Z experts of a layer beside its feed-forward ones, on every rank whole (MoE++, its zero-computation experts).

    They take a router's columns from E on, as :func:`columns_of` says.

    Args:
        kinds: name in ``EXPERT_KINDS`` to number, as ``MoEConfig.zero_computation_experts`` has it.

    Raises:
        ConfigError: for an unknown kind, or a number that is not at least 0.
    """

    def __init__(self, d_model: int, kinds: Mapping[str, int]) -> None:
        super().__init__()
        check_kinds(kinds)
        self.kinds = columns_of(kinds)
        self.experts = nn.ModuleList(EXPERT_KINDS.get(name)(d_model) for name in self.kinds)
        ranges = [(self.kinds.index(name), kinds[name], EXPERT_KINDS.get(name).is_null) for name in set(self.kinds)]
        self._null = [(start, start + number) for start, number, is_null in ranges if is_null]
        self._computing = [index for index, expert in enumerate(self.experts) if not expert.is_null]

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """``[T, D]``, in the dtype of ``x_TD``: for every token the weighted sum of its experts from column E on.

        None where that is 0 whatever was chosen.

        Args:
            routing: over E + Z experts.
        """
        if not self._computing:
            return None
        kind_TK = routing.expert_ids - (routing.num_experts - len(self.kinds))  # below 0 for feed-forward experts
        if is_eager(x_TD):
            return self._of_choosers(x_TD, kind_TK, routing.weights)
        return self._of_all(x_TD, kind_TK, routing.weights)

    def _of_choosers(self, x_TD: Tensor, kind_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Each expert gets the tokens that chose it; feed-forward and null experts are the null slots here."""
        null_TK = kind_TK < 0
        for start, end in self._null:
            null_TK |= (kind_TK >= start) & (kind_TK < end)
        ids_TK = kind_TK.masked_fill(null_TK, len(self.kinds))
        dispatch = Dispatch.from_slots(ids_TK, weights_TK.masked_fill(null_TK, 0.0), len(self.kinds))
        x_ND, counts = dispatch.gather(x_TD), dispatch.counts.tolist()
        *rows, nobodys_ND = x_ND.split([*counts, x_ND.shape[0] - sum(counts)])
        # In training also those that nobody chose: on another rank somebody may have, and gradients are averaged. What
        # isolation has seen in one forward must be all that there is.
        every = torch.is_grad_enabled() or is_row_invariant()
        parts = [self.experts[index](rows[index]) for index in self._computing if every or counts[index]]
        return dispatch.combine(torch.cat([*parts, nobodys_ND]))

    def _of_all(self, x_TD: Tensor, kind_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Each expert gets all tokens, those that did not choose it with weight 0: no shape hangs on the data."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for index in self._computing:
            share_T1 = torch.where(kind_TK == index, weights_TK, 0.0).sum(dim=-1, keepdim=True)
            y_TD = y_TD + share_T1 * self.experts[index](x_TD)
        return y_TD.to(x_TD.dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={self.kinds.count(name)}" for name in dict.fromkeys(self.kinds))


def columns_of(kinds: Mapping[str, int]) -> list[str]:
    """The kind of each of a router's columns from E on: in the order of their names, for a file keeps no other."""
    return [name for name in sorted(kinds) for _ in range(kinds[name])]


def check_kinds(kinds: Mapping[str, int]) -> None:
    """Refuse kinds that are unknown, and numbers of them that are no whole numbers from 0 on."""
    for name, number in kinds.items():
        EXPERT_KINDS.get(name)
        if not is_of(int, number) or number < 0:
            raise ConfigError(
                f"zero_computation_experts has {number!r} of {name!r}: it must be a whole number from 0 on"
            )
