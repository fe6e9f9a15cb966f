"""One layer over all ranks, on which fixed plans and the choice are timed side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn

from moesaic.bench.parallel.work import FixedRouter, Work
from moesaic.config import MoEConfig
from moesaic.hf.parallelize import parallelize
from moesaic.layer import MoE
from moesaic.parallel.choice.candidates import Candidate
from moesaic.parallel.choice.fixed import FixedChooser
from moesaic.parallel.experts import ParallelExperts
from moesaic.parallel.sharding import forward_sharded

_SEED = 0


class BenchLayer:
    """A parallelized MoE layer with two choosers in turn: one that learns, and one that is told.

    Each has its own :class:`ParallelExperts` over the same parameters: timings of fixed plans teach the other nothing.

    Attributes:
        whole: the same layer on one process, the reference.
    """

    def __init__(self, work: Work) -> None:
        torch.manual_seed(_SEED)
        config = MoEConfig(work.d_model, work.d_ff, work.num_experts, work.top_k)
        self.whole = MoE(config)
        self.whole.router = FixedRouter(work, 0)  # type: ignore[assignment]
        self.layer = parallelize(copy.deepcopy(self.whole))
        self.auto: ParallelExperts = self.layer.experts.parallel
        chooser = self.auto.chooser
        self.told = FixedChooser(chooser.links, chooser.compute, chooser.topology)
        self._fixed = ParallelExperts(self.auto.form, self.auto.layout, self.auto.topology, self.told)
        self.rank = distributed.get_rank()

    def set(self, work: Work) -> None:
        """The work of the steps that follow."""
        self.work = work
        self.layer.router = FixedRouter(work, self.rank)  # type: ignore[assignment]
        self.whole.router = self.layer.router
        dice = torch.Generator().manual_seed(self.rank)
        self.x_TD = torch.randn(work.tokens, work.d_model, generator=dice)
        self.grad_TD = torch.randn(work.tokens, work.d_model, generator=dice)

    def step(self) -> None:
        """One step of this rank's tokens, forward and, for training, backward."""
        self.run(self.layer)

    def run(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        """``[T, D]`` outputs, and gradients of the tokens.

        Of the parallelized layer its experts alone: routing and FSDP's hooks are the same for every plan.
        """
        layer.zero_grad()
        x_TD = self.x_TD.detach().requires_grad_(self.work.training)
        with torch.set_grad_enabled(self.work.training):
            if layer is self.layer:
                routing = layer.router(x_TD)
                y_TD = forward_sharded(layer.experts, x_TD, routing.expert_ids, routing.weights)
            else:
                y_TD = layer(x_TD)
        if self.work.training:
            y_TD.backward(self.grad_TD)
        return y_TD.detach(), x_TD.grad

    def fixed(self, rule: Candidate) -> Callable[[], None]:
        """A step by a rule."""

        def step() -> None:
            self.told.rule = rule
            self.layer.experts.parallel = self._fixed
            self.step()

        return step

    def chosen(self) -> None:
        """A step as "auto" chooses it."""
        self.layer.experts.parallel = self.auto
        self.step()

    def error(self) -> float:
        """Of outputs and of the gradients of tokens, against the layer on one process; the largest.

        The relative error ``|ours - reference| / |reference|``, over all ranks.
        """
        found, reference = self.run(self.layer), self.run(self.whole)
        errors = [_error(ours, theirs) for ours, theirs in zip(found, reference, strict=True) if ours is not None]
        return float(_over_ranks(torch.tensor(max(errors)), distributed.ReduceOp.MAX))


def _error(ours: Tensor, reference: Tensor | None) -> float:
    assert reference is not None
    return float((ours - reference).norm() / reference.norm())


def _over_ranks(value: Tensor, how: distributed.ReduceOp.RedOpType) -> Tensor:
    distributed.all_reduce(value, how)
    return value
