"""The MoE layer: route, dispatch, compute, combine.

T tokens · D model width · E experts · K slots per token. Follow a token: ``MoE.forward`` here, ``Dispatch`` in
``dispatch.py``, ``compute`` in ``experts/backend.py``, a backend in ``experts/``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic import autotune  # noqa: F401  (makes "auto" tuned)
from moesaic.config import MoEConfig
from moesaic.dispatch import Dispatch
from moesaic.errors import ConfigError
from moesaic.experts import Choice, SharedExperts
from moesaic.experts.kinds import ZeroComputationExperts
from moesaic.experts.slots import ExpertSlots
from moesaic.experts.unequal import banks_of, experts_of_widths
from moesaic.experts.width import WidthProjection
from moesaic.few_tokens import FewTokens
from moesaic.routing import (
    LayerBalancing,
    Router,
    Routing,
    RoutingContext,
    create_router,
    limit_capacity,
)
from moesaic.routing.capacity import ffn_factor
from moesaic.routing.compaction import compact


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer: ``[..., D]`` to ``[..., D]``.

    After a forward, ``last_routing`` is its :class:`Routing` (for reading: cut off from the autograd graph, which it
    would keep in memory; a loss of one's own is a balancer), ``last_routings`` those of all iterations, and
    ``aux_loss`` a float32 scalar to be added to the training loss (0 where the configuration names no balancing loss);
    ``last_choice`` says which backend computed it, and why. After an optimizer step call :meth:`after_step`, or
    :func:`update_balancing` for a whole model: balancers without a loss act there.
    """

    experts: Any  # an ExpertBank, or UnequalExperts
    last_routings: tuple[Routing, ...]
    aux_loss: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.router, *others = (
            create_router(c.router, c.d_model, c.num_choices, c.top_k, **c.router_options) for _ in range(c.iterations)
        )
        for router in others:
            router.follow(self.router)
        self.next_routers = nn.ModuleList(others)
        if c.num_choices > c.num_experts:
            for router in self.routers:
                router.num_ffn = c.num_experts
        width = c.communication_width or c.d_model
        self.experts = experts_of_widths(width, c.expert_d_ffs or [c.d_ff] * c.num_experts, c.activation, c.bias)
        self.descend: WidthProjection | None = None
        self.ascend: WidthProjection | None = None
        if c.communication_width is not None:
            self.descend, self.ascend = WidthProjection(c.d_model, width), WidthProjection(width, c.d_model)
        self.zero_computation: ZeroComputationExperts | None = None
        if c.num_choices > c.num_experts:
            self.zero_computation = ZeroComputationExperts(c.d_model, c.zero_computation_experts)
        self.shared: SharedExperts | None = None
        if c.num_shared_experts:
            shared_d_ff = c.shared_d_ff or c.d_ff
            self.shared = SharedExperts(
                c.d_model, shared_d_ff, c.num_shared_experts, c.activation, c.bias, c.shared_gate
            )
        self.balancing = nn.ModuleList(LayerBalancing(c.balancing, c.num_choices) for _ in range(c.iterations))
        self.last_routings = ()
        self.aux_loss = _no_loss()
        self.few_tokens: FewTokens | None = None  # set by moesaic.freeze

    def forward(
        self,
        x: Tensor,
        *,
        top_k: int | None = None,
        capacity_factor: float | None = None,
        token_mask: Tensor | None = None,
        context: RoutingContext | None = None,
    ) -> Tensor:
        """Route every token, run its experts, and sum what they say.

        1. the router gives each token K experts and weights, unless the context brings routes decided ahead;
        2. tokens masked out, and slots beyond an expert's capacity, become null slots, which cost nothing;
        3. rows grouped by expert go through the chosen backend, and come back weighted and summed. After
           :func:`moesaic.parallelize` all ranks do so together, each for its own tokens.

        With ``iterations`` above 1 the sum is added to the tokens, which the next router routes again, and so on
        (Chain-of-Experts, section 3, equations 4 to 8; shared experts take part in each iteration). What is returned is
        all that was added to ``x``, there x⁽ᶜ⁾ − x⁽⁰⁾, for the block around the layer adds its own input again.

        Args:
            x: ``[..., D]`` floating point.
            top_k, capacity_factor: override the configuration for this call. Routes that the context brings keep the
                slots that they have: ``top_k`` is then for the iterations after the first one only.
            token_mask: ``[...]`` boolean, False for tokens (padding) that get no routed expert. Those that were masked
                when their routes were decided ahead get none either.
            context: what the router may know beyond ``x``; its ``left`` is then what this one leaves to the next layer.

        Raises:
            ConfigError: for a wrong width, a mask of another shape, a ``top_k`` out of range, or routes given for other
                tokens or experts.
        """
        x_TD, mask_T = self._tokens(x), self._mask(token_mask, x)
        told = context or RoutingContext()
        if self.few_tokens is not None and top_k is None and not capacity_factor and told.given is None:
            if (found := self.few_tokens(self, x_TD, mask_T)) is not None:
                return self._left_by(x, *found, told)
        context = replace(told)
        factor = self.config.capacity_factor if capacity_factor is None else capacity_factor
        context.token_mask = mask_T
        if context.given is None:
            asked = self.decide(x, top_k=top_k, token_mask=token_mask, context=context)
        else:
            asked = self._noted(context.routes_for(x_TD.shape[0], self.config.num_choices), context, x)
            context.token_mask = asked.token_mask
        first, *others = self.balancers
        y_TD, routing, aux_loss = self._step(x_TD, asked, factor, first)
        routings = [routing]
        for router, balancing in zip(self.routers[1:], others, strict=True):
            h_TD, context.carried = x_TD + y_TD, context.left
            asked = self._noted(self._ask(router, h_TD, top_k, context), context, x)
            more_TD, routing, more_loss = self._step(h_TD, asked, factor, balancing)
            y_TD, aux_loss = y_TD + more_TD, aux_loss + more_loss
            routings.append(routing)
        told.left = context.left
        # At the end: what activation checkpointing recomputes stops before it, and the losses of the forward stay.
        self.aux_loss, self.last_routings = aux_loss, tuple(routings)
        y: Tensor = y_TD.view(x.shape)
        return y

    def decide(
        self,
        features: Tensor,
        *,
        top_k: int | None = None,
        token_mask: Tensor | None = None,
        context: RoutingContext | None = None,
    ) -> Routing:
        """The routes of the tokens whose features these are; :meth:`forward` takes them ahead of its own by
        ``RoutingContext(given=...)``.

        Args:
            features: ``[..., D]`` floating point. The others are as :meth:`forward` takes them.
        """
        told = context or RoutingContext()
        context = replace(told, token_mask=self._mask(token_mask, features))
        routing = self._ask(self.router, self._tokens(features), top_k, context)
        told.left = context.left
        return self._noted(routing, context, features)

    def _left_by(self, x: Tensor, y_TD: Tensor, routing: Routing, context: RoutingContext) -> Tensor:
        """The end of a forward that :class:`FewTokens` has computed."""
        routing.sequence_length = x.shape[-2] if x.ndim > 2 else None
        context.left = None
        # Past nn.Module's own setting of attributes, which takes longer than it should here.
        self.__dict__.update(aux_loss=self.balancers[0].loss(routing), last_routings=(routing,))
        return y_TD.view(x.shape)

    @property
    def routers(self) -> list[Router]:
        """The router of each iteration."""
        return [self.router, *self.next_routers]

    @property
    def balancers(self) -> list[LayerBalancing]:
        """What balances the router of each iteration."""
        balancing: Any = self.balancing
        return list(balancing)

    @property
    def slot_counts(self) -> Tensor:
        """``[E]`` int64: slots since the last optimizer step, of all iterations, where a balancer acts after it."""
        first, *others = self.balancers
        return sum((balancing.slot_counts for balancing in others), first.slot_counts)

    @property
    def last_routing(self) -> Routing | None:
        """The last forward's routing (of its first iteration); None before the first one."""
        return self.last_routings[0] if self.last_routings else None

    @property
    def last_choice(self) -> Choice | None:
        """Which backend computed the last forward, and why; None before the first one."""
        choice: Choice | None = self.experts.last_choice
        return choice

    @property
    def last_decision(self) -> Any:
        """How :func:`moesaic.parallelize`'s ranks carried out the last forward; None in one process."""
        return self.experts.last_decision

    def after_step(self) -> None:
        """Let the balancers that work without a loss act, once after each optimizer step."""
        for balancing, router in zip(self.balancers, self.routers, strict=True):
            balancing.after_step(router)

    def expert_sizes(self) -> list[int]:
        """Parameters of each feed-forward expert."""
        sizes: list[int] = []
        for bank, own in banks_of(self.experts, self.config.num_experts):
            sizes += [sum(parameter.numel() for parameter in bank.parameters()) // len(own)] * len(own)
        return sizes

    def idle_parameters(self) -> int:
        """Parameters of the feed-forward experts that a token does not meet, at least: it may take the widest ones,
        others in each iteration, and with an adaptive router as many as that one may give it."""
        return sum(sorted(self.expert_sizes(), reverse=True)[self.config.top_k * self.config.iterations :])

    def _ask(self, router: Router, features_TD: Tensor, top_k: int | None, context: RoutingContext) -> Routing:
        """What a router decides; leaves what it carries in the context."""
        # Any module that gives a Routing will do in the router's place.
        told = (context,) if getattr(router, "reads_context", False) else ()
        routing: Routing = router(features_TD, top_k, *told)
        context.left = routing.carry
        return routing

    def _noted(self, routing: Routing, context: RoutingContext, x: Tensor) -> Routing:
        """The routing with what only the layer knows; tokens that are masked out get no expert."""
        num_ffn = None if self.zero_computation is None else self.config.num_experts
        length = x.shape[-2] if x.ndim > 2 else None
        masks = [mask_T for mask_T in (context.token_mask, routing.token_mask) if mask_T is not None]
        if masks:  # both where routes were decided ahead under a mask of their own
            mask_T = masks[0] if len(masks) == 1 else masks[0] & masks[1]
            routing = routing.without(~mask_T.unsqueeze(1))
        else:
            mask_T = torch.ones(routing.expert_ids.shape[0], dtype=torch.bool, device=routing.expert_ids.device)
        return replace(routing, num_ffn=num_ffn, sequence_length=length, token_mask=mask_T)

    def _step(
        self, x_TD: Tensor, asked: Routing, factor: float, balancing: LayerBalancing
    ) -> tuple[Tensor, Routing, Tensor]:
        """Once through the experts of all kinds: ``[T, D]`` of what they say; what was granted; the loss."""
        routing = limit_capacity(asked, factor, self.config.capacity_tau)
        rows_TX = x_TD if self.descend is None else self.descend(x_TD)
        y_TX, counts_E = self._compute(rows_TX, asked, routing, factor)
        y_TD = y_TX if self.ascend is None else self.ascend(y_TX)
        beside_TD = None if self.zero_computation is None else self.zero_computation(x_TD, routing)
        if beside_TD is not None:
            y_TD = y_TD + beside_TD.to(y_TD.dtype)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        # Before capacity dropped slots: a balancer must see what the router asked for, not what was granted.
        return y_TD, routing.detach(), balancing.loss(asked, counts_E)

    def _compute(self, x_TD: Tensor, asked: Routing, routing: Routing, factor: float) -> tuple[Tensor, Tensor | None]:
        """``[T, D]``: the weighted sum of the feed-forward experts. Over ranks also ``[E]``: the slots that the tokens
        of all ranks asked for, which their exchange knows anyway."""
        c = self.config
        outputs, counts = [], []
        for bank, own in banks_of(self.experts, c.num_experts):
            part = routing.part(own)
            if bank.__dict__.get("parallel") is None:
                alike = len(own) == c.num_experts  # padding is for experts that are all alike
                outputs.append(bank(x_TD, self._dispatch(bank, part, factor if alike else 0.0)))
            else:
                outputs.append(self._over_ranks(bank, x_TD, asked, part, own))
                counts.append(bank.parallel.asked_E)
        return sum(outputs[1:], outputs[0]), torch.cat(counts) if counts else None

    def _dispatch(self, bank: Any, part: Routing, factor: float) -> Dispatch:
        # PEFT puts a wrapper in the bank's place, which knows its parameters only.
        slots: ExpertSlots | None = getattr(bank, "slots", None)
        if slots is None or slots.is_idle:
            c = self.config
            own_factor = ffn_factor(factor, c.num_experts, c.num_choices - c.num_experts, c.capacity_tau)
            # Padded, an expert's capacity hangs on the number of slots.
            return Dispatch.from_routing(part if own_factor > 0 else compact(part), own_factor)
        # Without padding: the capacity that was granted is an expert's, whoever of its adapters' copies uses it.
        return Dispatch.from_slots(slots.reroute(part.expert_ids), part.weights, slots.in_use)

    def _over_ranks(self, bank: Any, x_TD: Tensor, asked: Routing, part: Routing, own: range) -> Tensor:
        from moesaic.parallel.sharding import forward_sharded  # its imports take a while

        asked_E = None
        if self.config.balancing and part is not asked:
            # Experts of other kinds are on no rank: the last bank tells how often they were asked for.
            end = None if own.stop == self.config.num_experts else own.stop
            asked_E = asked.counts()[own.start : end]
        return forward_sharded(bank, x_TD, part.expert_ids, part.weights, asked_E)

    def _tokens(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.config.d_model:
            raise ConfigError(f"the layer takes features of width d_model = {self.config.d_model}, got {list(x.shape)}")
        return x.reshape(-1, self.config.d_model)

    @staticmethod
    def _mask(token_mask: Tensor | None, x: Tensor) -> Tensor | None:
        if token_mask is None:
            return None
        if token_mask.shape != x.shape[:-1]:
            raise ConfigError(f"token_mask has shape {list(token_mask.shape)}, but the tokens {list(x.shape[:-1])}")
        return token_mask.reshape(-1).bool()

    def __getstate__(self) -> dict[str, Any]:
        # What the last forward left hangs on its autograd graph, which can be neither copied nor pickled.
        return {**self.__dict__, "last_routings": (), "aux_loss": _no_loss()}


def _no_loss() -> Tensor:
    # On the CPU even where a model is built on the meta device: loading puts values into parameters and buffers only.
    return torch.zeros((), dtype=torch.float32, device="cpu")


def moe_layers(model: nn.Module) -> list[MoE]:
    """The MoE layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def update_balancing(model: nn.Module) -> None:
    """Call :meth:`MoE.after_step` of every layer of a model; call it after each optimizer step."""
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.after_step()
