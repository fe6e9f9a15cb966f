"""Low-rank adapters on disk, in PEFT's format.

    <folder>/adapter_config.json        PEFT's: rank, alpha, targets
    <folder>/adapter_model.safetensors  PEFT's: A and B of every target
    <folder>/moesaic.json               ours, which PEFT passes over: base fingerprint, chosen experts, training summary

PEFT knows no parts for chosen experts only: those of the others are stored as zeros, which is exact, and
``moesaic.json`` says which are meant.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from moesaic.adapters.folder import PEFT_MANIFEST, Base, adapter_folder
from moesaic.adapters.lora import LoraAdapter, LoraPart, check_parts, find_targets
from moesaic.adapters.lora_peft import check_settings, config_of, parts_of, tensors_of
from moesaic.adapters.mapped import mapped_tensors
from moesaic.errors import CheckpointError, UsageError

FORMAT, VERSION = "moesaic-lora", 1
TENSORS, EXTRA = "adapter_model.safetensors", "moesaic.json"


def is_lora(path: str | Path) -> bool:
    """Whether a folder (or the run that it is in) holds an adapter in PEFT's format.

    Raises:
        CheckpointError: where it holds no adapter at all.
    """
    return (adapter_folder(path) / PEFT_MANIFEST).is_file()


def read_lora(path: str | Path, model: nn.Module, fingerprint: str | None = None) -> LoraAdapter:
    """Read a low-rank adapter, PEFT's or ours, and check all of it.

    Args:
        model: the base; its structure tells which parameter a tensor belongs to. Nothing of it is changed.
        fingerprint: the base's; compared where the adapter knows the one that it was trained from.

    Returns:
        its tensors on the CPU, in the dtypes in which they were saved.

    Raises:
        CheckpointError: where the folder is damaged, does not fit the model, belongs to another base, or is of a
            kind that we do not compute (DoRA, trained biases, other methods than LoRA); the message says which.
    """
    folder = adapter_folder(path)
    try:
        return _read(folder, model, fingerprint)
    except CheckpointError as error:
        raise CheckpointError(f"the adapter in {str(folder)!r} cannot be used: {error}") from error


def save_lora(folder: str | Path, adapter: LoraAdapter, model: nn.Module) -> Path:
    """Write an adapter as PEFT loads it; it replaces what is in ``folder``, and appears there when it is complete.

    Args:
        model: the base; its structure tells under which names PEFT looks.

    Raises:
        CheckpointError: where the adapter does not fit the model.
        UsageError: where it cannot be written.
    """
    folder, targets = Path(folder), find_targets(model)
    check_parts(adapter, targets)
    extra = {
        "format": FORMAT,
        "version": VERSION,
        "base": vars(adapter.base) if adapter.base else None,
        "experts": {name: part.experts for name, part in adapter.parts.items() if part.experts is not None},
        "training": dict(adapter.training),
    }
    making = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        save_file(tensors_of(adapter, targets), making / TENSORS, metadata={"format": "pt"})
        for name, told in ((PEFT_MANIFEST, config_of(adapter, targets)), (EXTRA, extra)):
            (making / name).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        making.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the adapter {str(folder)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def _read(folder: Path, model: nn.Module, fingerprint: str | None) -> LoraAdapter:
    if not (folder / PEFT_MANIFEST).is_file():
        raise CheckpointError(f"it holds no {PEFT_MANIFEST}, as a low-rank adapter does")
    config = _json(folder / PEFT_MANIFEST)
    check_settings(config)
    base, experts, training = _extra(folder)
    if base is not None and fingerprint is not None and base.fingerprint != fingerprint:
        raise CheckpointError(
            f"it was trained from {base.name!r} ({base.fingerprint}), and this base is another model ({fingerprint})"
        )
    try:
        # Copies: the file may be written anew while the adapter is in use.
        tensors = {name: tensor.clone() for name, tensor in mapped_tensors(folder / TENSORS).items()}
    except FileNotFoundError:
        raise CheckpointError(f"it holds no {TENSORS} (an adapter_model.bin is not read)") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{TENSORS} is damaged or truncated: {error}") from error
    parts = parts_of(tensors, config, find_targets(model))
    return LoraAdapter(_chosen(parts, experts), base, training)


def _json(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(told, dict):
        raise CheckpointError(f"{file.name} is no JSON object")
    return told


def _extra(folder: Path) -> tuple[Base | None, dict[str, list[int]], dict[str, Any]]:
    """Base, chosen experts by parameter, training summary: what PEFT has no place for."""
    if not (folder / EXTRA).is_file():
        return None, {}, {}
    told = _json(folder / EXTRA)
    if (told.get("format"), told.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{EXTRA} is not of format {FORMAT!r}, version {VERSION}")
    try:
        base = told["base"] and Base(**{key: str(told["base"][key]) for key in ("fingerprint", "model_type", "name")})
        experts = {str(name): [int(each) for each in ids] for name, ids in told["experts"].items()}
        return base, experts, dict(told["training"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{EXTRA} says nothing usable of its base or experts ({error!r})") from error


def _chosen(parts: dict[str, LoraPart], experts: Mapping[str, list[int]]) -> dict[str, LoraPart]:
    """Of each stack the experts that were meant; the others hold zeros."""
    chosen = dict(parts)
    for name, ids in experts.items():
        part = parts.get(name)
        if part is None or part.experts is None or not set(ids) <= set(part.experts) or ids != sorted(set(ids)):
            raise CheckpointError(f"{EXTRA} names experts {ids} of {name}, which {TENSORS} does not hold")
        if len(ids) < len(part.experts):
            chosen[name] = LoraPart(part.a[ids], part.b[ids], part.scaling, tuple(ids))
    return chosen
