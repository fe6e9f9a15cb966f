"""Low-rank adapters in memory, and what of a model they may change.

LoRA: Low-Rank Adaptation of Large Language Models, equation 3: a matrix ``W`` ``[O, I]`` becomes
``W + scaling · B A`` with ``A`` ``[r, I]`` and ``B`` ``[O, r]``. Each expert of a fused 3-D parameter has a pair of its
own. r rank · I input features · O output features · E experts of a layer · n of them with a part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.adapters.folder import Base
from moesaic.errors import CheckpointError, ConfigError, did_you_mean
from moesaic.experts import ExpertBank, ExpertWeights
from moesaic.experts.storage import ExpertStorage, buffer_names
from moesaic.hf.experts import weights_of
from moesaic.hf.quantized import expert_modules

ATTENTION, EXPERTS, BOTH = "attention", "experts", "both"


@dataclass(frozen=True)
class LoraPart:
    """What is added to one parameter.

    Attributes:
        a: ``[r, I]`` for a linear layer, ``[n, r, I]`` for experts; any floating dtype.
        b: ``[O, r]``, ``[n, O, r]``.
        scaling: alpha over r, or over its square root (rank-stabilized LoRA).
        experts: the n ids, ascending; None for a linear layer.
    """

    a: Tensor
    b: Tensor
    scaling: float
    experts: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def delta(self, index: int | None = None) -> Tensor:
        """``[O, I]`` float32: what is added to the matrix, of experts to that of number ``index`` among the n."""
        a_RI, b_OR = (self.a, self.b) if index is None else (self.a[index], self.b[index])
        return (b_OR.float() @ a_RI.float()) * self.scaling


@dataclass(frozen=True)
class LoraAdapter:
    """A low-rank adapter.

    Attributes:
        parts: by the full name of the parameter, as in ``model.layers.0.self_attn.q_proj.weight`` or
            ``model.layers.0.mlp.experts.gate_up_proj``.
        base: the model that it was trained from; None where nobody wrote it down (PEFT does not).
        training: what the run said of itself.
    """

    parts: dict[str, LoraPart]
    base: Base | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts.values())


@dataclass(frozen=True)
class Target:
    """A matrix, or a stack of experts' matrices, that may have a low-rank part.

    Attributes:
        module, path: what holds it; a linear layer, or an experts module.
        parameter: its name there. Quantized experts have it no more; their codes stand in its place.
        num_experts: None for a linear layer.
        transposed: whether the parameter is ``[E, I, O]``, not ``[E, O, I]``.
    """

    module: nn.Module
    path: str
    parameter: str
    inputs: int
    outputs: int
    num_experts: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}" if self.path else self.parameter

    @property
    def device(self) -> torch.device:
        return next(iter([*self.module.parameters(), *self.module.buffers()])).device

    @property
    def peft_name(self) -> str:
        """What PEFT's configuration calls it: a linear layer by its module, experts by their parameter."""
        return self.path if self.num_experts is None else self.name

    def check(self, part: LoraPart) -> str | None:
        """What is wrong with a part for this target, or None."""
        lead: tuple[int, ...] = () if part.experts is None else (len(part.experts),)
        wanted = ((*lead, part.rank, self.inputs), (*lead, self.outputs, part.rank))
        found = (tuple(part.a.shape), tuple(part.b.shape))
        if (part.experts is None) != (self.num_experts is None):
            return f"{self.name} takes {'no ' if self.num_experts is None else ''}parts of experts"
        if found != wanted:
            return f"{self.name} takes A and B of shapes {wanted}, got {found}"
        ids = part.experts or ()
        if list(ids) != sorted(set(ids)) or (ids and not 0 <= ids[0] <= ids[-1] < (self.num_experts or 0)):
            return f"{self.name} has experts 0 ... {(self.num_experts or 0) - 1}; the part's are {list(ids)}"
        return None


def find_targets(model: nn.Module) -> dict[str, Target]:
    """Every linear layer and both matrices of every experts module, by their parameters' full names.

    The up matrix of an experts module comes before its down matrix.

    Raises:
        UnsupportedError: for a variant of transformers' experts that we do not know.
    """
    found: dict[str, Target] = {}
    for path, module in expert_modules(model).items():
        for target in _matrices(path, module):
            found[target.name] = target
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not _inside_low_rank(path):
            target = Target(module, path, "weight", module.in_features, module.out_features)
            found[target.name] = target
    return found


def new_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: str | Sequence[str] = ATTENTION,
    experts: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> LoraAdapter:
    """A fresh adapter, which changes nothing yet: A is drawn as PEFT draws it (uniform within one over the square root
    of I), B is zero; float32, on the devices of the targets.

    Args:
        alpha: the scaling is ``alpha / rank``.
        targets: ``"attention"`` (the linear layers of attention), ``"experts"`` (both matrices of every expert),
            ``"both"``, or endings of modules' or parameters' names (``["q_proj", "experts.down_proj"]``).
        experts: by the path of an experts module the ids of the experts that get a part, the others (and modules that
            are not named) none; None: all experts of all.

    Raises:
        ConfigError: where a target is not in the model, or the rank or an expert is out of range.
    """
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    chosen = choose_targets(find_targets(model), targets)
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, target in chosen.items():
        ids = _chosen_experts(target, experts)
        if ids is not None and not ids:
            continue
        lead = () if ids is None else (len(ids),)
        a = torch.empty(*lead, rank, target.inputs).uniform_(-1, 1, generator=generator) / math.sqrt(target.inputs)
        b = torch.zeros(*lead, target.outputs, rank)
        parts[name] = LoraPart(a.to(target.device), b.to(target.device), alpha / rank, ids)
        if wrong := target.check(parts[name]):
            raise ConfigError(wrong)
    if not parts:
        raise ConfigError("no expert has been chosen: the adapter would be empty")
    return LoraAdapter(parts)


def choose_targets(found: Mapping[str, Target], targets: str | Sequence[str]) -> dict[str, Target]:
    """Those of ``found`` that ``targets`` means, as :func:`new_lora` takes it.

    Raises:
        ConfigError: where one means none of them.
    """
    if isinstance(targets, str) and targets in (ATTENTION, EXPERTS, BOTH):
        attention = {name: each for name, each in found.items() if targets != EXPERTS and _of_attention(each)}
        experts = {name: each for name, each in found.items() if targets != ATTENTION and each.num_experts is not None}
        for kind, missing in ((ATTENTION, not attention), (EXPERTS, not experts)):
            if missing and targets in (kind, BOTH):
                raise ConfigError(f"the model has no {kind} that LoRA could be put on")
        return {**attention, **experts}
    chosen: dict[str, Target] = {}
    for ending in [targets] if isinstance(targets, str) else targets:
        met = {name: each for name, each in found.items() if ends_with(each.peft_name, ending)}
        if not met:
            endings = {".".join(each.peft_name.split(".")[-2:]) for each in found.values()}
            raise ConfigError(
                f"no linear layer or experts' matrix is called {ending!r}: {did_you_mean(ending, endings)}"
            )
        chosen |= met
    return {name: each for name, each in found.items() if name in chosen}


def check_parts(adapter: LoraAdapter, targets: Mapping[str, Target]) -> None:
    """Refuse an adapter that does not fit the targets of a model.

    Raises:
        CheckpointError: with the first part that does not.
    """
    for name, part in adapter.parts.items():
        if name not in targets:
            raise CheckpointError(f"the adapter has a part for {name}, which the model does not have")
        if wrong := targets[name].check(part):
            raise CheckpointError(f"the adapter does not fit the model: {wrong}")


def ends_with(name: str, ending: str) -> bool:
    """PEFT's way to match: the whole name, or all that follows one of its dots."""
    return name == ending or name.endswith(f".{ending}")


def _of_attention(target: Target) -> bool:
    return target.num_experts is None and any("attn" in part or "attention" in part for part in target.path.split("."))


def _inside_low_rank(path: str) -> bool:
    return "low_rank" in path.split(".")


def _matrices(path: str, module: nn.Module) -> list[Target]:
    weights = module.weights() if isinstance(module, ExpertBank) else weights_of(module)
    width = 2 * weights.d_ff if weights.activation.gated else weights.d_ff
    up, down = _names(module, weights)
    # Asked of the tensor: a bank with slots for adapters computes with more experts than the model has.
    stored = getattr(module, up if weights.format is None else buffer_names(up)[0])
    shape: dict[str, Any] = {"num_experts": stored.shape[0], "transposed": weights.transposed}
    return [
        Target(module, path, up, weights.d_model, width, **shape),
        Target(module, path, down, weights.d_ff, weights.d_model, **shape),
    ]


def _names(module: nn.Module, weights: ExpertWeights) -> tuple[str, str]:
    if isinstance(module, ExpertStorage):
        return module.matrices()
    return ("gate_up_proj" if weights.activation.gated else "up_proj"), "down_proj"


def _chosen_experts(target: Target, experts: Mapping[str, Sequence[int]] | None) -> tuple[int, ...] | None:
    if target.num_experts is None:
        return None
    return tuple(range(target.num_experts)) if experts is None else tuple(sorted(experts.get(target.path, ())))
