"""Another way to route for a model that has been trained: :func:`reroute`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from moesaic.config import MoEConfig
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.gates import Gate, GateRule, TakenIds, TokenIds, find_gates, gate_rule, refuse_sharded
from moesaic.hf.linears import shared_copy
from moesaic.layer import MoE, moe_layers
from moesaic.routing import ROUTERS, Router, Routing, RoutingContext, check_balancing, create_router
from moesaic.routing.layer_balancing import LayerBalancing
from moesaic.routing.router import check_top_k

# The models that are rerouted. Not their handles, which would keep them alive.
_REROUTED: WeakSet[nn.Module] = WeakSet()


class Rerouting:
    """What :func:`reroute` returns: the way back. As a context manager it goes back at the end of the block.

    ``layers`` names what was rerouted: the gates of a model of transformers, or the routers of one of ours.
    """

    def __init__(
        self,
        layers: list[str],
        taken: Callable[[], list[tuple[Tensor, int]]],
        undo: list[Callable[[], object]],
        check: Callable[[], object] | None = None,
    ) -> None:
        self.layers = layers
        # Of each layer the ids [T, K] of the last forward, and the number of feed-forward experts.
        self._taken, self._undo, self._check = taken, undo, check

    def remove(self) -> None:
        """Route as before, to the bit; calling it again does nothing. Refused (:class:`UnsupportedError`) for a model
        of ours that was spread over ranks meanwhile."""
        if self._undo and self._check is not None:
            self._check()
        while self._undo:
            self._undo.pop()()

    def experts_per_token(self) -> float:
        """Mean number of feed-forward experts that a token took, over the layers of the last forward; NaN before it."""
        taken = self._taken()
        used = sum(float((ids_TK < experts).sum()) for ids_TK, experts in taken)
        tokens = sum(len(ids_TK) for ids_TK, _ in taken)
        return used / tokens if tokens else float("nan")

    def __enter__(self) -> Rerouting:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def reroute(model: nn.Module, router: str | None = None, *, top_k: int | None = None, **options: Any) -> Rerouting:
    """Let a trained MoE model choose its experts in another way, with the gates that it has.

    The logits stay the model's own, its weights are not touched, and ``remove()`` of what is returned goes back to the
    model as it was. Experts that a token does not take are null slots, which cost nothing with
    ``experts_implementation="moesaic"``; with any other one they are computed, and weigh nothing.
    ``reroute(model, "top_p", top_k=8, threshold=0.6)`` lets a token take as many experts as it needs, 8 at most;
    ``reroute(model, top_k=4)`` only changes the number.

    Options that the router shares with the model's own rule keep the model's value where they are not given:
    ``normalize``, ``scale`` (which is kept where a router has no such option), ``num_groups``, ``top_groups``, and the
    selection bias. A gate of transformers is asked with a few random tokens for its rule.

    A model of ours saves and loads with the new router, as its configuration names it; one of transformers is saved as
    it was, and has to be rerouted again after loading. Gates are copied with their model, the way back is not.
    Either may be moved meanwhile.

    Args:
        model: a :class:`moesaic.MoE` or a module with some; or a model of transformers with experts of its experts
            interface, whose gates return logits, weights and ids of all experts.
        router: a name of ``moesaic.routing.available()``; by default the model's own.
        top_k: experts that a token takes, or may take at most; by default as many as before.
        options: that router's own.

    Raises:
        ConfigError: for an unknown router or option, or a model that is rerouted.
        UnsupportedError: for a model without MoE layers or spread over ranks, a gate of another form, a router that
            needs more than its logits, decides nothing or depends on later tokens, and a balancer that fails.
    """
    if model in _REROUTED:
        raise ConfigError("the model is rerouted already: call remove() of what reroute() returned first")
    refuse_sharded(model, "rerouted")
    if router is not None:
        _check_kind(router)
    layers = moe_layers(model)
    with torch.random.fork_rng(devices=[]):  # a router draws numbers when it is made
        handle = (_reroute_ours if layers else _reroute_gates)(model, router, top_k, options)
    _REROUTED.add(model)
    handle._undo.insert(0, partial(_REROUTED.discard, model))
    return handle


def _check_kind(router: str) -> None:
    kind = ROUTERS.get(router)
    if kind.is_causal and kind.decides:
        return
    ahead = "it decides nothing, but takes routes that were decided ahead of the layer"
    reason = ahead if kind.is_causal else "its choice depends on later tokens"
    raise UnsupportedError(f"a trained model cannot be rerouted by {router!r}: {reason}")


def _no_router() -> ConfigError:
    return ConfigError(f"name a router (one of {', '.join(ROUTERS.names())}), or give top_k alone")


def _known(router: str, inherited: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options``, and of the inherited ones those that the router has too."""
    keywords = ROUTERS.get(router).__init__.__kwdefaults__ or {}
    return {name: value for name, value in inherited.items() if name in keywords} | dict(options)


# --- models of transformers: a hook behind each gate


def _reroute_gates(model: nn.Module, router: str | None, top_k: int | None, options: Mapping[str, Any]) -> Rerouting:
    gates = find_gates(model)
    if not gates:
        raise UnsupportedError(
            f"{type(model).__name__} has no MoE layers to reroute: it must have moesaic's, or experts of transformers' "
            "experts interface"
        )
    if router is None:
        return _change_top_k(gates, top_k, options)
    tokens = TokenIds()
    # All of them before the first is changed: a gate that cannot be rerouted leaves the model as it was.
    hooks = [_Hook(router, gate_rule(gate), top_k, options, tokens, gate) for gate in gates]
    handles = [gate.module.register_forward_hook(hook) for gate, hook in zip(gates, hooks, strict=True)]
    if ROUTERS.get(router).reads_context:
        handles.append(model.register_forward_pre_hook(tokens, with_kwargs=True))
    return Rerouting(
        [gate.name for gate in gates],
        lambda: [hook.last for hook in hooks if hook.last],
        [handle.remove for handle in handles],
    )


def _change_top_k(gates: list[Gate], top_k: int | None, options: Mapping[str, Any]) -> Rerouting:
    """The model's own rule with another number of slots."""
    if top_k is None or options:
        raise _no_router()
    rules = [gate_rule(gate) for gate in gates]
    for gate, rule in zip(gates, rules, strict=True):
        gate_rule(gate, check_top_k(top_k, rule.num_experts))
    hooks = [TakenIds(rule) for rule in rules]
    undo: list[Callable[[], object]] = []
    for gate, hook in zip(gates, hooks, strict=True):
        undo.append(partial(setattr, gate.module, "top_k", gate.module.top_k))
        gate.module.top_k = top_k  # type: ignore[assignment]
        undo.append(gate.module.register_forward_hook(hook).remove)
    return Rerouting([gate.name for gate in gates], lambda: [hook.last for hook in hooks if hook.last], undo)


class _Hook:
    """After a gate's forward: what ``router`` makes of its logits, in place of what the gate made of them."""

    def __init__(
        self,
        router: str,
        rule: GateRule,
        top_k: int | None,
        options: Mapping[str, Any],
        tokens: TokenIds,
        gate: Gate,
    ) -> None:
        inherited = {"scale": rule.scale, "num_groups": rule.groups[0], "top_groups": rule.groups[1]}
        if rule.normalize is not None:
            inherited["normalize"] = rule.normalize
        known = _known(router, inherited, options)
        self.router = _router_of_logits(router, rule.num_experts, rule.top_k if top_k is None else top_k, known)
        if self.router.has_selection_bias and rule.selection_bias is not None:
            self.router.get_buffer("selection_bias").copy_(rule.selection_bias)
        self.router.to(next(gate.module.parameters()).device)
        self._made = self.router
        self.rule, self.tokens = rule, tokens
        self.config = getattr(gate.experts, "config", None)
        self.scale = 1.0 if "scale" in known else rule.scale
        self.last: tuple[Tensor, int] | None = None
        self._try()

    def __call__(self, gate: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        routing = self.route(self.rule.logits(output))
        weights_TK = routing.weights
        if self.rule.expert_scale is not None:
            last = self.rule.num_experts - 1
            weights_TK = weights_TK * self.rule.expert_scale.to(weights_TK)[routing.expert_ids.clamp(max=last)]
        if not torch.compiler.is_compiling():
            self.last = routing.expert_ids, self.rule.num_experts
        ids_TK = routing.expert_ids
        if getattr(self.config, "_experts_implementation", "moesaic") != "moesaic":
            # Not every implementation knows null slots: there they are computed, and count for nothing.
            ids_TK = ids_TK.masked_fill(ids_TK == self.rule.num_experts, 0)
        changed = list(output)
        _, weights, ids = self.rule.order
        changed[weights] = (weights_TK * self.scale).to(output[weights].dtype)
        changed[ids] = ids_TK
        return tuple(changed)

    def route(self, logits_TE: Tensor) -> Routing:
        device = logits_TE.device
        if any(buffer.device != device for buffer in self.router.buffers()):
            # The model was moved, of which its router here learns nothing. A copy: where it went may be without values.
            self.router = copy.deepcopy(self._made).to(device)
        if not self.router.reads_context:
            return self.router(logits_TE)  # type: ignore[no-any-return]
        ids_T = None if self.tokens.ids_T is None else self.tokens.ids_T.to(device)
        return self.router(logits_TE, None, RoutingContext(ids_T))  # type: ignore[no-any-return]

    def _try(self) -> None:
        """Whether the router can do with logits, and with token ids where it reads a context."""
        device = next(iter([*self.router.buffers(), torch.empty(0)])).device
        self.tokens.ids_T = torch.zeros(2, dtype=torch.int64, device=device)
        try:
            self.route(torch.zeros(2, self.rule.num_experts, device=device))
        except AttributeError as error:
            name = type(self.router).__name__
            raise UnsupportedError(
                f"{name} makes its logits in a way of its own, not as a trained gate does"
            ) from error
        finally:
            self.tokens.ids_T = None


def _float32(logits_TE: Tensor) -> Tensor:
    return logits_TE.float()


def _router_of_logits(name: str, num_experts: int, top_k: int, options: Mapping[str, Any]) -> Router:
    """A router whose features are the logits already."""
    router = create_router(name, num_experts, num_experts, top_k, **options).eval().requires_grad_(False)
    _check_own(name, router, {"weight": router._parameters.pop("weight", None)})
    router.__dict__["logits"] = _float32
    return router


def _check_own(name: str, router: Router, trained: Mapping[str, Tensor | None]) -> None:
    """Refuse a router with parameters that the model has no trained values of."""
    for key, parameter in router.named_parameters():
        value = trained.get(key)
        if value is None or value.shape != parameter.shape:
            raise UnsupportedError(
                f"the router {name!r} has a parameter {key!r} {list(parameter.shape)}, which this model was not "
                "trained with: take a router that works on a gate's logits alone"
            )


# --- models of ours: another router in each layer

_BACK = "routed as before: call remove() of what reroute() returned before moesaic.parallelize"


def _reroute_ours(model: nn.Module, router: str | None, top_k: int | None, options: Mapping[str, Any]) -> Rerouting:
    every = moe_layers(model)
    layers = [layer for layer in every if _has_gate(layer.router)]
    if not layers:
        raise UnsupportedError(f"the routers of {type(model).__name__} have no gate to keep")
    if router is None and (top_k is None or options):
        raise _no_router()
    # All of them before the first is changed. Layers that take another one's routes only learn of their number.
    configs = [
        _new_config(layer, router, top_k, options)
        if _has_gate(layer.router)
        else replace(layer.config, top_k=layer.config.top_k if top_k is None else top_k)
        for layer in every
    ]
    parts = [_parts(layer, config) for layer, config in zip(every, configs, strict=True)]
    undo: list[Callable[[], object]] = []
    for layer, config, own in zip(every, configs, parts, strict=True):
        undo.append(partial(_put_back, layer, layer.config, (layer.routers, layer.balancing)))
        _put(layer, config, own)
        layer.last_routings = ()
    settings = getattr(model, "config", None)
    if isinstance(settings, MoesaicConfig):
        first = configs[every.index(layers[0])]
        named: dict[str, Any] = {
            "router": first.router,
            "router_options": dict(first.router_options),
            "balancing": dict(first.balancing),
            "num_experts_per_tok": first.top_k,
        }
        undo.append(partial(settings.update, {name: getattr(settings, name) for name in named}))
        settings.update(named)
    names_of = {id(module): name for name, module in model.named_modules()}
    places = [f"{names_of[id(layer)]}.router".lstrip(".") for layer in layers]
    # Routers that FSDP has never seen would have no parameters; with another top_k they share all.
    check = None if router is None else partial(refuse_sharded, model, _BACK)

    def taken() -> list[tuple[Tensor, int]]:
        return [(r.expert_ids, r.num_ffn or r.num_experts) for layer in every for r in layer.last_routings]

    return Rerouting(places, taken, undo, check)


def _has_gate(router: nn.Module) -> bool:
    return isinstance(router, Router) and router._parameters.get("weight") is not None


def _new_config(layer: MoE, router: str | None, top_k: int | None, options: Mapping[str, Any]) -> MoEConfig:
    config = layer.config
    name = router or config.router
    known = _known(name, config.router_options, options)
    made = create_router(name, config.d_model, config.num_choices, config.top_k if top_k is None else top_k, **known)
    if (name, known) != (config.router, dict(config.router_options)):
        trained = dict(layer.router.named_parameters())
        if (shape := list(trained["weight"].shape)) != [config.num_choices, config.d_model]:
            raise UnsupportedError(
                f"this model's gates {shape} read something else than its features: only top_k may change"
            )
        _check_own(name, made, trained)
    tokens = RoutingContext(torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        trial = made(torch.zeros(2, config.d_model), None, *([tokens] if made.reads_context else []))
    kept = {key: entry for key, entry in config.balancing.items() if _goes_with(key, entry, made, trial)}
    return replace(config, router=name, router_options=known, top_k=made.top_k, balancing=kept)


def _goes_with(balancer: str, setting: Any, router: Router, trial: Routing) -> bool:
    """Whether a balancer has something to do with the router: ``bias_update`` may have nothing to move."""
    try:
        check_balancing({balancer: setting}, type(router))
        LayerBalancing({balancer: setting}, router.num_experts).eval().loss(trial)  # eval: asks no other rank
    except ConfigError:
        return False
    except Exception as error:  # a balancer is anybody's program
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(
            f"the balancer {balancer!r} fails on what {type(router).__name__} decides ({type(error).__name__}: "
            f"{reason}): where it cannot work with a router, its check or loss must raise a ConfigError"
        ) from error
    return True


def _parts(layer: MoE, config: MoEConfig) -> tuple[list[Router], nn.ModuleList]:
    """The routers and what balances them, for a layer with another configuration."""
    before = layer.config
    routers = layer.routers
    if (config.router, config.router_options) == (before.router, before.router_options):
        routers = [shared_copy(router) for router in routers]
        for router in routers:
            router.top_k = config.top_k
    else:
        routers = [_successor(router, config) for router in routers]
    balancing: Any = layer.balancing
    if config.balancing != before.balancing:
        made = nn.ModuleList(LayerBalancing(config.balancing, config.num_choices) for _ in balancing)
        made.load_state_dict(balancing.state_dict(), strict=False)
        balancing = made.to(layer.router.get_parameter("weight").device).train(layer.training)
    return routers, balancing


def _successor(old: Router, config: MoEConfig) -> Router:
    """A router as ``config`` says with the parameters of ``old``, which they share, and copies of its buffers."""
    with torch.device(old.get_parameter("weight").device):
        new = create_router(config.router, old.d_model, old.num_experts, config.top_k, **config.router_options)
    trained, kept = dict(old.named_parameters()), dict(old.named_buffers())
    for key in dict(new.named_parameters()):
        holder, _, name = key.rpartition(".")
        new.get_submodule(holder)._parameters[name] = trained[key]
    for key, buffer in new.named_buffers():
        if key in kept and kept[key].shape == buffer.shape:
            buffer.copy_(kept[key])
    new.num_ffn = old.num_ffn
    return new.train(old.training)


def _put_back(layer: MoE, config: MoEConfig, parts: tuple[list[Router], nn.ModuleList]) -> None:
    """As before, with the parameters that the layer has now, where it is now: it may have been moved meanwhile."""
    routers, balancing = parts
    for old, new in zip(routers, layer.routers, strict=True):
        if old._parameters is not new._parameters:
            for key, parameter in new.named_parameters():
                holder, _, name = key.rpartition(".")
                old.get_submodule(holder)._parameters[name] = parameter
        device = next(iter([*new.parameters(), *layer.parameters(), *layer.buffers()])).device
        old.to(device)
        balancing.to(device)
    _put(layer, config, (routers, balancing))


def _put(layer: MoE, config: MoEConfig, parts: tuple[list[Router], nn.ModuleList]) -> None:
    layer.config = config
    (layer.router, *others), layer.balancing = parts
    for number, router in enumerate(others):
        layer.next_routers[number] = router
