"""A low-rank adapter put beside a model's own matrices: to be trained, or only used.

Nothing of the model is replaced: a linear layer gets a child ``low_rank`` and a forward hook that adds what it says, an
experts module gets a child ``low_rank`` that computes it (:class:`moesaic.experts.low_rank.LowRank`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from moesaic.adapters.folder import Base
from moesaic.adapters.lora import LoraAdapter, LoraPart, Target, check_parts, find_targets
from moesaic.adapters.lora_compute import compute_unfused, grouped_rows
from moesaic.dispatch import Dispatch
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.experts import ExpertWeights
from moesaic.hf.experts import is_experts_module


class LowRankPart(nn.Module):
    """One :class:`LoraPart` as parameters ``a`` and ``b``, in their own precision; computed in that of the features."""

    def __init__(self, part: LoraPart) -> None:
        super().__init__()
        self.a = nn.Parameter(part.a.detach().clone())
        self.b = nn.Parameter(part.b.detach().clone())
        self.scaling = part.scaling

    def extra_repr(self) -> str:
        return f"rank={self.a.shape[-2]}, scaling={self.scaling:g}"


class LinearLowRank(LowRankPart):
    """The part of a linear layer: ``[..., I]`` to ``[..., O]``."""

    def forward(self, x: Tensor) -> Tensor:
        """``scaling · B A x``."""
        return F.linear(F.linear(x, self.a.to(x.dtype)) * self.scaling, self.b.to(x.dtype))


class MatrixLowRank(LowRankPart):
    """The parts of the experts of one matrix, as two grouped matmuls over the rows of the layer's dispatch."""

    place_E1: Tensor | None

    def __init__(self, part: LoraPart, num_experts: int) -> None:
        super().__init__(part)
        assert part.experts is not None
        place = None
        if len(part.experts) < num_experts:
            # Where each expert's part is; the null slot's id for an expert that has none, and for rows of nobody.
            place = torch.full((num_experts + 1,), len(part.experts), device=part.a.device)
            place[list(part.experts)] = torch.arange(len(part.experts), device=part.a.device)
        self.register_buffer("place_E1", place, persistent=False)

    def forward(self, x_NI: Tensor, dispatch: Dispatch) -> Tensor:
        """``[N, I]`` to ``[N, O]``; zeros where the row's expert has no part."""
        if self.place_E1 is None:
            return self._rows(x_NI, dispatch.offsets)
        # The chosen experts' rows are a dispatch of the rows themselves: those of the others have null slots.
        place_N1 = self.place_E1[dispatch.expert_of_row()].unsqueeze(1)
        chosen = Dispatch.from_slots(place_N1, torch.ones_like(place_N1, dtype=torch.float32), self.a.shape[0])
        return chosen.combine(self._rows(chosen.gather(x_NI), chosen.offsets))

    def _rows(self, x_NI: Tensor, offsets: Tensor) -> Tensor:
        low_NR = grouped_rows(x_NI, self.a.to(x_NI.dtype).transpose(1, 2), offsets)
        return grouped_rows(low_NR * self.scaling, self.b.to(x_NI.dtype).transpose(1, 2), offsets)


class ExpertsLowRank(nn.Module):
    """The parts of an experts module, by the names of its parameters: a :class:`moesaic.experts.low_rank.LowRank`."""

    active = True
    tokens = None

    def __init__(self, up: str, down: str) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.parts = nn.ModuleDict()

    def compute(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
        """See :class:`LowRank`."""
        return compute_unfused(x_TD, dispatch, weights, self)

    def add_up(self, h_NG: Tensor, x_ND: Tensor, dispatch: Dispatch) -> Tensor:
        """See :class:`moesaic.adapters.lora_compute.Parts`."""
        return h_NG + self.parts[self.up](x_ND, dispatch) if self.up in self.parts else h_NG

    def add_down(self, y_ND: Tensor, h_NF: Tensor, dispatch: Dispatch) -> Tensor:
        """See :class:`moesaic.adapters.lora_compute.Parts`."""
        return y_ND + self.parts[self.down](h_NF, dispatch) if self.down in self.parts else y_ND


class AttachedLora:
    """A low-rank adapter beside a model; made by :func:`attach_lora`."""

    def __init__(self, model: nn.Module, targets: dict[str, Target], adapter: LoraAdapter) -> None:
        self._adapter, self._targets = adapter, targets
        self._handles: list[RemovableHandle] = []
        self._modules: dict[str, LowRankPart] = {}
        for name, part in adapter.parts.items():
            self._put(targets[name], part)

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of every part."""
        for module in self._modules.values():
            yield from module.parameters()

    def adapter(self, base: Base | None = None) -> LoraAdapter:
        """The adapter with its present values, which training changes no more; on the CPU."""
        parts = {
            name: LoraPart(
                module.a.detach().cpu().clone(), module.b.detach().cpu().clone(), module.scaling, part.experts
            )
            for (name, part), module in zip(self._adapter.parts.items(), self._modules.values(), strict=True)
        }
        return LoraAdapter(parts, base or self._adapter.base, self._adapter.training)

    def remove(self) -> None:
        """Take it off: the model is what it was."""
        for handle in self._handles:
            handle.remove()
        for name in self._modules:
            module = self._targets[name].module
            if hasattr(module, "low_rank"):
                del module.low_rank
        self._handles, self._modules = [], {}

    def _put(self, target: Target, part: LoraPart) -> None:
        if target.num_experts is None:
            low_rank: LowRankPart = LinearLowRank(part).to(target.device)
            target.module.low_rank = low_rank
            self._handles.append(target.module.register_forward_hook(add_low_rank))
        else:
            low_rank = MatrixLowRank(part, target.num_experts).to(target.device)
            self._of(target).parts[target.parameter] = low_rank
        self._modules[target.name] = low_rank

    def _of(self, target: Target) -> ExpertsLowRank:
        if getattr(target.module, "low_rank", None) is None:
            names = [each.parameter for each in self._targets.values() if each.module is target.module]
            target.module.low_rank = ExpertsLowRank(*names)
        assert isinstance(target.module.low_rank, ExpertsLowRank)
        return target.module.low_rank


def add_low_rank(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook of a linear layer. A function of this file, so that a model that has it can be pickled."""
    return output + module.low_rank(inputs[0])  # type: ignore[no-any-return,operator]


def attach_lora(model: nn.Module, adapter: LoraAdapter) -> AttachedLora:
    """Put an adapter beside a model, which then computes as if it had been merged; its own parameters stay untouched.

    What is attached requires gradients, and only that if the model has been frozen before. Experts with a part are
    computed by grouped matmuls, whatever backend has been chosen.

    Raises:
        CheckpointError: where a part has no matching target in the model.
        ConfigError: where one of its modules has an adapter attached already.
        UnsupportedError: for experts of transformers that another implementation than ``"moesaic"`` runs.
    """
    targets = find_targets(model)
    check_parts(adapter, targets)
    for name in adapter.parts:
        check_attachable(targets[name])
        if getattr(targets[name].module, "slots", None) is not None:
            raise ConfigError("the model's experts are in an AdapterPool: load the adapter there")
    return AttachedLora(model, targets, adapter)


def check_attachable(target: Target) -> None:
    """Refuse a module that has a low-rank part already, or that would not ask for it.

    Raises:
        ConfigError, UnsupportedError: see :func:`attach_lora`.
    """
    if getattr(target.module, "low_rank", None) is not None:
        raise ConfigError(f"{target.path} has a low-rank adapter attached already: remove that first")
    chosen = getattr(getattr(target.module, "config", None), "_experts_implementation", "moesaic")
    if is_experts_module(target.module) and chosen != "moesaic":
        raise UnsupportedError(
            f"low-rank parts of experts need experts_implementation='moesaic', but the model has {chosen!r}: "
            "call model.set_experts_implementation('moesaic')"
        )
