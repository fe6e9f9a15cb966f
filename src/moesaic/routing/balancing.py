"""Keeping the experts' load even: losses that are added to the training loss, and updates after a step.

A balancer is a class with two methods, ``loss`` and ``update``, of which it overrides what it needs, entered in
``BALANCERS``; a configuration names any number of them, each with its coefficient, its schedule and its options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.registry import Registry
from moesaic.routing import schedule
from moesaic.routing.options import check_options
from moesaic.routing.router import Router
from moesaic.routing.routing import Routing

BALANCERS: Registry[type[Balancer]] = Registry("balancer", lambda: Balancer)


class Balancer:
    """Base: no loss, no update.

    A balancer is constructed with its options: the keyword-only arguments of its ``__init__``, annotated as int, float,
    bool or str (``MoEConfig(balancing={"load_balancing": {"coefficient": 0.01, "per_rank": True}})``). One that has
    none may have static methods.

    ``over_batch`` says that its loss is told the slots of the whole batch of an optimizer step, as far as they are
    known: those of all ranks, and of all forwards since the last step.
    """

    over_batch: ClassVar[bool] = False

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor | None:
        """A float32 scalar to be multiplied by the coefficient and added to the training loss; None for none.

        The losses of several ranks or forwards, each weighted by its tokens, should add up to that of all tokens.

        Args:
            routing: of this process's tokens.
            counts_E: ``[E]`` int64, slots that each expert was asked for: by these tokens, after
                :func:`moesaic.parallelize` by those of all ranks, with ``over_batch`` by those of the batch.
        """
        return None

    def update(self, router: Router, counts_E: Tensor, coefficient: float | Tensor) -> None:
        """Called once after each optimizer step.

        Args:
            counts_E: ``[E]`` int64, slots that each expert was asked for since the last step, by the tokens of all
                ranks.
            coefficient: a number, or a float32 scalar on the router's device where it has a schedule.
        """

    @staticmethod
    def check(router: type[Router]) -> None:
        """Raise :class:`ConfigError` where this balancer cannot work with that router."""

    def check_choices(self, num_choices: int) -> None:
        """Raise :class:`ConfigError` where this balancer, with its options, cannot work with that many columns."""


@BALANCERS.register("load_balancing")
class LoadBalancing(Balancer):
    """E · Σ_e f_e · P_e (Switch Transformers, section 2.2, equations 4 to 6), 1 for an even load, whatever K is.

    f_e is expert e's share of the slots routed in one forward, P_e its mean share of the scores. Scores that do not sum
    to 1 over the experts (sigmoid) are normalized per token first (DeepSeek-V3, equations 17 to 20).

    Args:
        per_rank: f from this rank's own tokens, also after :func:`moesaic.parallelize`, which knows those of all ranks:
            the micro-batch loss that ``global_load_balancing`` is compared with.
    """

    def __init__(self, *, per_rank: bool = False) -> None:
        self.per_rank = per_rank

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        return load_balancing(routing, routing.counts() if self.per_rank else counts_E)


@BALANCERS.register("global_load_balancing")
class GlobalLoadBalancing(Balancer):
    """E · Σ_e f_e · P_e with f of the whole batch of an optimizer step, and P of each forward's own tokens (Demons in
    the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Expert Models, "global-batch
    LBL"): experts may specialize within a sequence, and are even over the batch.

    f has no gradient and the loss is linear in P: the losses of ranks and forwards, each weighted by its tokens, add up
    to the loss of the batch in one piece, given the same f. The tokens of all ranks are counted. Of the forwards of one
    step (gradient accumulation) f counts those done so far, as with the paper's buffer: the first ones know less than
    the last one. :func:`moesaic.routing.counting` tells all of them the same, and makes it exact.

    In evaluation it is ``load_balancing``. Where ``torch.distributed`` is initialized, every rank must take part.
    """

    over_batch = True

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        return load_balancing(routing, counts_E)


@BALANCERS.register("z_loss")
class ZLoss(Balancer):
    """Mean over the tokens of logsumexp(logits)² (ST-MoE, section 3.3, equation 5): keeps the logits small."""

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        if routing.logits is None:
            raise ConfigError("the balancer 'z_loss' needs a router that has logits")
        return mean_over_tokens(routing.logits.logsumexp(dim=-1, keepdim=True).square(), routing).squeeze()

    @staticmethod
    def check(router: type[Router]) -> None:
        if not router.has_logits:
            raise ConfigError(f"the balancer 'z_loss' needs a router that has logits; {router.__name__} has none")


@BALANCERS.register("bias_update")
class BiasUpdate(Balancer):
    """Auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2; Wang et al., algorithm 1).

    After each step the selection bias of an expert with less than the mean load goes up by the coefficient, that of
    one with more goes down. No gradient is involved.
    """

    def update(self, router: Router, counts_E: Tensor, coefficient: float | Tensor) -> None:
        load_E = counts_E.to(torch.float32)
        router.get_buffer("selection_bias").add_(torch.sign(load_E.mean() - load_E) * coefficient)

    @staticmethod
    def check(router: type[Router]) -> None:
        if not router.has_selection_bias:
            raise ConfigError(
                f"the balancer 'bias_update' needs a router with a selection_bias; {router.__name__} has none"
            )


def load_balancing(routing: Routing, counts_E: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e of a routing's scores, f in proportion to ``counts_E``: a float32 scalar."""
    fraction_E = counts_E / counts_E.sum().clamp(min=1)
    return routing.num_experts * (fraction_E * mean_over_tokens(shares(routing.scores), routing)).sum()


def mean_over_tokens(values_TX: Tensor, routing: Routing) -> Tensor:
    """``[X]``: mean over all tokens but padding, also those that took no expert.

    Where no layer has told which those are (``routing.token_mask`` is None), tokens whose slots are all null count as
    padding: :meth:`Routing.without` makes them so.
    """
    mask_T = routing.token_mask
    if mask_T is None:
        mask_T = (routing.expert_ids < routing.num_experts).any(dim=-1)
    here_T1 = mask_T.unsqueeze(-1)
    return torch.where(here_T1, values_TX, 0.0).sum(dim=0) / here_T1.sum().clamp(min=1)


def shares(scores_TE: Tensor) -> Tensor:
    """``[T, E]``: scores divided by their sum; 0 for a token all of whose scores are 0."""
    sum_T1 = scores_TE.sum(dim=-1, keepdim=True)
    return scores_TE / sum_T1.clamp(min=torch.finfo(sum_T1.dtype).tiny)


def create_balancer(name: str, entry: float | Mapping[str, Any]) -> tuple[Balancer, schedule.Schedule]:
    """What an entry of ``balancing`` stands for.

    Args:
        entry: the coefficient, or a table of it, of the other keys of its :class:`Schedule`, and of the balancer's own
            options.

    Raises:
        ConfigError: for an unknown balancer or key, and for values out of range.
    """
    kind = BALANCERS.get(name)
    planned = schedule.schedule_of(name, entry)
    options = {} if not isinstance(entry, Mapping) else {k: v for k, v in entry.items() if k not in schedule.KEYS}
    check_options(f"balancer {name!r}", kind, options, besides=schedule.KEYS)
    return kind(**options), planned


def check_balancing(balancing: Mapping[str, Any], router: type[Router], num_choices: int | None = None) -> None:
    """Refuse balancers that are unknown or do not go with the router, unknown keys, and values out of range.

    Args:
        num_choices: what the router chooses among, where that is known.
    """
    if not isinstance(balancing, Mapping):
        raise ConfigError(f"balancing is {balancing!r}: it must be a table of balancers and their coefficients")
    for name, entry in balancing.items():
        BALANCERS.get(name).check(router)
        balancer, _ = create_balancer(name, entry)
        if num_choices is not None:
            balancer.check_choices(num_choices)


def has_loss(balancer: Balancer) -> bool:
    """Whether the balancer adds something to the training loss."""
    return type(balancer).loss is not Balancer.loss


def acts_after_step(balancer: Balancer) -> bool:
    """Whether the balancer has an ``update``, and so needs the slots counted."""
    return type(balancer).update is not Balancer.update


def balance_loss(routing: Routing, balancing: Mapping[str, Any], counts_E: Tensor | None = None) -> Tensor:
    """Σ coefficient · loss over the named balancers, as they are in the first step: a float32 scalar, 0 without any.

    Args:
        counts_E: ``[E]`` int64, slots per expert; the routing's own by default.
    """
    if balancing and counts_E is None:
        counts_E = routing.counts()
    total = routing.scores.new_zeros(())
    for name, entry in balancing.items():
        assert counts_E is not None
        balancer, planned = create_balancer(name, entry)
        loss = balancer.loss(routing, counts_E)
        if loss is not None:
            total = total + planned.at(counts_E.new_zeros(())) * loss
    return total
