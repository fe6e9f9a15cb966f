"""What every rank of the grid does with a workload: run it by many plans, and compare each with what is wanted."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel.cases import Shape, Workload
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from moesaic.errors import ParallelError
from moesaic.experts import ACTIVATIONS, ExpertWeights, compute_and_tell
from moesaic.parallel import execute
from moesaic.parallel.choice.decisions import Decision
from moesaic.parallel.experts import ParallelExperts
from moesaic.parallel.fields import ExpertForm
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.plan import Plan, Wish
from moesaic.parallel.sharding import expert_form
from moesaic.parallel.topology import Topology

Grid = tuple[tuple[int, ...], ...]
"""Ranks by host."""


@dataclass(frozen=True)
class Mode:
    """How a layer is used.

    Attributes:
        needs: what requires a gradient: ``x``, ``weights``, and names of the experts' tensors; all by default.
        times: its output goes through it again so often.
        checkpoint: its forward is run again in the backward pass.
        no_grad: there is none.
    """

    needs: tuple[str, ...] | None = None
    times: int = 1
    checkpoint: bool = False
    no_grad: bool = False


class Prescribed:
    """In the place of a chooser: the plans that it was told, call after call."""

    plans: Iterator[Plan]

    def choose(self, workload: Any, wish: Wish) -> Decision:
        return Decision(next(self.plans), "fixed", None, (), 1)  # type: ignore[arg-type]

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
    activation = ACTIVATIONS.get(shape.activation)
    return expert_form(ExpertWeights(activation=activation, transposed=shape.transposed, **shape.tensors()))


def own_part(name: str, whole: Tensor, form: ExpertForm, layout: ExpertLayout, rank: int) -> Tensor:
    """A rank's part of a tensor ``[E, ...]`` as a module stores it, in canonical form."""
    (field,) = [field for field in form.fields if field.name == name]
    experts = layout.experts_of(rank)
    part = field.canonical(whole)[experts.start : experts.stop]
    if layout.slices > 1:
        parts = part.chunk(layout.slices, field.axis + 1)
        slice_ = rank % layout.slices
        part = parts[slice_] if slice_ < len(parts) else part.narrow(field.axis + 1, 0, 0)
    return part.contiguous()


def squares(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖²."""
    assert got.shape == wanted.shape
    return float((got.detach().double() - wanted).square().sum())


def experts_of(workload: Workload, grid: Grid) -> tuple[ParallelExperts, Prescribed]:
    """What a parallelized module of the workload's experts would compute with."""
    place, shape, chooser = topology(grid), workload.shape, Prescribed()
    layout = ExpertLayout(shape.experts, shape.d_ff, place.size)
    return ParallelExperts(form_of(shape), layout, place, chooser), chooser  # type: ignore[arg-type]


def own_tensors(experts: ParallelExperts, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rank = experts.topology.rank
    return {name: own_part(name, each, experts.form, experts.layout, rank) for name, each in whole.items()}


def run(
    workload: Workload, grid: Grid, plans: Sequence[Plan], wanted: Mapping[str, Any], mode: Mode
) -> list[dict[str, float]]:
    """For each plan the squared distance of this rank's part from ``wanted``, by name of tensor.

    Where a step calls the layer several times, the plans of the calls are the one in question and those that follow it.

    Args:
        wanted: ``output``, ``x`` and ``weights``: a tensor for each rank; the experts' gradients as whole tensors.
    """
    experts, chooser = experts_of(workload, grid)
    rank = experts.topology.rank
    tensors = own_tensors(experts, workload.shape.tensors())
    goals = own_tensors(experts, {name: wanted[name] for name in tensors})
    goals |= {name: wanted[name][rank] for name in ("x", "weights")}
    needs = goals.keys() if mode.needs is None else mode.needs
    x_TD, ids_TK, weights_TK, upstream_TD = workload.inputs(rank)

    def layer(x: Tensor, weights: Tensor, *leaves: Tensor) -> Tensor:
        return experts(x, ids_TK, weights, dict(zip(tensors, leaves, strict=True)))

    answers = []
    for index in range(len(plans)):
        chooser.plans = itertools.cycle([*plans[index:], *plans[:index]])
        given = {"x": x_TD, "weights": weights_TK, **tensors}
        given = {name: each.clone().requires_grad_(name in needs) for name, each in given.items()}
        output, *others = given.values()
        with torch.set_grad_enabled(not mode.no_grad):
            for _ in range(mode.times):
                if mode.checkpoint:
                    output = checkpoint(layer, output, *others, use_reentrant=False)
                else:
                    output = layer(output, *others)
        assert output.requires_grad == (bool(needs) and not mode.no_grad)
        if output.requires_grad:
            output.backward(upstream_TD)
        answers.append({"output": squares(output, wanted["output"][rank])})
        for name, each in given.items():
            assert (each.grad is not None) == (name in needs and not mode.no_grad), name
            if each.grad is not None:
                answers[-1][name] = squares(each.grad, goals[name])
    return answers


def disagree(workload: Workload, changes: Mapping[str, Any]) -> str:
    """One call in which rank 1 does something else; what every rank says of it, without the end."""
    grid = (tuple(range(workload.ranks)),)
    experts, chooser = experts_of(workload, grid)
    chooser.plans = iter([Plan("tokens")])
    given = {"needs": ("x",), "wish": "tokens", "name": "experts"} | (changes if experts.topology.rank == 1 else {})
    place = experts.topology
    experts = ParallelExperts(experts.form, experts.layout, place, chooser, Wish(given["wish"]), given["name"])  # type: ignore[arg-type]
    experts.name = "experts"
    x_TD, ids_TK, weights_TK, _ = workload.inputs(place.rank)
    try:
        experts(
            x_TD.requires_grad_(bool(given["needs"])),
            ids_TK,
            weights_TK,
            own_tensors(experts, workload.shape.tensors()),
        )
    except ParallelError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fail(workload: Workload) -> None:
    """A call in which rank 1 fails as it computes its experts."""
    experts, chooser = experts_of(workload, (tuple(range(workload.ranks)),))
    chooser.plans = iter([Plan("tokens")])
    x_TD, ids_TK, weights_TK, _ = workload.inputs(experts.topology.rank)
    with pytest.MonkeyPatch.context() as patch:
        if experts.topology.rank == 1:
            patch.setattr(execute, "compute_and_tell", out_of_memory)
        experts(x_TD, ids_TK, weights_TK, own_tensors(experts, workload.shape.tensors()))


def out_of_memory(*arguments: Any) -> None:
    raise MemoryError("no room")


def fetched_bytes(workload: Workload) -> tuple[list[int], list[int], list[int]]:
    """Bytes of the weights that came to this rank: as they were computed with, after the forward pass, and after the
    backward pass."""
    experts, chooser = experts_of(workload, (tuple(range(workload.ranks)),))
    chooser.plans = iter([Plan("weights", tuple(range(workload.shape.experts)))])
    tensors = {name: each.requires_grad_() for name, each in own_tensors(experts, workload.shape.tensors()).items()}
    x_TD, ids_TK, weights_TK, upstream_TD = workload.inputs(experts.topology.rank)
    seen: list[Tensor] = []
    full: list[int] = []

    def compute(x: Tensor, dispatch: Any, weights: ExpertWeights) -> Any:
        if not full:
            seen.extend(weights.tensors().values())
            full.extend(each.untyped_storage().nbytes() for each in seen)
        return compute_and_tell(x, dispatch, weights)

    def sizes() -> list[int]:
        return [each.untyped_storage().nbytes() for each in seen]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "compute_and_tell", compute)
        # All slots are for experts of the other rank.
        ids_TK.fill_(workload.shape.experts - 1 - experts.layout.experts_of(experts.topology.rank)[0])
        output = experts(x_TD, ids_TK, weights_TK, tensors)
        forward = sizes()
        output.backward(upstream_TD)
    return full, forward, sizes()
