"""A model spread over ranks: its experts by :mod:`moesaic.parallel`, everything else by FSDP2."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.errors import ConfigError, UnsupportedError
from moesaic.experts import ExpertWeights
from moesaic.hf.experts import is_experts_module, stored_experts
from moesaic.hf.quantized import expert_modules
from moesaic.hf.spread import adopt, check_arguments, disown
from moesaic.layer import MoE
from moesaic.parallel.agreement import check_alike, fingerprints
from moesaic.parallel.choice import compute, links, overhead
from moesaic.parallel.choice.chooser import Chooser
from moesaic.parallel.choice.decisions import name_layer
from moesaic.parallel.exchange import EXCHANGES
from moesaic.parallel.experts import ParallelExperts
from moesaic.parallel.fields import ExpertForm
from moesaic.parallel.groups import group_of
from moesaic.parallel.holding import Holding
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.plan import AUTO, Wish
from moesaic.parallel.sharding import (
    Sharding,
    check_shardable,
    expert_form,
    expert_mesh,
    local_tensors,
    shard_experts,
)
from moesaic.parallel.topology import Topology
from moesaic.routing.router import CommonPart

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh: DeviceMesh | None = None,
    strategy: str = AUTO,
    *,
    overlap: int | None = None,
    exchange: str | None = None,
    gather: str | None = None,
    replicas: int | None = None,
) -> Model:
    """Spread a model over ranks, in place; a collective call. Each rank then calls it with tokens of its own, and gets
    their outputs; all ranks call it equally often, and it itself, not a part of it (FSDP2 gathers the parameters then).

    Of W ranks each keeps a part of every layer's expert weights, E/W experts, or, where E < W, a slice of the hidden
    width of some, for ever: see :class:`moesaic.parallel.layout.ExpertLayout`. How a step is carried out over that
    layout, whether tokens travel to weights or weights to tokens, is chosen step by step
    (:class:`moesaic.parallel.use_strategy` chooses later). All other parameters are sharded by FSDP2 (``fully_shard``)
    over the same ranks. All parameters are DTensors afterwards, and gradients are means over the ranks: an optimizer is
    made after this, not before (the step of one that was is refused). ``save_pretrained`` then writes the whole model,
    called by all ranks together, and ``load_state_dict`` takes whole tensors too.

    Args:
        model: a :class:`moesaic.MoE`, any module that holds some, or an MoE model of transformers (whose experts
            implementation becomes ``"moesaic"``), with the same weights on every rank.
        mesh: of one dimension, or two (host, rank on the host); all ranks of the default process group by default.
        strategy: ``"auto"``, ``"tokens"``, ``"weights"`` or ``"hybrid"``.
        overlap, exchange, gather, replicas: as :class:`moesaic.parallel.plan.Plan` describes them; chosen where None.

    Returns:
        ``model`` itself.

    Raises:
        ConfigError: for an unknown name, where there is no process group, the model has no experts or is spread
            already, or ranks differ in weights or settings.
        UnsupportedError: for experts that cannot be sharded, such as quantized ones.
    """
    check_arguments(model, mesh)
    wish = Wish(strategy, overlap, exchange, gather, replicas)
    if exchange is not None:
        EXCHANGES.get(exchange)
    ranks = _ranks(model, mesh)
    found = _find_experts(model, ranks.size(), wish)
    check_alike({**fingerprints(model), **_settings(model, wish)}, ranks.get_group())
    _use_our_experts(model)
    topology = Topology.of(ranks if mesh is None else mesh)
    before = [weakref.ref(parameter) for parameter in model.parameters()]
    _shard_experts(found, ranks, topology, wish)
    _shard_others(model, ranks, found)
    disown([parameter for each in before if (parameter := each()) is not None], model)
    adopt(model)
    return model


@dataclass(frozen=True)
class _Found:
    """An experts module that can be sharded."""

    name: str
    module: nn.Module
    form: ExpertForm
    names: dict[str, str]
    layout: ExpertLayout


def _ranks(model: nn.Module, mesh: DeviceMesh | None) -> DeviceMesh:
    """The ranks of a mesh, or all that there are, as a mesh of one dimension."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "there is no process group: start the script with `torchrun --nproc-per-node N script.py`, and call "
            "torch.distributed.init_process_group() before parallelize"
        )
    if mesh is None:
        on_gpu = dist.get_backend() == "nccl" or any(parameter.is_cuda for parameter in model.parameters())
        return init_device_mesh("cuda" if on_gpu else "cpu", (dist.get_world_size(),))
    if mesh.get_coordinate() is None:
        raise ConfigError(f"rank {dist.get_rank()} is not in the mesh {mesh.mesh.tolist()}")
    members = mesh.mesh.flatten()
    if members.tolist() != sorted(members.tolist()):  # PyTorch's groups would have them so, and its DTensors not
        raise ConfigError(f"the mesh has the ranks {mesh.mesh.tolist()}: they must be in rising order")
    if mesh.ndim == 1:
        return mesh
    group = group_of(members.tolist(), "ranks")
    return DeviceMesh.from_group(group, mesh.device_type, mesh=members, mesh_dim_names=("ranks",))


def _find_experts(model: nn.Module, ranks: int, wish: Wish) -> list[_Found]:
    """The model's experts modules, all of which can be sharded: nothing has been changed before that is known."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ConfigError(f"{name} is spread over ranks already: call parallelize once, and before fully_shard")
    found = []
    for name, module in expert_modules(model).items():
        name = name or type(module).__name__
        if "base_layer" in name.split("."):
            raise UnsupportedError(f"{name}: experts wrapped by PEFT cannot be sharded over ranks: merge the adapter")
        weights, names, interleaved = stored_experts(module)
        form = expert_form(weights, interleaved=interleaved)
        layout = ExpertLayout(weights.num_experts, weights.d_ff, ranks)
        check_shardable(module, name, form, layout)
        if wish.replicas is not None and layout.slices % wish.replicas:
            raise ConfigError(f"replicas is {wish.replicas}: it must divide {layout.slices}, the slices of {name}")
        found.append(_Found(name, module, form, names, layout))
    if not found:
        raise ConfigError(f"{type(model).__name__} has no experts to spread over ranks")
    return found


def _settings(model: nn.Module, wish: Wish) -> dict[str, str]:
    """What must be alike on all ranks beside the weights."""
    told = {"the arguments of parallelize": repr(wish)}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            settings = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
            told[f"the configuration of {name or type(module).__name__}"] = repr(settings)
        elif isinstance(module, MoE):
            told[f"the configuration of {name or type(module).__name__}"] = repr(module.config)
    return told


def _use_our_experts(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(is_experts_module(each) for each in module.modules()):
            module.set_experts_implementation("moesaic")
        elif is_experts_module(module) and isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            config._experts_implementation = "moesaic"


def _shard_experts(found: Sequence[_Found], ranks: DeviceMesh, topology: Topology, wish: Wish) -> None:
    links_here, overhead_here = links.measure(topology), overhead.measure(topology)
    meshes: dict[int, DeviceMesh] = {}
    choosers: dict[str, Chooser] = {}
    for each in found:
        layout = each.layout
        if layout.blocks not in meshes:
            meshes[layout.blocks] = expert_mesh(ranks, layout)
        shard_experts(each.module, Sharding(each.form, layout, each.names, meshes[layout.blocks]))
        alike = repr((layout, each.form.fields, each.form.template.activation.name, each.form.template.up.dtype))
        if alike not in choosers:
            own = _own_part(each, topology.rank)
            choosers[alike] = Chooser(links_here, compute.measure(own, layout, topology, overhead_here), topology)
        name_layer(choosers[alike], each.name)
        parallel = ParallelExperts(each.form, layout, topology, choosers[alike], wish, each.name)
        each.module.__dict__["parallel"] = parallel


def _own_part(found: _Found, rank: int) -> ExpertWeights | None:
    """The rank's part as a backend takes it; None where it has none."""
    layout, slice_ = found.layout, found.layout.place(rank)[1]
    if not layout.experts_of(rank) or not layout.hidden_of(rank):
        return None
    tensors = {name: tensor.detach() for name, tensor in local_tensors(found.module).items()}
    return Holding(found.form, layout, layout.experts_of(rank), range(slice_, slice_ + 1)).weights(tensors)


def _shard_others(model: nn.Module, ranks: DeviceMesh, found: Sequence[_Found]) -> None:
    """FSDP2 for everything else: a block of the model at a time, then the rest."""
    if isinstance(model, MoE):
        # FSDP hangs its hooks on the output, and would lose them where somebody writes into what that is a view of.
        model.register_forward_hook(_copied)
    own = {each.module.get_parameter(name) for each in found for name in each.names.values()}
    for module in model.modules():
        if isinstance(module, CommonPart):  # else it would go with the block that owns it, before the others call it
            fully_shard(module, mesh=ranks, ignored_params=own)
    blocks: set[str] = set()
    for module in model.modules():
        blocks.update(getattr(module, "_no_split_modules", None) or ())
    for module in model.modules():
        if module is not model and type(module).__name__ in blocks:
            fully_shard(module, mesh=ranks, ignored_params=own)
    fully_shard(model, mesh=ranks, ignored_params=own)


def _copied(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.clone()
