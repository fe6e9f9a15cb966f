"""A frozen layer's short way for a few tokens: router and experts in one native call.

For one token through small experts the calls in Python between router and experts take longer than reading the weights:
measured for 16 experts of 96 hidden neurons at width 576 in bfloat16, 0.2 ms of 0.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from moesaic.autotune.process import needs_every_call
from moesaic.autotune.setting import is_tuning_on
from moesaic.eager import is_eager
from moesaic.experts import Choice, ExpertBank
from moesaic.experts.backend import AUTO, BACKENDS, current_backend
from moesaic.experts.low_rank import low_rank_of
from moesaic.experts.native.routed import RoutedLayer
from moesaic.experts.row_invariance import is_row_invariant
from moesaic.routing import Router, Routing

MOST_TOKENS = 16
MOST_PRODUCTS = 1 << 20
"""Multiply-adds of the gate, which runs on one thread."""
TURN = 128
"""Every so many calls with as many tokens go the long way, by which the tuner learns whether ``native`` is the best."""
_CHOICE = Choice("native", "routed")


class FewTokens:
    """Computes a layer's calls of few tokens where nobody looks on and nothing but router and experts takes part.

    It steps aside, for the layer's own forward, where a gradient is recorded or the call is traced; with hooks on
    router or experts, adapters, experts over ranks, another backend than ``native``, and where results are to be
    repeatable bit for bit (:mod:`moesaic.experts.row_invariance`; ``"auto"`` recorded, replayed, or without learning).

    Args:
        router: of the layer. experts: its only bank.
    """

    def __init__(self, router: Router, experts: ExpertBank) -> None:
        self.router, self.experts = router, experts
        self._router_forward = router.__dict__.get("forward")
        self._ready: tuple[Any, RoutedLayer] | None = None
        self._calls: dict[int, int] = {}
        self._asked: int | None = None

    def __call__(self, layer: nn.Module, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routing] | None:
        """``[T, D]`` and the routes; None where the layer has to go its own way.

        Args:
            layer: whose router and experts may be others by now.
            x_TD: ``[T, D]``. mask_T: ``[T]`` boolean, False for tokens that get no expert, or None.
        """
        tokens, parts = x_TD.shape[0], layer._modules
        if not 0 < tokens <= MOST_TOKENS or self._is_watched(x_TD):
            return None
        if parts["router"] is not self.router or parts["experts"] is not self.experts:
            return None
        ready, gate = self._made_ready(x_TD), self.router.linear_gate()
        if ready is None or gate is None or not self._is_turn(tokens):
            return None
        mask_T = mask_T if mask_T is None else mask_T.contiguous()
        found = ready.run(x_TD, gate, self.router.top_k, mask_T)
        # Past nn.Module's own setting of attributes, which takes longer than it should here.
        self.experts.__dict__.update(last_choice=_CHOICE, last_counts=found.counts)
        if mask_T is None:
            mask_T = torch.ones(tokens, dtype=torch.bool)
        return found.y_TD, Routing(found.expert_ids, found.weights, found.scores, found.logits, token_mask=mask_T)

    def _is_watched(self, x_TD: Tensor) -> bool:
        """Whether the layer's modules must be called as such."""
        router, experts = self.router, self.experts
        return (
            not is_eager(x_TD, router.weight)
            or not x_TD.is_cpu
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or is_row_invariant()
            or bool(router._forward_hooks or router._forward_pre_hooks)
            or bool(experts._forward_hooks or experts._forward_pre_hooks)
            or bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)
            or router.__dict__.get("forward") is not self._router_forward
            or "forward" in experts.__dict__
            or router.logit_shift is not None
            or experts.parallel is not None
            or experts.slots is not None
            or low_rank_of(experts) is not None
            or torch._C._len_torch_function_stack() > 0
        )

    def _is_turn(self, tokens: int) -> bool:
        """Whether the short way is to be taken: where ``native`` is asked for, or was the best the last long way."""
        name = current_backend()
        if name != AUTO:
            return name == "native"
        if torch.are_deterministic_algorithms_enabled() or not is_tuning_on() or needs_every_call():
            return False
        if self._asked is not None:
            choice = self.experts.last_choice
            # Another choice than native is asked again at the next call, as without the short way.
            self._calls[self._asked] = 1 if choice is not None and choice.backend == "native" else 0
            self._asked = None
        calls = self._calls.get(tokens, 0)
        if calls % TURN == 0:
            self._asked = tokens
            return False
        self._calls[tokens] = calls + 1
        return True

    def _made_ready(self, x_TD: Tensor) -> RoutedLayer | None:
        """The experts, made ready again where their weights have moved; None where the kernels cannot compute them."""
        experts, router = self.experts, self.router
        tensors = (*experts._parameters.values(), *experts._buffers.values())
        key = (x_TD.dtype, *(None if each is None else each.data_ptr() for each in tensors))
        if self._ready is None or self._ready[0] != key:
            weights = experts.weights()
            if any(each.dtype != x_TD.dtype for each in weights.tensors().values()):
                return None
            if BACKENDS.get("native").refusal(x_TD, weights) is not None:
                return None
            self._ready = key, RoutedLayer(weights, x_TD.dtype)
        alike = all(each is None or each.dtype == x_TD.dtype for each in router._parameters.values())
        if not alike or not router.weight.is_contiguous() or x_TD.stride(1) != 1:
            return None
        return self._ready[1] if router.weight.numel() * x_TD.shape[0] <= MOST_PRODUCTS else None

    def __getstate__(self) -> dict[str, Any]:
        # Addresses are of this process and of this copy.
        return {**self.__dict__, "_ready": None}


def few_tokens_of(layer: nn.Module) -> FewTokens | None:
    """The short way of a :class:`moesaic.MoE` layer, or None for one with more than a router and alike experts."""
    c: Any = layer.config
    plain = not (c.num_shared_experts or c.zero_computation_experts or c.capacity_factor or c.expert_d_ffs)
    plain = plain and c.iterations == 1 and c.communication_width is None
    router, experts = layer.router, layer.experts
    if not plain or not isinstance(router, Router) or type(experts) is not ExpertBank or not _is_gate(router):
        return None
    return FewTokens(router, experts)


def _is_gate(router: Router) -> bool:
    """Whether a router is no more than its gate, also where its class is somebody's own, derived from one of ours."""

    def place(name: str) -> int:
        return next(index for index, kind in enumerate(type(router).__mro__) if name in vars(kind))

    as_told = all(place(name) >= place("linear_gate") for name in ("forward", "logits", "slots", "__call__"))
    return as_told and router.linear_gate() is not None
