"""The state of a model whose experts may be sharded over ranks: for checkpoints in any layout, and as plain tensors.

E experts · D model width · F expert hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moesaic.errors import CheckpointError
from moesaic.hf.experts import stored_experts
from moesaic.hf.quantized import expert_modules
from moesaic.parallel.fields import Field
from moesaic.parallel.sharding import as_dtensor, expert_form


@dataclass(frozen=True)
class _Joined:
    """A parameter of E experts in which gate and up projection are joined; ``whole``: no rank has a slice of one."""

    field: Field
    experts: int
    whole: bool

    @property
    def canonical(self) -> tuple[int, ...]:
        return self.experts, *self.field.shape

    @property
    def stored(self) -> tuple[int, ...]:
        return tuple(self.field.stored(torch.empty(self.canonical, device="meta")).shape)


def to_checkpoint(state: Any, model: nn.Module, stored: str | Path | None = None) -> Any:
    """``state`` as checkpoints have it: of every matrix (and bias) of experts in which a gate and an up projection are
    joined, a view with an axis for the two, as in ``[E, 2, F, D]`` for ``[E, 2F, D]``.

    In that shape it can be cut for any number of ranks: each half of the hidden width by itself. What is saved so by W
    ranks, one process being one rank, can be loaded by any other number of them.

    Args:
        state: nested dictionaries, whose keys on the way to a parameter's tensors (its values, the optimizer's of it)
            contain its name.
        model: whose state it is.
        stored: folder of the checkpoint that is to be loaded into the result. One that was written without that axis
            is taken as it is, where experts are whole.

    Raises:
        CheckpointError: where it was written without that axis and experts are sliced.
    """
    old = _shapes_in(stored) if stored is not None else {}

    def convert(joined: _Joined, path: str, tensor: Tensor) -> Tensor:
        if old.get(path) == joined.stored:
            if not joined.whole:
                raise CheckpointError(
                    f"the checkpoint {str(stored)!r} has {path} in an older form, which only ranks with whole experts "
                    f"can load: use at most {joined.experts} ranks"
                )
            return tensor
        return _reshaped(tensor, joined.stored, joined.canonical, joined.field.canonical)

    return _converted(state, _joined_parameters(model), convert)


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` with plain tensors on the CPU in the shapes of a model that is not sharded.

    A collective call where it is: the result is the first rank's (rank 0, or the first of the mesh), and empty on the
    others. Tensors that the model has under several names are one. Where experts are sliced (E < W),
    ``get_model_state_dict`` gives other shapes, with gate and up projection apart: see :func:`to_checkpoint`.
    """
    joined, first = _joined_parameters(model), not dist.is_initialized() or dist.get_rank() == first_rank(model)[0]
    gathered: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if name in joined and tuple(whole.shape) == joined[name].canonical:
                whole = joined[name].field.stored(whole)
            gathered[id(tensor)] = whole.detach().cpu().contiguous() if first else whole.new_empty(0)
        state[name] = gathered[id(tensor)]
    return state if first else {}


def own_parts(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """``state`` (whole tensors, as :func:`full_state_dict` gives them) as PyTorch's ``load_state_dict`` takes it: this
    rank's part where the model is spread over ranks. Nothing is sent. What does not fit is left as it is."""
    joined = _joined_parameters(model)
    told = dict(state)
    for name, like in model.state_dict(keep_vars=True).items():
        whole = told.get(name)
        if not isinstance(like, DTensor) or not isinstance(whole, Tensor) or isinstance(whole, DTensor):
            continue
        if name in joined and tuple(whole.shape) == joined[name].stored and tuple(like.shape) != joined[name].stored:
            whole = joined[name].field.canonical(whole)
        if whole.shape == like.shape:
            mesh, placements = like.device_mesh, like.placements
            lengths, starts = compute_local_shape_and_global_offset(like.shape, mesh, placements)
            own = whole[tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))]
            told[name] = as_dtensor(own.to(mesh.device_type), mesh, placements, like.shape)
    return told


def first_rank(model: nn.Module) -> tuple[int, Any]:
    """The first of the ranks that a model is spread over, and their process group; all ranks where it is not."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 1:
            return int(parameter.device_mesh.mesh[0]), parameter.device_mesh.get_group()
    return 0, None


def _joined_parameters(model: nn.Module) -> dict[str, _Joined]:
    return dict(_each_joined(model))


def _each_joined(model: nn.Module) -> Iterator[tuple[str, _Joined]]:
    for prefix, module in expert_modules(model).items():
        sharding = module.__dict__.get("sharding")
        if sharding is None:
            weights, names, interleaved = stored_experts(module)
            form, experts, whole = expert_form(weights, interleaved=interleaved), weights.num_experts, True
        else:
            form, names = sharding.form, sharding.names
            experts, whole = sharding.layout.num_experts, sharding.layout.slices == 1
        # As get_state_dict names parameters: without what torch.compile puts before them.
        prefix = prefix.replace("_orig_mod.", "")
        for field in form.fields:
            if field.joined is not None:
                yield f"{prefix}.{names[field.name]}".removeprefix("."), _Joined(field, experts, whole)


def _converted(state: Any, joined: Mapping[str, _Joined], convert: Callable[[_Joined, str, Tensor], Tensor]) -> Any:
    def walk(node: Any, path: str, found: _Joined | None) -> Any:
        if isinstance(node, Mapping):
            return {
                key: walk(value, f"{path}.{key}".removeprefix("."), joined.get(key, found))
                for key, value in node.items()
            }
        return convert(found, path, node) if found is not None and isinstance(node, Tensor) else node

    return walk(state, "", None)


def _reshaped(tensor: Tensor, before: tuple[int, ...], after: tuple[int, ...], view: Any) -> Tensor:
    """A view of ``tensor`` where its shape is ``before``; else it is what it should be, or none of ours."""
    if tuple(tensor.shape) != before:
        return tensor
    if not isinstance(tensor, DTensor):
        return view(tensor)  # type: ignore[no-any-return]
    return as_dtensor(view(tensor.to_local()), tensor.device_mesh, tensor.placements, torch.Size(after))


def _shapes_in(folder: str | Path) -> dict[str, tuple[int, ...]]:
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
