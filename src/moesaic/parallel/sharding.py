"""The parameters of an experts module as DTensors, of which each rank holds its own part only.

Where experts are whole (E ≥ W) a parameter keeps its shape and is sharded over the experts. Where they are sliced
(E < W) it has the canonical shape of its :class:`Field` and is sharded over experts and hidden width: two dimensions of
a mesh, both plain ``Shard``s, so that ``torch.distributed.checkpoint`` can cut it anew for any number of ranks.

E experts · W ranks · T tokens · K slots per token · D model width · F expert hidden width · n experts of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.nn.utils import get_total_norm

from moesaic.errors import ConfigError, UnsupportedError
from moesaic.experts import ExpertWeights
from moesaic.parallel.fields import ExpertForm, Field
from moesaic.parallel.groups import group_among, kept
from moesaic.parallel.layout import ExpertLayout, chunk


@dataclass(frozen=True)
class Sharding:
    """How the parameters of an experts module are sharded; ``module.sharding``.

    Attributes:
        names: field name to the module's parameter name.
        mesh: ``[W]`` where experts are whole, else ``[blocks, slices]``.
    """

    form: ExpertForm
    layout: ExpertLayout
    names: Mapping[str, str]
    mesh: DeviceMesh


def expert_form(weights: ExpertWeights, *, interleaved: bool = False) -> ExpertForm:
    """The canonical form of experts as a module stores them.

    Args:
        interleaved: whether the columns of gate and up projection take turns (gpt-oss); else the gate's come first.
    """
    F, D, gated, transposed = weights.d_ff, weights.d_model, weights.activation.gated, weights.transposed
    width: tuple[int, ...] = (F,) if not gated else (F, 2) if interleaved else (2, F)
    hidden = 1 if gated and not interleaved else 0  # the place of F in the width
    offset = 1 if transposed else 0
    given = weights.tensors()
    fields = {
        "up": Field("up", (D, *width) if transposed else (*width, D), hidden + offset, offset if gated else None),
        "down": Field("down", (F, D) if transposed else (D, F), 0 if transposed else 1),
        "up_bias": Field("up_bias", width, hidden, 0 if gated else None),
        "down_bias": Field("down_bias", (D,), 0),
    }
    empty: dict[str, Any] = {name: tensor.detach().new_empty(0) for name, tensor in given.items()}
    return ExpertForm(replace(weights, low_rank=None, **empty), [fields[name] for name in given])


def check_shardable(module: nn.Module, name: str, form: ExpertForm, layout: ExpertLayout) -> None:
    """Refuse experts that cannot be sharded, before anything has been changed.

    Args:
        name: of the module, for messages.

    Raises:
        UnsupportedError: for quantized experts, low-rank parts, and slices of experts that cannot be computed apart.
        ConfigError: for experts that are in an AdapterPool.
    """
    experts = form.template
    if experts.format is not None:
        raise UnsupportedError(f"{name}: experts stored as {experts.format.name} codes cannot be sharded over ranks")
    if module.__dict__.get("slots") is not None:
        raise ConfigError(f"{name}: the experts are in an AdapterPool, which needs them whole: close it first")
    if getattr(module, "low_rank", None) is not None:
        raise UnsupportedError(f"{name}: experts with low-rank parts cannot be sharded over ranks: merge them first")
    if layout.slices == 1:
        return
    advice = f"use at most {layout.num_experts} ranks, so that experts stay whole"
    if experts.post_norm is not None:
        raise UnsupportedError(
            f"{name}: experts that end in a norm cannot be sliced over {layout.ranks} ranks; {advice}"
        )
    if experts.activation.name == "custom" and not _acts_by_feature(form):
        raise UnsupportedError(
            f"{name}: experts whose own gate does not take each hidden feature by itself cannot be sliced over "
            f"{layout.ranks} ranks; {advice}"
        )


def _acts_by_feature(form: ExpertForm) -> bool:
    """Whether a module's own activation gives a part of the hidden features what it gives all of them."""
    up = next(field for field in form.fields if field.name == "up")
    transposed = form.template.transposed
    width = up.shape[1:] if transposed else up.shape[:-1]
    hidden = up.axis - 1 if transposed else up.axis  # its place in the width
    device = form.template.up.device
    h = torch.arange(3 * math.prod(width), device=device).sin().mul(3).unflatten(0, (3, *width))
    cut = up.shape[up.axis] // 2
    try:
        whole_NF = form.template.activation.apply(h.flatten(1))
        parts = [form.template.activation.apply(part.flatten(1)) for part in h.tensor_split([cut], dim=hidden + 1)]
        return torch.allclose(whole_NF, torch.cat(parts, dim=1))
    except RuntimeError:  # it wants its full width
        return False


def expert_mesh(ranks: DeviceMesh, layout: ExpertLayout) -> DeviceMesh:
    """The mesh on which a layer's parameters live: ``ranks`` itself, or ``[blocks, slices]`` of them.

    A collective call where experts are sliced.

    Args:
        ranks: of one dimension.
    """
    if layout.slices == 1:
        return ranks
    grid = ranks.mesh.view(layout.blocks, layout.slices)

    def make() -> DeviceMesh:
        groups = [group_among(grid.T.tolist(), "blocks"), group_among(grid.tolist(), "slices")]
        return DeviceMesh.from_group(groups, ranks.device_type, mesh=grid, mesh_dim_names=("blocks", "slices"))

    return kept(("expert mesh", ranks.device_type, str(grid.tolist())), make)


def shard_experts(module: nn.Module, sharding: Sharding) -> None:
    """Replace the module's parameters by DTensors with copies of this rank's part; the whole ones are let go.

    An optimizer must be made afterwards: one that was made before has the whole ones.
    """
    layout, mesh = sharding.layout, sharding.mesh
    rank = mesh.mesh.flatten().tolist().index(dist.get_rank())
    experts = layout.experts_of(rank)
    for field in sharding.form.fields:
        name = sharding.names[field.name]
        whole = module.get_parameter(name)
        part = whole.detach()
        if layout.slices > 1:
            part = field.canonical(part)
        shape, placements = part.shape, [Shard(0)]
        part = part.narrow(0, min(experts.start, len(part)), len(experts))
        if layout.slices > 1:
            columns = chunk(field.shape[field.axis], layout.slices, rank % layout.slices)
            part = part.narrow(field.axis + 1, columns.start, len(columns))
            placements.append(Shard(field.axis + 1))
        own = torch.empty(part.shape, dtype=part.dtype, device=mesh.device_type).copy_(part)
        module.register_parameter(name, nn.Parameter(as_dtensor(own, mesh, placements, shape), whole.requires_grad))
    module.sharding = sharding  # type: ignore[assignment]


def as_dtensor(own: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
    """A DTensor of a given whole shape, in the usual memory order, from this rank's part: no copy, nothing asked of
    others."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)


def local_tensors(module: nn.Module) -> dict[str, Tensor]:
    """By field name this rank's part of the parameters, ``[n, ...]`` in canonical shape; gradients go to them.

    n is 0, or the width of the slice, where the rank has no part.
    """
    sharding: Sharding = module.__dict__["sharding"]
    tensors = {}
    for field in sharding.form.fields:
        parameter: Any = module.get_parameter(sharding.names[field.name])
        # In inference mode a DTensor could not even be detached.
        own: Tensor = _Local.apply(parameter) if torch.is_grad_enabled() else parameter.to_local()  # type: ignore[no-untyped-call]
        tensors[field.name] = own if sharding.layout.slices > 1 else field.canonical(own)
    return tensors


class _Local(torch.autograd.Function):
    """``DTensor.to_local``, whose gradients PyTorch 2.11 replicates where parts differ in size."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.placed = parameter.device_mesh, parameter.placements, parameter.shape
        own = parameter.to_local()
        return own.view_as(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> DTensor:
        return as_dtensor(grad.contiguous(), *ctx.placed)


def forward_sharded(
    module: nn.Module, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, asked_E: Tensor | None = None
) -> Tensor:
    """``[T, D]`` to ``[T, D]``: this rank's tokens through a sharded experts module; all ranks call it together.

    Leaves ``last_choice``, ``last_counts`` (of this rank's tokens) and ``last_decision`` on the module, as its ordinary
    forward does.

    Args:
        ids_TK: ``[T, K]`` int64, E and above for null slots. weights_TK: ``[T, K]``.
        asked_E: ``[E]`` int64, slots per expert before a capacity limit, where there is one.

    Raises:
        ConfigError: where features and weights differ in width or dtype.
    """
    tensors, sharding = local_tensors(module), module.__dict__["sharding"]
    stored = [module.get_parameter(name) for name in sharding.names.values()]
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        stored = [each for each in stored if each.dtype == dtype]
        x_TD, tensors = x_TD.to(dtype), {name: tensor.to(dtype) for name, tensor in tensors.items()}
    d_model = sharding.form.d_model
    if x_TD.ndim != 2 or x_TD.shape[1] != d_model:
        raise ConfigError(f"the experts take features of shape [tokens, {d_model}], got {list(x_TD.shape)}")
    for name, tensor in tensors.items():
        if tensor.dtype != x_TD.dtype:
            raise ConfigError(
                f"features are {x_TD.dtype} but the expert weights are {tensor.dtype} ({name}): they must be alike"
            )
    parallel: Any = module.__dict__["parallel"]
    y_TD: Tensor = parallel(x_TD, ids_TK, weights_TK, tensors, asked_E=asked_E, stored=stored)
    told: Any = module
    told.last_choice, told.last_counts, told.last_decision = (
        parallel.last_choice,
        parallel.own_counts_E,
        parallel.last_decision,
    )
    return y_TD


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients, those of sharded parameters over all ranks: a scalar, the same on every rank.

    As :func:`torch.nn.utils.get_total_norm`, which refuses parameters of different meshes; a collective call then.
    """
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [get_total_norm(gradients) for gradients in by_mesh.values()]
    plain = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(plain)) if plain else torch.zeros(())


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients down to ``max_norm`` where ``norm``, theirs as :func:`gradient_norm` gives it, is greater."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor)
