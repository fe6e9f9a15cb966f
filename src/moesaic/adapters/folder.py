"""An ESFT adapter on disk: whole tuned experts, and a manifest that says whose they are.

    <folder>/adapter.json         format, version, base, layers (which experts, with their scores), training summary
    <folder>/experts.safetensors  "<module path>.<parameter>": the rows of the tuned experts, [n, ...]

What decides where a row goes (base and expert ids) is hashed into the safetensors file, so that a manifest that was
changed, or belongs to another file, is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.adapters.mapped import mapped_tensors
from moesaic.errors import CheckpointError, UsageError

FORMAT, VERSION = "moesaic-esft", 1
MANIFEST, TENSORS = "adapter.json", "experts.safetensors"
PEFT_MANIFEST = "adapter_config.json"
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained from. ``fingerprint`` decides; the others are for people."""

    fingerprint: str
    model_type: str
    name: str


@dataclass(frozen=True)
class AdapterLayer:
    """The tuned experts of one layer.

    Attributes:
        experts: their ids, ascending.
        scores: of each, why it was chosen: its share of the layer's gate values or tokens, 0 to 1.
        num_experts: of the base's layer.
    """

    experts: list[int]
    scores: list[float]
    num_experts: int


@dataclass(frozen=True)
class ExpertAdapter:
    """An adapter folder whose manifest and file have been checked; tensors are read when they are asked for.

    Attributes:
        path: the folder itself.
        layers: by the path of the experts module, as in ``model.layers.0.mlp.experts``.
        bytes: of all tensors.
        training: what the run said of itself.
        parameters: module path to parameter names.
    """

    path: Path
    base: Base
    layers: dict[str, AdapterLayer]
    bytes: int
    training: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, list[str]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of the base."""
        return self.base.fingerprint

    def tensors(self, module_path: str) -> dict[str, Tensor]:
        """Parameter name to rows ``[n, ...]`` on the CPU, in the order of the layer's ``experts``; memory-mapped.

        Raises:
            CheckpointError: where the file has gone or changed since it was checked.
        """
        try:
            tensors = mapped_tensors(self.path / TENSORS)
            return {name: tensors[f"{module_path}.{name}"] for name in self.parameters[module_path]}
        except (OSError, SafetensorError, LookupError) as error:
            raise _broken(self.path, f"{TENSORS} cannot be read: {error}") from error


def adapter_folder(path: str | Path) -> Path:
    """The folder of an adapter: ``path`` itself, or the ``adapter/`` of the fine-tuning run that it holds.

    It may be an ESFT adapter (``adapter.json``) or a LoRA in PEFT's format (``adapter_config.json``).

    Raises:
        CheckpointError: where there is none.
    """
    path = Path(path)
    for folder in (path, path / "adapter"):
        if any((folder / name).is_file() for name in (MANIFEST, PEFT_MANIFEST)):
            return folder
    if (path / "run.json").is_file():
        raise CheckpointError(f"the run in {str(path)!r} has no adapter: it has not finished, or tuned a whole model")
    raise CheckpointError(f"there is no adapter at {str(path)!r}: give a folder that holds an {MANIFEST}")


def read_adapter(path: str | Path) -> ExpertAdapter:
    """Open an ESFT adapter (or the run that made it) and check it as a whole; no tensor's values are read.

    Raises:
        CheckpointError: where it is missing, of another format or version, truncated, changed, or its two files do not
            agree; the message says which.
    """
    folder = adapter_folder(path)
    manifest = _read_manifest(folder)
    try:
        base = Base(**{key: str(manifest["base"][key]) for key in ("fingerprint", "model_type", "name")})
        layers = {str(name): _layer(folder, str(name), told) for name, told in manifest["layers"].items()}
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _broken(folder, f"{MANIFEST} says nothing usable of its base or layers ({error!r})") from error
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            if (file.metadata() or {}).get("manifest") != _seal(base, layers):
                raise _broken(folder, f"{MANIFEST} has been changed, or {TENSORS} belongs to another adapter")
            parameters, size = _check_tensors(folder, file, layers)
    except FileNotFoundError:
        raise _broken(folder, f"it holds no {TENSORS}") from None
    except (OSError, SafetensorError) as error:
        raise _broken(folder, f"{TENSORS} is damaged or truncated: {error}") from error
    training = manifest.get("training")
    return ExpertAdapter(folder, base, layers, size, training if isinstance(training, dict) else {}, parameters)


def write_adapter(
    folder: str | Path,
    base: Base,
    layers: Mapping[str, AdapterLayer],
    tensors: Mapping[str, Mapping[str, Tensor]],
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter, which replaces what is in ``folder``, and appears there when it is complete.

    Args:
        tensors: module path to parameter name to rows ``[n, ...]``, in the order of the layer's experts.
        training: JSON values; what should be known of how it came to be.

    Raises:
        UsageError: where it cannot be written.
    """
    folder = Path(folder)
    kept = {name: layers[name] for name in sorted(layers)}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "base": vars(base),
        "layers": {name: vars(layer) for name, layer in kept.items()},
        "training": dict(training or {}),
    }
    flat = {
        f"{name}.{parameter}": rows.detach().cpu().contiguous()
        for name in kept
        for parameter, rows in tensors[name].items()
    }
    making = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        # One entry: safetensors writes several in an order that differs from process to process.
        save_file(flat, making / TENSORS, metadata={"manifest": _seal(base, kept)})
        (making / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        making.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the adapter {str(folder)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{str(folder)!r} is an adapter in PEFT's format, not one of tuned experts")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(folder, f"{MANIFEST} cannot be read: {error}") from error
    told = manifest.get("format") if isinstance(manifest, dict) else None
    if told != FORMAT:
        raise _broken(folder, f"the format in its {MANIFEST} is {told!r}, not {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise _broken(
            folder,
            f"it is of version {manifest.get('version')!r} of the format, and this moesaic reads version {VERSION}",
        )
    return manifest  # type: ignore[no-any-return]


def _layer(folder: Path, name: str, told: Mapping[str, Any]) -> AdapterLayer:
    layer = AdapterLayer(list(told["experts"]), [float(score) for score in told["scores"]], told["num_experts"])
    whole = [layer.num_experts, *layer.experts]
    if not all(type(value) is int for value in whole) or layer.experts != sorted(set(layer.experts)):
        raise _broken(folder, f"the expert ids of {name} in {MANIFEST} are not ascending whole numbers")
    if not layer.experts or layer.experts[0] < 0 or layer.experts[-1] >= layer.num_experts:
        raise _broken(folder, f"the expert ids of {name} in {MANIFEST} are not in 0 ... {layer.num_experts - 1}")
    if len(layer.scores) != len(layer.experts) or not all(map(math.isfinite, layer.scores)):
        raise _broken(folder, f"{name} has {len(layer.experts)} experts in {MANIFEST}, but not a score for each")
    return layer


def _check_tensors(folder: Path, file: Any, layers: Mapping[str, AdapterLayer]) -> tuple[dict[str, list[str]], int]:
    """The parameters of each layer and the bytes of all, where the file holds rows for each layer and nothing else."""
    parameters: dict[str, list[str]] = {name: [] for name in layers}
    size = 0
    for key in sorted(file.keys()):
        name, _, parameter = key.rpartition(".")
        part = file.get_slice(key)
        shape, kind = part.get_shape(), part.get_dtype()
        if name not in layers:
            raise _broken(folder, f"{TENSORS} holds {key}, of a layer that {MANIFEST} does not list")
        rows = len(layers[name].experts)
        if len(shape) not in (2, 3) or shape[0] != rows or kind not in _FLOATS:
            raise _broken(folder, f"{key} is {kind} {shape}, but must be floats of {rows} experts by {MANIFEST}")
        parameters[name].append(parameter)
        size += math.prod(shape) * _FLOATS[kind].itemsize
    if empty := next(_without(parameters), None):
        raise _broken(folder, f"{TENSORS} holds nothing of {empty}, which {MANIFEST} lists")
    return parameters, size


def _without(parameters: Mapping[str, list[str]]) -> Iterator[str]:
    return (name for name, found in parameters.items() if not found)


def _seal(base: Base, layers: Mapping[str, AdapterLayer]) -> str:
    """A hash of what decides where the rows go: base, layers, expert ids."""
    placed = [base.fingerprint, sorted((name, layer.num_experts, layer.experts) for name, layer in layers.items())]
    return hashlib.blake2b(json.dumps(placed).encode(), digest_size=16).hexdigest()


def _broken(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"the adapter in {str(folder)!r} cannot be used: {reason}")
