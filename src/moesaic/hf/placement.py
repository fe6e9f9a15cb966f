"""A model folder with its experts in another order: the same function, with other neighbours on a rank.

It works on the bytes of the safetensors files, a tensor at a time, whatever they are stored as: a file keeps its names,
shapes and header, and the index its entries; the bytes of each expert go to another expert's place.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.errors import CheckpointError, UnsupportedError, UsageError
from moesaic.hf.load import load_config, model_folder
from moesaic.hf.save import new_folder
from moesaic.routing import ROUTERS

NOTE = "placement.json"
"""The file of a placed model's folder that says where its experts come from."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)
# Everything up to the experts is the MoE block; its first number is the decoder layer.
_EXPERTS = re.compile(r"^(?P<block>.*?\.(?P<number>\d+)(?:\..+?)?)\.experts\.(?P<rest>.+)$")
_ONE_EXPERT = re.compile(r"^(?P<expert>\d+)\.(?P<rest>.+)$")
# What transformers' families and ours have beside the experts, one row or entry an expert.
_ROUTER = {
    "gate.weight",
    "gate.bias",
    "gate.wg.weight",
    "gate.e_score_correction_bias",
    "gate.expert_bias",
    "router.weight",
    "router.bias",
    "router.gain",
    "router.scale",
    "router.noise_weight",
    "router.gate.weight",
    "router.selection_bias",
    "router.e_score_correction_bias",
    "e_score_correction_bias",
    "moe_statics.e_score_correction_bias",
    "expert_bias",
}
# How the names of what has nothing to do with the experts' order begin: experts that every token takes, how our routers
# come to what they multiply by a row for each expert, how rows become narrow. Nor has a single number.
_STAYING = ("shared", "router.projection", "router.cell.", "descend.", "ascend.")

Order = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MoEBlock:
    """An MoE layer of a model folder.

    Args:
        name: what the names of its tensors begin with. number: the decoder layer that it is in, from 0.
        groups: groups of neighbouring experts that the router chooses among first; 1 where it does not.
        router: names of the router's tensors, which have one row or entry an expert.
    """

    name: str
    number: int
    num_experts: int
    groups: int
    router: tuple[str, ...] = ()


def moe_blocks(path: str | Path) -> list[MoEBlock]:
    """The MoE layers of the model in ``path``, by their decoder layers; layers that the model does not run (those of a
    multi-token prediction beyond its last one) are left out.

    Args:
        path: a model folder, or the folder of a training run.

    Raises:
        CheckpointError: where there is no usable model with safetensors.
        UsageError: where it has no MoE layer.
        UnsupportedError: where a layer's tensors are not all known; the message names the first that is not.
    """
    return _blocks(_Checkpoint.open(model_folder(path)))


def permute_experts(
    path: str | Path, orders: Mapping[int, Order], out: str | Path, note: Mapping[str, Any] | None = None
) -> Path:
    """Write the model in ``path`` to the new folder ``out`` with the experts of some layers in another order.

    Experts, router rows and selection biases move alike, so that each token takes the same experts as before and gets
    the same outputs, up to the rounding of sums in another order (and experts whose scores are exactly equal, where it
    is a router's position that decides). All other tensors and files stay as they are. The folder appears when it is
    complete. An adapter of the model, whose experts are named by their numbers, does not fit the new one.

    Args:
        orders: decoder layer to ``[E]``: the expert that each position is to hold.
        note: written to :data:`NOTE` beside the orders.

    Raises:
        CheckpointError, UsageError, UnsupportedError: as :func:`moe_blocks`; where ``orders`` are no permutations of
            the layers' experts, or tear groups apart; where ``out`` exists already or cannot be written.
    """
    checkpoint = _Checkpoint.open(model_folder(path))
    blocks = {block.number: block for block in _blocks(checkpoint)}
    pieces: dict[str, list[_Piece]] = {}
    for number, order in orders.items():
        if number not in blocks:
            raise CheckpointError(f"the model has no MoE layer {number}; it has {', '.join(map(str, sorted(blocks)))}")
        _check_order(blocks[number], order)
        pieces |= _moves(checkpoint, blocks[number], order)
    about = {**(note or {}), "experts": {str(number): list(map(int, order)) for number, order in orders.items()}}
    with new_folder(out) as folder:
        folder.mkdir()
        for file in sorted(checkpoint.folder.iterdir()):
            if file.is_file() and not file.name.endswith(_OTHER_WEIGHTS):
                shutil.copyfile(file, folder / file.name)
        if (checkpoint.folder / _INDEX).is_file():
            shutil.copyfile(checkpoint.folder / _INDEX, folder / _INDEX)
        for tensors in checkpoint.files:
            tensors.write(folder / tensors.path.name, pieces, checkpoint)
        (folder / NOTE).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return Path(out)


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies in its file; ``begin`` and ``end`` in bytes after the header."""

    file: _File
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def divides(self, parts: int) -> bool:
        """Whether so many equal parts are whole bytes."""
        return (self.end - self.begin) % parts == 0


@dataclass(frozen=True)
class _Piece:
    """Some bytes of a tensor."""

    tensor: _Tensor
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class _File:
    """One safetensors file: 8 bytes with the length of the header, the header, the tensors without gaps."""

    path: Path
    header: bytes
    tensors: dict[str, _Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> _File:
        try:
            with path.open("rb") as stream:
                length = stream.read(8)
                size = path.stat().st_size
                header = length + stream.read(min(size, int.from_bytes(length, "little")))
            file = cls(path, header)
            for name, entry in json.loads(header[8:]).items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    file.tensors[name] = _Tensor(file, entry["dtype"], tuple(entry["shape"]), begin, end)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be read as safetensors: {error}") from error
        ends = [0, *sorted(tensor.end for tensor in file.tensors.values())]
        begins = sorted(tensor.begin for tensor in file.tensors.values())
        if ends[:-1] != begins or len(header) + ends[-1] != size:
            raise CheckpointError(f"{str(path)!r} is damaged: its tensors do not fill it")
        return file

    def write(self, out: Path, pieces: Mapping[str, Sequence[_Piece]], checkpoint: _Checkpoint) -> None:
        with out.open("wb") as stream:
            stream.write(self.header)
            for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].begin):
                for piece in pieces.get(name, [_Piece(tensor, 0, tensor.end - tensor.begin)]):
                    stream.write(checkpoint.read(piece))


class _Checkpoint:
    """The tensors of a model folder, and where they lie."""

    def __init__(self, folder: Path, config: Any, files: list[_File]) -> None:
        self.folder, self.config, self.files = folder, config, files
        self.tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
        self._bytes: dict[Path, npt.NDArray[np.uint8]] = {}

    @classmethod
    def open(cls, folder: Path) -> _Checkpoint:
        names = [_SINGLE]
        if (folder / _INDEX).is_file():
            try:
                index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
                names = sorted({Path(name).name for name in index["weight_map"].values()})
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{str(folder / _INDEX)!r} cannot be read: {error}") from error
        elif not (folder / _SINGLE).is_file():
            raise CheckpointError(f"{str(folder)!r} holds no {_SINGLE} and no {_INDEX}: only safetensors can be placed")
        return cls(folder, load_config(folder), [_File.open(folder / name) for name in names])

    def read(self, piece: _Piece) -> memoryview:
        file = piece.tensor.file
        if file.path not in self._bytes:
            self._bytes[file.path] = np.memmap(file.path, dtype=np.uint8, mode="r", offset=len(file.header))
        return self._bytes[file.path][piece.tensor.begin + piece.begin : piece.tensor.begin + piece.end].data


# Settings of our models whose layers are of another form, and the values that are not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "zero_computation_experts": (None, {}),
    "expert_d_ffs": (None,),
    "iterations": (None, 1),
    "pre_gating": (None, "none", "layer"),
}


def _check_form(config: Any) -> None:
    reasons = [
        f"{name} is {value!r}" for name, plain in _PLAIN.items() if (value := getattr(config, name, None)) not in plain
    ]
    if getattr(config, "router", None) == "hash":
        reasons.append("router is 'hash'")
    if reasons:
        raise UnsupportedError(
            f"{' and '.join(reasons)}: the experts of such a model cannot change places or be pruned, only those of "
            "layers that each have one learned router over feed-forward experts of one width"
        )


def _blocks(checkpoint: _Checkpoint) -> list[MoEBlock]:
    _check_form(checkpoint.config)
    names: dict[int, set[str]] = {}
    for found in filter(None, map(_EXPERTS.match, checkpoint.tensors)):
        names.setdefault(int(found["number"]), set()).add(found["block"])
    layers = getattr(checkpoint.config.get_text_config(), "num_hidden_layers", None)
    names = {number: block for number, block in names.items() if layers is None or number < layers}
    if not names:
        raise UsageError(
            f"{str(checkpoint.folder)!r} holds no MoE layer that can be placed: no tensor of a decoder layer is named "
            "'...experts...' (a dense model has no experts)"
        )
    blocks = []
    for number, found_blocks in sorted(names.items()):
        if len(found_blocks) > 1:
            raise UnsupportedError(f"layer {number} has experts in two places: {', '.join(sorted(found_blocks))}")
        blocks.append(_block(checkpoint, next(iter(found_blocks)), number))
    return blocks


def _block(checkpoint: _Checkpoint, name: str, number: int) -> MoEBlock:
    experts, router = _parts(checkpoint, name)
    gates = [tensor for rest, tensor in router.items() if rest.endswith(".weight")]
    if len(gates) != 1:
        raise UnsupportedError(f"{name} has {len(gates)} router matrices with known names; placing needs exactly one")
    num_experts = gates[0].shape[0]
    for rest, tensor in router.items():
        if num_experts not in (*tensor.shape[:1], math.prod(tensor.shape)) or not tensor.divides(num_experts):
            raise UnsupportedError(
                f"{name}.{rest} is {list(tensor.shape)}: not one row for each of {num_experts} experts"
            )
    single = {int(found["expert"]) for found in map(_ONE_EXPERT.match, experts) if found}
    if single and single != set(range(num_experts)):
        raise UnsupportedError(f"{name} has {len(single)} experts by their names, but a router of {num_experts}")
    for rest, tensor in experts.items():
        if not _ONE_EXPERT.match(rest) and not (tensor.shape[:1] == (num_experts,) and tensor.divides(num_experts)):
            raise UnsupportedError(
                f"{name}.experts.{rest} is {list(tensor.shape)}: not an entry for each of {num_experts}"
            )
    names = tuple(f"{name}.{rest}" for rest in router)
    return MoEBlock(name, number, num_experts, _groups(checkpoint.config, num_experts), names)


def _parts(checkpoint: _Checkpoint, name: str) -> tuple[dict[str, _Tensor], dict[str, _Tensor]]:
    """A block's tensors of experts and of its router, by the rest of their names."""
    experts, router = {}, {}
    for rest, tensor in _beneath(checkpoint, name):
        if rest.startswith("experts."):
            experts[rest.removeprefix("experts.")] = tensor
        elif rest in _ROUTER:
            router[rest] = tensor
        elif not rest.startswith(_STAYING) and math.prod(tensor.shape) != 1:
            raise UnsupportedError(
                f"{name}.{rest} is beside the experts, and what it has to do with their order is not known"
            )
    return experts, router


def _beneath(checkpoint: _Checkpoint, name: str) -> Iterator[tuple[str, _Tensor]]:
    prefix = f"{name}."
    for key, tensor in checkpoint.tensors.items():
        if key.startswith(prefix):
            yield key.removeprefix(prefix), tensor


def _groups(config: Any, num_experts: int) -> int:
    """How many groups a router of this configuration chooses among; 1 where all of them are always open."""
    config = config.get_text_config()
    if config.model_type == "moesaic":
        groups, open_groups = ROUTERS.get(config.router).choice_groups(config.router_options), 1
    else:
        groups, open_groups = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
        if getattr(config, "topk_method", None) == "greedy":  # DeepSeek-V2's way to say that there are none
            groups = 1
    if num_experts % groups:
        raise UnsupportedError(f"the router's {groups} groups do not divide {num_experts} experts")
    return int(groups) if open_groups < groups else 1


def _check_order(block: MoEBlock, order: Order) -> None:
    if sorted(map(int, order)) != list(range(block.num_experts)):
        raise UsageError(f"the order of layer {block.number} is no permutation of its {block.num_experts} experts")
    group_of = np.asarray(order).reshape(block.groups, -1) // (block.num_experts // block.groups)
    if (group_of != group_of[:, :1]).any():
        raise UsageError(f"the order of layer {block.number} tears its router's {block.groups} groups apart")


def _moves(checkpoint: _Checkpoint, block: MoEBlock, order: Order) -> dict[str, list[_Piece]]:
    """What each tensor of a block is made of, by its name."""
    experts, router = _parts(checkpoint, block.name)
    pieces = {}
    for rest, tensor in experts.items():
        found = _ONE_EXPERT.match(rest)
        if found is None:
            pieces[f"{block.name}.experts.{rest}"] = _rows(tensor, order)
            continue
        source = f"{order[int(found['expert'])]}.{found['rest']}"
        other = experts.get(source)
        if other is None or (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            raise UnsupportedError(
                f"{block.name}.experts.{rest} cannot change places with {source}: it is {tensor.dtype} "
                f"{list(tensor.shape)}, the other {f'{other.dtype} {list(other.shape)}' if other else 'missing'}"
            )
        pieces[f"{block.name}.experts.{rest}"] = [_Piece(other, 0, other.end - other.begin)]
    return pieces | {f"{block.name}.{rest}": _rows(tensor, order) for rest, tensor in router.items()}


def _rows(tensor: _Tensor, order: Order) -> list[_Piece]:
    size = (tensor.end - tensor.begin) // len(order)
    return [_Piece(tensor, expert * size, (expert + 1) * size) for expert in map(int, order)]
