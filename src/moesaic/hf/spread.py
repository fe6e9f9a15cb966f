"""A model that is spread over ranks, where somebody uses it as if it were not: it does the right thing, or says what
would be."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from moesaic.errors import ConfigError, UsageError
from moesaic.hf.save import new_folder
from moesaic.hf.state import first_rank, full_state_dict, own_parts
from moesaic.parallel.plan import AUTO, STRATEGIES

# What a parameter is called in itself once a model has another one in its place.
_REPLACED = "_moesaic_replaced"
_hooked = False


def check_arguments(model: object, mesh: object) -> None:
    """Refuse what is neither a model nor a mesh.

    Raises:
        ConfigError: with what may have been meant.
    """
    if isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        raise ConfigError(
            f"the model is wrapped in {type(model).__name__}: give parallelize the model itself, which it spreads over "
            "the ranks in another way"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"parallelize takes a model, got {model!r} ({type(model).__name__})")
    if mesh is None or isinstance(mesh, DeviceMesh):
        return
    meant = f"did you mean strategy={mesh!r}?" if mesh in (AUTO, *STRATEGIES) else "leave it out for all ranks"
    raise ConfigError(f"mesh is {mesh!r}: it must be a torch.distributed.device_mesh.DeviceMesh; {meant}")


def disown(before: Iterable[Tensor], model: nn.Module) -> None:
    """The next step of an optimizer over parameters that a model had ``before``, and has no more, says so."""
    global _hooked
    now = {id(parameter) for parameter in model.parameters()}
    for parameter in before:
        if id(parameter) not in now:
            setattr(parameter, _REPLACED, True)
    if not _hooked:
        register_optimizer_step_pre_hook(_check_optimizer)
        _hooked = True


def adopt(model: nn.Module) -> None:
    """Let ``save_pretrained`` and ``load_state_dict`` have to do with whole tensors, and parts of the model say that
    they cannot be called alone."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__["save_pretrained"] = partial(_save_pretrained, module)
        if isinstance(module, PreTrainedModel) or module is model:
            module.__dict__["load_state_dict"] = partial(_load_state_dict, module)
    _guard_parts(model)


def _check_optimizer(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if gone := sum(hasattr(parameter, _REPLACED) for parameter in parameters):
        raise ConfigError(
            f"{type(optimizer).__name__} was made before moesaic.parallelize: of its {len(parameters)} parameters the "
            f"model has replaced {gone}, and would not be trained. Make the optimizer after parallelize, from "
            "model.parameters()"
        )


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    *args: Any,
    **options: Any,
) -> None:
    """As transformers' own where a ``state_dict`` is given. Else all ranks call it together, and the first one writes
    the whole model: to a folder that is complete when it appears, or over an old one."""
    write = partial(type(model).save_pretrained, model)
    if state_dict is not None:
        write(save_directory, is_main_process, state_dict, *args, **options)
        return
    weights, (first, group) = full_state_dict(model), first_rank(model)
    told: list[str | None] = [None]
    error: Exception | None = None
    if dist.get_rank() == first:
        try:
            if os.path.exists(save_directory):
                write(save_directory, True, weights, *args, **options)
            else:
                with new_folder(os.fspath(save_directory)) as folder:
                    write(folder, True, weights, *args, **options)
        except Exception as raised:
            error, told = raised, [f"{type(raised).__name__}: {raised}"]
    dist.broadcast_object_list(told, src=first, group=group)
    if error is not None:
        raise error
    if told[0] is not None:
        raise UsageError(f"rank {first} could not write the model: {told[0]}")


def _load_state_dict(model: nn.Module, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
    """As PyTorch's own, of whole tensors too, of which each rank takes its part."""
    return type(model).load_state_dict(model, own_parts(state_dict, model), *args, **options)


def _guard_parts(model: nn.Module) -> None:
    """FSDP gathers parameters outside of blocks where the model itself is called: modules that have such say so."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule) or "sharding" in module.__dict__:
            continue
        inside = any(isinstance(model.get_submodule(above), FSDPModule) for above in _above(name))
        if not inside and any(isinstance(each, DTensor) for each in module.parameters(recurse=False)):
            module.register_forward_pre_hook(partial(_check_gathered, name))


def _above(name: str) -> list[str]:
    """Names of the modules around one, but for the outermost."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _check_gathered(name: str, module: nn.Module, inputs: Any) -> None:
    if any(isinstance(each, DTensor) for each in module._parameters.values()):
        raise UsageError(
            f"{name} was called while its parameters are spread over ranks: call the model that was given to "
            "parallelize itself, not a part of it, because FSDP gathers them then"
        )
