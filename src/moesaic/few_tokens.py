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
from moesaic.experts.weights import ExpertWeights
from moesaic.routing import Router, Routing
from moesaic.routing.gate import Gate

MOST_TOKENS = 16
MOST_PRODUCTS = 1 << 20
"""Multiply-adds of the gate, and comparisons of the choice among its experts: both run on one thread."""
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
        self._kind, self._router_forward = type(router), router.__dict__.get("forward")
        self._ready: tuple[Any, RoutedLayer | None] | None = None
        self._calls: dict[int, int] = {}
        self._asked: int | None = None

    def __call__(self, layer: nn.Module, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Routing] | None:
        """``[T, D]`` and the routes; None where the layer has to go its own way.

        Args:
            layer: whose router and experts may be others by now.
            x_TD: ``[T, D]``. mask_T: ``[T]`` boolean, False for tokens that get no expert, or None.
        """
        # Looked at first: a program that is traced for any number of tokens must not be asked for theirs.
        if self._is_watched(x_TD, *(() if mask_T is None else (mask_T,))):
            return None
        tokens, parts, top_k = x_TD.shape[0], layer._modules, self.router.top_k
        if not 0 < tokens <= MOST_TOKENS or x_TD.stride(1) != 1:
            return None
        if parts["router"] is not self.router or parts["experts"] is not self.experts:
            return None
        gate = self.router.linear_gate()
        ready = None if gate is None else self._made_ready(x_TD, gate)
        if gate is None or ready is None or not 0 < top_k <= ready.num_experts:
            return None
        if tokens * ready.num_experts * max(ready.d_model, top_k**2) > MOST_PRODUCTS or not self._is_turn(tokens):
            return None
        mask_T = mask_T if mask_T is None else mask_T.contiguous()
        found = ready.run(x_TD, gate, top_k, mask_T)
        # Past nn.Module's own setting of attributes, which takes longer than it should here.
        self.experts.__dict__.update(last_choice=_CHOICE, last_counts=found.counts)
        if mask_T is None:
            mask_T = torch.ones(tokens, dtype=torch.bool)
        return found.y_TD, Routing(found.expert_ids, found.weights, found.scores, found.logits, token_mask=mask_T)

    def _is_watched(self, *given: Tensor) -> bool:
        """Whether the layer's modules must be called as such."""
        router, experts = self.router, self.experts
        return (
            not is_eager(*given)
            or not all(each.is_cpu for each in given)
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or is_row_invariant()
            or bool(router._forward_hooks or router._forward_pre_hooks)
            or bool(experts._forward_hooks or experts._forward_pre_hooks)
            or bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)
            or type(router) is not self._kind
            or type(experts) is not ExpertBank
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
        asked, self._asked = self._asked, None
        if asked is not None:
            choice = self.experts.last_choice
            # Another choice than native is asked again at the next call, as without the short way; so is one that was
            # only tried.
            native = choice is not None and choice.backend == "native" and choice.why != "exploring"
            self._calls[asked] = 1 if native else 0
        calls = self._calls.get(tokens, 0)
        if calls % TURN == 0:
            self._asked = tokens
            return False
        self._calls[tokens] = calls + 1
        return True

    def _made_ready(self, x_TD: Tensor, gate: Gate) -> RoutedLayer | None:
        """The experts, made ready again where weights have moved; None where compiled code cannot read them all."""
        experts = self.experts
        gates = (gate.weight, gate.bias, gate.selection, gate.unit_scale)
        tensors = (*experts._parameters.values(), *experts._buffers.values(), *gates)
        key = (x_TD.dtype, experts.activation, *(None if each is None else _layout(each) for each in tensors))
        ready = self._ready
        if ready is None or ready[0] != key:
            weights = experts.weights()
            ready = key, RoutedLayer(weights, x_TD.dtype) if _is_readable(x_TD, weights, gate) else None
            self._ready = ready
        return ready[1]

    def __getstate__(self) -> dict[str, Any]:
        # Addresses are of this process and of this copy.
        return {**self.__dict__, "_ready": None}


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """What compiled code knows of a tensor beside its values."""
    return type(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _is_readable(x_TD: Tensor, weights: ExpertWeights, gate: Gate) -> bool:
    """Whether experts and gate fit each other and the features, in devices, dtypes, shapes and memory."""
    if BACKENDS.get("native").refusal(x_TD, weights) is not None or x_TD.shape[1] != weights.d_model:
        return False
    vectors = [each for each in (gate.bias, gate.selection, gate.unit_scale) if each is not None]
    alike = [*weights.tensors().values(), gate.weight, *(each for each in vectors if each is not gate.selection)]
    beside = (weights.up_bias, weights.down_bias, weights.up_scale, weights.down_scale)
    # A copy made of what is not contiguous would miss changes of the values.
    contiguous = [gate.weight, *vectors, *(each for each in beside if each is not None)]
    return (
        is_eager(weights.up, weights.down, *contiguous)
        and all(each.is_cpu and each.is_contiguous() for each in contiguous)
        and all(each.dtype == x_TD.dtype for each in alike)
        and (gate.selection is None or gate.selection.dtype == torch.float32)
        and gate.weight.shape == (weights.num_experts, weights.d_model)
        and all(each.shape == (weights.num_experts,) for each in vectors)
    )


def few_tokens_of(layer: nn.Module) -> FewTokens | None:
    """The short way of a :class:`moesaic.MoE` layer, or None for one with more than a router and alike experts."""
    c: Any = layer.config
    plain = not (c.num_shared_experts or c.zero_computation_experts or c.capacity_factor or c.expert_d_ffs)
    plain = plain and c.iterations == 1 and c.communication_width is None
    router, experts = layer.router, layer.experts
    if not plain or not isinstance(router, Router) or type(experts) is not ExpertBank:
        return None
    # Not a class derived from one that has a gate: it may have changed any method that computes the routes.
    if "linear_gate" not in vars(type(router)) or router.linear_gate() is None:
        return None
    return FewTokens(router, experts)
