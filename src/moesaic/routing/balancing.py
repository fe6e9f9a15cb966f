"""Keeping the experts' load even: losses that are added to the training loss, and updates after a step.

A balancer is a class with two methods, ``loss`` and ``update``, of which it overrides what it needs, entered in
``BALANCERS``; a configuration names any number of them with their coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.registry import Registry
from moesaic.routing.router import Router
from moesaic.routing.routing import Routing

BALANCERS: Registry[type[Balancer]] = Registry("balancer")


class Balancer:
    """Base: no loss, no update."""

    @staticmethod
    def loss(routing: Routing, counts_E: Tensor) -> Tensor | None:
        """A float32 scalar to be multiplied by the coefficient and added to the training loss; None for none.

        Args:
            routing: of this process's tokens.
            counts_E: ``[E]`` int64, slots that each expert was asked for: by the tokens of all ranks, where there are
                several. The losses of ranks with equally many tokens then average to that of all tokens together.
        """
        return None

    @staticmethod
    def update(router: Router, counts_E: Tensor, coefficient: float) -> None:
        """Called once after each optimizer step.

        Args:
            counts_E: ``[E]`` int64, in proportion to the slots that each expert got since the last step (activation
                checkpointing counts every forward that it recomputes once more).
        """

    @staticmethod
    def check(router: type[Router]) -> None:
        """Raise :class:`ConfigError` where this balancer cannot work with that router."""


@BALANCERS.register("load_balancing")
class LoadBalancing(Balancer):
    """E · Σ_e f_e · P_e (Switch Transformers, section 2.2, equations 4 to 6), 1 for an even load, whatever K is.

    f_e is expert e's share of the routed slots, P_e its mean share of the scores. Scores that do not sum to 1 over
    the experts (sigmoid) are normalized per token first (DeepSeek-V3, equations 17 to 20).
    """

    @staticmethod
    def loss(routing: Routing, counts_E: Tensor) -> Tensor:
        fraction_E = counts_E / counts_E.sum().clamp(min=1)
        share_TE = routing.scores / routing.scores.sum(dim=-1, keepdim=True)
        return routing.num_experts * (fraction_E * mean_over_routed(share_TE, routing)).sum()


@BALANCERS.register("z_loss")
class ZLoss(Balancer):
    """Mean over the tokens of logsumexp(logits)² (ST-MoE, section 3.3, equation 5): keeps the logits small."""

    @staticmethod
    def loss(routing: Routing, counts_E: Tensor) -> Tensor:
        if routing.logits is None:
            raise ConfigError("the balancer 'z_loss' needs a router that has logits")
        return mean_over_routed(routing.logits.logsumexp(dim=-1, keepdim=True).square(), routing).squeeze()


@BALANCERS.register("bias_update")
class BiasUpdate(Balancer):
    """Auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2; Wang et al., algorithm 1).

    After each step the selection bias of an expert with less than the mean load goes up by the coefficient, that of
    one with more goes down. No gradient is involved.
    """

    @staticmethod
    def update(router: Router, counts_E: Tensor, coefficient: float) -> None:
        load_E = counts_E.to(torch.float32)
        router.get_buffer("selection_bias").add_(torch.sign(load_E.mean() - load_E), alpha=coefficient)

    @staticmethod
    def check(router: type[Router]) -> None:
        if not router.has_selection_bias:
            raise ConfigError(
                f"the balancer 'bias_update' needs a router with a selection_bias; {router.__name__} has none"
            )


def mean_over_routed(values_TX: Tensor, routing: Routing) -> Tensor:
    """``[X]``: mean over the tokens that have an expert at all; padded tokens (all slots null) do not count."""
    routed_T1 = (routing.expert_ids < routing.num_experts).any(dim=-1, keepdim=True)
    return torch.where(routed_T1, values_TX, 0.0).sum(dim=0) / routed_T1.sum().clamp(min=1)


def check_balancing(balancing: Mapping[str, float], router: type[Router]) -> None:
    """Refuse balancers that are unknown or do not go with the router, and coefficients below 0 or not finite."""
    for name, coefficient in balancing.items():
        BALANCERS.get(name).check(router)
        if not (math.isfinite(coefficient) and coefficient >= 0):
            raise ConfigError(
                f"the coefficient of balancer {name!r} is {coefficient}: it must be finite and at least 0"
            )


def acts_after_step(balancing: Mapping[str, float]) -> bool:
    """Whether one of the named balancers has an ``update``, and so needs the slots counted."""
    return any(BALANCERS.get(name).update is not Balancer.update for name in balancing)


def balance_loss(routing: Routing, balancing: Mapping[str, float], counts_E: Tensor | None = None) -> Tensor:
    """Σ coefficient · loss over the named balancers: a float32 scalar, 0 where there is none.

    Args:
        counts_E: ``[E]`` int64, slots per expert, of all ranks; the routing's own by default.
    """
    if balancing and counts_E is None:
        counts_E = routing.counts()
    total = routing.scores.new_zeros(())
    for name, coefficient in balancing.items():
        assert counts_E is not None
        loss = BALANCERS.get(name).loss(routing, counts_E)
        if loss is not None:
            total = total + coefficient * loss
    return total
