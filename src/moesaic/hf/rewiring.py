"""Rerouting at test time: vectors that are added to the routers' logits, optimized on the text at hand.

Followed is Rewiring Experts on the Fly: Continuous Rerouting for Better Online Adaptation in Mixture-of-Expert Models,
which was read through its published abstract and reviews of it; its full text was not to be had. A context, the prompt
and what has been generated so far, is its own training example: a few gradient steps on its next-token loss move one
vector δ ``[E]`` a layer, z̃ = z + δ, and nothing else. Then the model generates as usual, until the next optimization.
Only selected layers are moved, those whose routers are most confident.

The share of the layers that move (``layers``, 0.5 by default) is ours. So is Adam, without decay, new for each
optimization, while δ goes on from the one before. After an optimization the keys and values of the whole context are
computed anew, as the routes that made them are others now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moesaic.errors import ConfigError, UnsupportedError
from moesaic.hf.gates import Gate, find_gates, gate_rule, refuse_sharded
from moesaic.layer import moe_layers
from moesaic.routing import Router, Routing
from moesaic.routing.options import is_of

# What gates multiply with.
_PRODUCTS = {F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


@dataclass(frozen=True)
class Rewiring:
    """How :class:`Rewirer` and :func:`moesaic.hf.generation.generate` reroute; the defaults of ``steps``,
    ``learning_rate`` and ``interval`` are the paper's, as reviews report them. A :class:`Rewirer` reads all but
    ``interval``.

    Args:
        steps: gradient steps of each optimization.
        learning_rate: about how far a step moves each element of a vector.
        interval: new tokens between two optimizations; 0 for one only, on the prompt. Only
            :func:`moesaic.hf.generation.generate` and ``moesaic generate --rewire`` go by it.
        layers: the share of the layers whose vectors an optimization moves, above 0 and at most 1; those with the
            highest confidence on the context, at least one.
        max_tokens: an optimization reads so many tokens at most, the last ones of the context: its memory grows with
            their number, as that of a training step does.

    Raises:
        ConfigError: for a value out of range.
    """

    steps: int = 5
    learning_rate: float = 0.05
    interval: int = 128
    layers: float = 0.5
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        checks: list[tuple[str, type, Callable[[float], bool], str]] = [
            ("steps", int, lambda value: value >= 1, "a whole number, at least 1"),
            ("learning_rate", float, lambda value: value > 0, "above 0"),
            ("interval", int, lambda value: value >= 0, "a whole number, at least 0 (0 is the prompt only)"),
            ("layers", float, lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("max_tokens", int, lambda value: value >= 2, "a whole number, at least 2"),
        ]
        for name, kind, good, allowed in checks:
            value = getattr(self, name)
            if not is_of(kind, value) or not good(value):
                raise ConfigError(f"{name} of the rewiring is {value!r}: it must be {allowed}")


@dataclass(frozen=True)
class Rewired:
    """One optimization: the context's tokens, its mean loss at each step, and the layers that were moved."""

    tokens: int
    losses: list[float]
    layers: list[str]


class Rewirer:
    """A model whose routers' logits are shifted, for as long as the block lasts; its weights stay what they are.

    >>> with moesaic.Rewirer(model, moesaic.Rewiring(steps=5)) as rewirer:  # doctest: +SKIP
    ...     rewirer.optimize(ids_1S)
    ...     model.generate(ids_1S, max_new_tokens=100)

    So ``model.generate`` writes with the routing of the prompt, for models of ours and of transformers alike. Another
    optimization every ``interval`` tokens is what :func:`moesaic.hf.generation.generate` does, and ``model.generate``
    does not.

    ``vectors`` are the layers' δ, float32 ``[E]`` (zeros at first), by the names of routers and gates. They outlast the
    block: entered again, the rewirer goes on from them. For another text take another rewirer. The model may be moved
    to another device: they follow.

    Raises:
        ConfigError: where it is entered twice at a time.
        UnsupportedError: for a model without MoE layers, or with gates of another form than
            :func:`moesaic.reroute` knows; one that is wrapped by :func:`moesaic.parallelize` or FSDP.
    """

    def __init__(self, model: PreTrainedModel, settings: Rewiring | None = None) -> None:
        self.model, self.settings = model, settings or Rewiring()
        refuse_sharded(model, "rewired")
        with torch.inference_mode(False):  # a tensor that is made under it can have no gradient
            self._shifts = _shifts(model)
        self._stack = ExitStack()
        self._entered = False

    @property
    def vectors(self) -> dict[str, Tensor]:
        return {shift.name: shift.vector for shift in self._shifts}

    def __enter__(self) -> Rewirer:
        if self._entered:
            raise ConfigError("this Rewirer is entered already: its vectors would be added twice")
        self._entered = True
        for shift in self._shifts:
            self._stack.callback(shift.install())
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._entered = False

    def optimize(self, ids_1S: Tensor) -> Rewired:
        """Move the vectors by ``settings.steps`` steps on the next-token loss of ``ids_1S`` (``[1, S]`` int64).

        A context of one token has no next one: nothing moves.

        Raises:
            ConfigError: outside of the ``with`` block, or for several texts: routing adapts to one.
            UnsupportedError: where the loss has no gradient by the logits, as with one expert of weight 1 a token.
        """
        settings = self.settings
        if not self._entered:
            raise ConfigError("optimize() works inside the Rewirer's with block: with Rewirer(model) as rewirer: ...")
        if ids_1S.ndim != 2 or ids_1S.shape[0] != 1:
            raise ConfigError(f"the token ids are {list(ids_1S.shape)}: routing adapts to one text at a time, [1, S]")
        losses: list[float] = []
        moved: list[_Shift] = []
        with torch.inference_mode(False), torch.enable_grad(), _frozen(self.model):
            # A copy: what was made under inference_mode has no part in gradients.
            ids_1S = ids_1S[:, -settings.max_tokens :].clone()
            if ids_1S.shape[1] < 2:
                return Rewired(int(ids_1S.shape[1]), losses, [])
            for step in range(settings.steps):
                for shift in moved or self._shifts:
                    shift.vector.requires_grad_(True)
                with _recording(self._shifts if step == 0 else []):
                    loss = next_token_loss(self.model, ids_1S)
                if step == 0:
                    moved = most_confident(self._shifts, settings.layers)
                    optimizer = torch.optim.Adam([shift.vector for shift in moved], lr=settings.learning_rate)
                gradients = torch.autograd.grad(loss, [shift.vector for shift in moved], allow_unused=True)
                for shift in self._shifts:
                    shift.vector.requires_grad_(False)
                if step == 0 and not any(gradient is not None and gradient.any() for gradient in gradients):
                    raise UnsupportedError(
                        f"{type(self.model).__name__} cannot be rewired: the weights of its experts do not depend on "
                        "the gates' logits, so that there is no gradient to follow"
                    )
                for shift, gradient in zip(moved, gradients, strict=True):
                    shift.vector.grad = gradient
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
        return Rewired(int(ids_1S.shape[1]), losses, [shift.name for shift in moved])


def next_token_loss(model: nn.Module, ids_1S: Tensor) -> Tensor:
    """Float32 scalar: mean cross-entropy of each token after the first, given those before it."""
    logits_SV = model(ids_1S, use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits_SV.float(), ids_1S[0, 1:])


def most_confident(shifts: Sequence[_Shift], share: float) -> list[_Shift]:
    """The ``share`` of the layers with the highest confidence in the forward that was recorded, in their order.

    A layer's confidence is C = −1/K Σ_j log p_j over the experts that a token takes (the paper's, as reviews
    give it), averaged over the tokens, p being the softmax of the logits. It is high where one expert takes nearly all
    and the others of the K have little; with K = 1 that turns round.
    """
    count = max(1, math.ceil(share * len(shifts) - 1e-9))
    order = sorted(range(len(shifts)), key=lambda index: -shifts[index].confidence)
    return [shifts[index] for index in sorted(order[:count])]


class _Shift:
    """The vector of one router: how it gets to the logits, and the confidence of the forward that was recorded."""

    confidence = 0.0

    def __init__(self, name: str, module: nn.Module, vector: Tensor) -> None:
        self.name, self.module, self.vector = name, module, vector

    def install(self) -> Callable[[], object]:
        """Shift from now on; returns the way back."""
        raise NotImplementedError

    def move_to(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """To where the tensors of a call are, for the model may have been moved; whether that was elsewhere."""
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        device = next((tensor.device for tensor in tensors), self.vector.device)
        if device == self.vector.device:
            return False
        with torch.inference_mode(False):  # while it is optimized the vector is a leaf of the graph, and stays one
            self.vector = self.vector.detach().to(device).requires_grad_(self.vector.requires_grad)
        return True

    def record(self, output: Any) -> None:
        """Take the confidence from what the module has returned."""
        raise NotImplementedError

    def _note(self, log_p_TE: Tensor, ids_TK: Tensor) -> None:
        used_TK = ids_TK < log_p_TE.shape[-1]
        chosen_TK = log_p_TE.gather(1, ids_TK.clamp(max=log_p_TE.shape[-1] - 1))
        self.confidence = float(-chosen_TK[used_TK].mean()) if bool(used_TK.any()) else 0.0


class _RouterShift(_Shift):
    """A router of ours adds its ``logit_shift`` itself."""

    module: Router

    def install(self) -> Callable[[], object]:
        before, self.module.logit_shift = self.module.logit_shift, self.vector
        handle = self.module.register_forward_pre_hook(self._follow, with_kwargs=True)

        def remove() -> None:
            handle.remove()
            self.module.logit_shift = before

        return remove

    def _follow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.move_to(args, kwargs):
            self.module.logit_shift = self.vector

    def record(self, output: Routing) -> None:
        if output.logits is not None:
            self._note(output.logits.detach().log_softmax(dim=-1), output.expert_ids)


class _GateShift(_Shift):
    """A gate of transformers: in its forward the one product that has a column for each expert gets the vector."""

    def __init__(self, gate: Gate) -> None:
        rule = gate_rule(gate)  # refuses gates of other forms
        device = next(gate.module.parameters()).device
        super().__init__(gate.name, gate.module, torch.zeros(rule.num_experts, device=device))
        self.rule = rule

    def install(self) -> Callable[[], object]:
        before = self.module.__dict__.get("forward")
        self.module.forward = partial(self._forward, self.module.forward)
        if before is None:
            return partial(self.module.__dict__.pop, "forward")
        return partial(setattr, self.module, "forward", before)

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.move_to(args, kwargs)
        # With gradients, as the native linear layers, which no mode sees, leave the work to PyTorch then.
        with torch.enable_grad(), _Adding(self.vector) as mode:
            output = forward(*args, **kwargs)
        if mode.times != 1:
            raise UnsupportedError(
                f"{self.name} ({type(self.module).__name__}) has {mode.times} products with a column for each of "
                f"{len(self.vector)} experts: which of them makes the logits is not known"
            )
        return output

    def record(self, output: tuple[Tensor, ...]) -> None:
        self._note(self.rule.logits(output).detach().float().log_softmax(dim=-1), output[self.rule.order[2]])


class _Adding(TorchFunctionMode):
    """Adds a vector to each product of its length."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.vector, self.times = vector, 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in _PRODUCTS or result.shape[-1] != len(self.vector):
            return result
        self.times += 1
        return result + self.vector.to(result.dtype)


def _shifts(model: nn.Module) -> list[_Shift]:
    shifts: list[_Shift] = []
    names = {id(module): name for name, module in model.named_modules()}
    for layer in moe_layers(model):
        for router in layer.routers:
            # Those that take routes decided ahead, or by the token's id, have no logits.
            if isinstance(router, Router) and (weight := router._parameters.get("weight")) is not None:
                vector = torch.zeros(router.num_experts, device=weight.device)
                shifts.append(_RouterShift(names[id(router)], router, vector))
    shifts += [_GateShift(gate) for gate in find_gates(model)]
    if not shifts:
        raise UnsupportedError(f"{type(model).__name__} has no MoE layer with a gate: there is nothing to rewire")
    return shifts


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In eval mode, and no gradients for its parameters."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _recording(shifts: Sequence[_Shift]) -> Iterator[None]:
    with ExitStack() as stack:
        for shift in shifts:
            handle = shift.module.register_forward_hook(lambda module, args, output, shift=shift: shift.record(output))
            stack.callback(handle.remove)
        yield
