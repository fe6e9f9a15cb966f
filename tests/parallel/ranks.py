"""What every rank of the grid does with a workload: run it by many plans, and compare each with what is wanted."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel.cases import Shape, Workload
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moesaic.experts import ACTIVATIONS, ExpertWeights
from moesaic.parallel.decisions import Decision
from moesaic.parallel.experts import ParallelExperts
from moesaic.parallel.fields import ExpertForm
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.plan import Plan, Wish
from moesaic.parallel.sharding import expert_form
from moesaic.parallel.topology import Topology

Grid = tuple[tuple[int, ...], ...]
"""Ranks by host."""


class Prescribed:
    """In the place of a chooser: the plan that it was told."""

    plan: Plan

    def choose(self, workload: Any, wish: Wish) -> Decision:
        return Decision(self.plan, "fixed", None, (), 1)  # type: ignore[arg-type]

    def report(self, number: int, forward: Any, backward: Any) -> None:
        pass

    def checksum(self) -> int:
        return 0


@functools.cache
def topology(grid: Grid) -> Topology:
    """Of ranks on pretended hosts; its process groups are made once."""
    ranks = torch.tensor(grid)
    if torch.equal(ranks.flatten(), ranks.flatten().sort().values):
        return Topology.of(DeviceMesh("cpu", ranks if len(grid) > 1 else ranks.flatten()))
    host = next(host for host, members in enumerate(grid) if dist.get_rank() in members)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROUP_RANK", str(host))  # as torchrun does
        return Topology.of(DeviceMesh("cpu", torch.arange(ranks.numel())))


def form_of(shape: Shape) -> ExpertForm:
    return expert_form(ExpertWeights(activation=ACTIVATIONS.get(shape.activation), **shape.tensors()))


def own_part(name: str, whole: Tensor, form: ExpertForm, layout: ExpertLayout, rank: int) -> Tensor:
    """A rank's part of a tensor ``[E, ...]`` as a module stores it, in canonical form."""
    (field,) = [field for field in form.fields if field.name == name]
    experts = layout.experts_of(rank)
    part = field.canonical(whole)[experts.start : experts.stop]
    if layout.slices > 1:
        part = part.chunk(layout.slices, field.axis + 1)[rank % layout.slices :][:1] or [
            part.narrow(field.axis + 1, 0, 0)
        ]
        (part,) = part
    return part.contiguous()


def squares(got: Tensor | None, wanted: Tensor) -> float:
    """‖got − wanted‖²; no gradient stands for zeros."""
    difference = wanted if got is None else got.detach().double() - wanted
    return float(difference.square().sum())


def run(workload: Workload, grid: Grid, plans: Sequence[Plan], wanted: Mapping[str, Any]) -> list[dict[str, float]]:
    """For each plan the squared distance of this rank's part from ``wanted``, by name of tensor.

    Args:
        wanted: ``output``, ``x`` and ``weights``: a tensor for each rank; the experts' gradients as whole tensors.
    """
    place = topology(grid)
    rank, shape = place.rank, workload.shape
    form, layout = form_of(shape), ExpertLayout(shape.experts, shape.d_ff, place.size)
    chooser = Prescribed()
    experts = ParallelExperts(form, layout, place, chooser)  # type: ignore[arg-type]
    tensors = {name: own_part(name, whole, form, layout, rank) for name, whole in shape.tensors().items()}
    goals = {name: own_part(name, wanted[name], form, layout, rank) for name in tensors}
    goals |= {name: wanted[name][rank] for name in ("output", "x", "weights")}
    x_TD, ids_TK, weights_TK, upstream_TD = workload.inputs(rank)
    answers = []
    for chooser.plan in plans:
        leaves = {name: each.clone().requires_grad_() for name, each in tensors.items()}
        x, weights = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        output = experts(x, ids_TK, weights, leaves)
        output.backward(upstream_TD)
        got = {"output": output, "x": x.grad, "weights": weights.grad}
        got |= {name: leaf.grad for name, leaf in leaves.items()}
        answers.append({name: squares(got[name], goal) for name, goal in goals.items()})
    return answers
