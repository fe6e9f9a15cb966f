"""The gates of transformers' MoE blocks: where they are, and by which rule they turn logits into experts and weights.

A gate of today's transformers is a module that stands beside the experts as ``gate`` or ``router`` and returns logits
``[T, E]``, weights ``[T, K]`` and ids ``[T, K]``. Models differ in what comes between logits and weights (softmax or
sigmoid, normalized or not, scaled). No class is known here by its name: a copy of the gate is asked with a few random
tokens, and its answer says by which rule it works.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import UnsupportedError
from moesaic.experts import ExpertBank
from moesaic.hf.quantized import expert_modules

_NAMES = ("gate", "router")
_WRAPPERS = ("FSDPModule", "FullyShardedDataParallel")
_PROBES = 32
_AGREE = 1e-4
"""Largest relative error, in float32, at which the gate's weights are those of a rule."""


@dataclass(frozen=True)
class Gate:
    """A gate in a model: ``block`` holds it and the ``experts`` that it chooses from."""

    name: str
    module: nn.Module
    block: nn.Module
    experts: nn.Module


@dataclass(frozen=True)
class GateRule:
    """How a gate of ``num_experts`` makes ``top_k`` weights of its logits; None where no simple rule explains them.

    Args:
        normalize: whether the weights of a token have one sum, ``scale``; otherwise each is ``scale`` times the softmax
            or the sigmoid of its logit.
        selection_bias: ``[E]`` float32, what takes part in the selection only; None where there is none.
        expert_scale: ``[E]`` float32, a factor of each expert's own (Gemma 4); None where there is none.
        groups: equal groups of experts, and how many of them a token may choose from.
        are_probabilities: what the gate returns as logits is their softmax (Gemma 4).
        order: where logits, weights and ids stand in what it returns.
    """

    num_experts: int
    top_k: int
    normalize: bool | None
    scale: float
    selection_bias: Tensor | None
    expert_scale: Tensor | None
    groups: tuple[int, int]
    are_probabilities: bool
    order: tuple[int, ...]

    def logits(self, output: Sequence[Tensor]) -> Tensor:
        """The logits ``[T, E]`` in what the gate has returned."""
        logits_TE = output[self.order[0]]
        return logits_TE.log() if self.are_probabilities else logits_TE


class TokenIds:
    """A forward pre-hook of a model, which notes the token ids: ``ids_T`` (``[T]`` int64), or None without any."""

    def __init__(self) -> None:
        self.ids_T: Tensor | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.ids_T = None if ids is None else ids.reshape(-1)


class TakenIds:
    """A forward hook of a gate, which notes what its tokens take: ``last`` has ids ``[T, K]`` and the number of experts
    before the null ones; None before a forward."""

    def __init__(self, rule: GateRule) -> None:
        self.rule = rule
        self.last: tuple[Tensor, int] | None = None

    def __call__(self, gate: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self.last = output[self.rule.order[2]].detach(), self.rule.num_experts


def find_gates(model: nn.Module) -> list[Gate]:
    """The gates of the blocks whose experts take part in transformers' experts interface, in the order of the model.

    Raises:
        UnsupportedError: where such a block has no gate of its own.
    """
    gates = []
    for name, experts in expert_modules(model).items():
        if isinstance(experts, ExpertBank):
            continue
        prefix = name.rpartition(".")[0]
        block = model.get_submodule(prefix)
        own = [key for key in _NAMES if isinstance(getattr(block, key, None), nn.Module)]
        if not own:
            raise UnsupportedError(f"{prefix} ({type(block).__name__}) has no gate: {_SUPPORTED}")
        gates.append(Gate(f"{prefix}.{own[0]}", getattr(block, own[0]), block, experts))
    return gates


def gate_rule(gate: Gate, top_k: int | None = None) -> GateRule:
    """Ask a copy of the gate, in float32, with random tokens.

    Args:
        top_k: give the copy this number of slots before.

    Raises:
        UnsupportedError: where it does not return logits of all experts, weights and ids, or not ``top_k`` of them.
    """
    module = copy.deepcopy(gate.module).float().eval()
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    module.__dict__.pop("forward", None)
    if top_k is not None:
        module.top_k = top_k  # type: ignore[assignment]
    num_experts = count_experts(gate.experts)
    order, logits_TE, weights_TK, ids_TK = _answer(gate, module, num_experts)
    if top_k is not None and ids_TK.shape[1] != top_k:
        raise UnsupportedError(f"{gate.name} ({type(gate.module).__name__}) always takes {ids_TK.shape[1]} experts")
    are_probabilities = bool((logits_TE >= 0).all() and ((logits_TE.sum(dim=-1) - 1).abs() < _AGREE).all())
    if are_probabilities:
        logits_TE = logits_TE.log()
    expert_scale = _vector(gate, num_experts, ("per_expert_scale",))
    if expert_scale is not None:
        weights_TK = weights_TK / expert_scale.double()[ids_TK]
    normalize, scale = _rule(logits_TE, weights_TK, ids_TK)
    return GateRule(
        num_experts=num_experts,
        top_k=ids_TK.shape[1],
        normalize=normalize,
        scale=scale,
        selection_bias=_vector(gate, num_experts, ("e_score_correction_bias", "expert_bias")),
        expert_scale=expert_scale,
        groups=_groups(module),
        are_probabilities=are_probabilities,
        order=order,
    )


def count_experts(experts: nn.Module) -> int:
    """How many experts a module of transformers' experts interface chooses among."""
    count = getattr(experts, "num_experts", None)
    if isinstance(count, int):
        return count
    return int(next(iter([*experts.parameters(recurse=False), *experts.buffers(recurse=False)])).shape[0])


def gate_matrix(gate: Gate, num_experts: int) -> Tensor | None:
    """The matrix ``[E, D]`` that makes the logits; None where none or several may be it."""
    found = [p for p in gate.module.parameters() if p.ndim == 2 and p.shape[0] == num_experts]
    return found[0] if len(found) == 1 else None


def call_gate(gate: Gate, module: nn.Module, x: Tensor) -> Any:
    """``module``, the gate or a copy of it, on ``x`` as its block would call it: what else it takes is the block's."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    own = {p.name: getattr(gate.block, p.name) for p in parameters if hasattr(gate.block, p.name)}
    return module(x, **own)


_SUPPORTED = (
    "supported are gates that return (logits, weights, ids) of all experts, as those of Mixtral, Qwen-MoE, OLMoE, "
    "DeepSeek, GLM-MoE, gpt-oss and most others do, and moesaic's own"
)


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Refuse a model that is wrapped by :func:`moesaic.parallelize` or FSDP (of either kind), be it for one rank: its
    gates are taken apart.

    Raises:
        UnsupportedError: a model that is wrapped so cannot be ``what``.
    """
    for module in model.modules():
        # By its name: importing FSDP for this would take longer than all else that is done here.
        by_fsdp = any(base.__name__ in _WRAPPERS for base in type(module).__mro__)
        if by_fsdp or module.__dict__.get("parallel") is not None:
            raise UnsupportedError(f"a model that is wrapped by moesaic.parallelize or FSDP cannot be {what}")


def refusal(gate: Gate, reason: str) -> UnsupportedError:
    """The error for a gate of another form."""
    return UnsupportedError(f"{gate.name} ({type(gate.module).__name__}) {reason}: {_SUPPORTED}")


def _answer(gate: Gate, module: nn.Module, num_experts: int) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The order of the answer; logits, weights and ids of random tokens, for gates that want a sequence as one."""
    matrix = gate_matrix(gate, num_experts)
    if matrix is None:
        raise refusal(gate, f"has no single matrix of {num_experts} rows")
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(_PROBES, matrix.shape[1], generator=generator).to(matrix.device)
    answer: Any = None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for x in (x_TD, x_TD[None]):
            try:
                answer = call_gate(gate, module, x)
                break
            except Exception as error:  # whatever another program makes of features of a shape that it does not take
                answer = error
    if isinstance(answer, Exception):
        raise refusal(gate, f"cannot be asked alone ({type(answer).__name__})") from answer
    if not isinstance(answer, tuple) or len(answer) != 3 or not all(isinstance(part, Tensor) for part in answer):
        raise refusal(gate, "returns something else than logits, weights and ids")
    order = _order(answer, num_experts)
    if order is None:
        raise refusal(gate, f"returns shapes {[list(part.shape) for part in answer]} for {num_experts} experts")
    logits, weights, ids = (answer[place] for place in order)
    return order, logits.double(), weights.double(), ids.long()


def _order(answer: tuple[Tensor, ...], num_experts: int) -> tuple[int, ...] | None:
    """Where logits, weights and ids stand: the only ids are whole numbers, and there is a logit for each expert."""
    for order in ((0, 1, 2), (2, 1, 0)):
        logits, weights, ids = (answer[place] for place in order)
        whole = [part.is_floating_point() for part in (logits, weights, ids)] == [True, True, False]
        alike = weights.ndim == 2 and weights.shape == ids.shape and len(ids) == _PROBES
        if whole and alike and logits.shape == (_PROBES, num_experts):
            return order
    return None


def _rule(logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> tuple[bool | None, float]:
    """Normalized, and the scale: of one sum for all tokens, or of the scores themselves."""
    for normalize, ratio in [
        (True, weights_TK.sum(dim=-1)),
        (False, weights_TK / logits_TE.softmax(dim=-1).gather(1, ids_TK)),
        (False, weights_TK / logits_TE.sigmoid().gather(1, ids_TK)),
    ]:
        scale = float(ratio.median())
        if (ratio - scale).abs().max() <= _AGREE * abs(scale):
            return normalize, float(f"{scale:.5g}")
    return None, 1.0


def _vector(gate: Gate, num_experts: int, names: tuple[str, ...]) -> Tensor | None:
    """``[E]`` float32: a vector of the gate, or of its block, that is called so."""
    for owner in (gate.module, gate.block):
        for name, tensor in [*owner.named_parameters(), *owner.named_buffers()]:
            if name.rpartition(".")[2] in names and tensor.numel() == num_experts:
                return tensor.detach().float().reshape(-1)
    return None


def _groups(module: nn.Module) -> tuple[int, int]:
    counts = [getattr(module, name, None) for name in ("num_group", "topk_group")]
    return (counts[0], counts[1]) if all(isinstance(count, int) for count in counts) else (1, 1)  # type: ignore[return-value]
