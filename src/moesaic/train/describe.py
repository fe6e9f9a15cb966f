"""What ``run.json`` says of a run besides its recipe: machine, data, sizes."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from moesaic import hardware
from moesaic.data import TokenData
from moesaic.data.documents import Skipped
from moesaic.train.evaluate import DomainResult
from moesaic.train.loop import Trainer
from moesaic.train.world import launch

# What makes a resumed run's numbers differ although its recipe is the same.
_MATTERS = ("torch", "cpu", "capability", "device", "precision", "threads", "processes")


def environment(trainer: Trainer) -> dict[str, Any]:
    """Versions, processor, device, precision, threads and processes: what a number may depend on besides the recipe."""
    cpu = hardware.cpu()
    device = trainer.device
    return {
        **hardware.versions(),
        "cpu": cpu.model,
        "cores": cpu.cores,
        "features": cpu.features,
        "capability": cpu.capability,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": trainer.precision,
        "threads": torch.get_num_threads(),
        "processes": trainer.world.size,
        "hosts": trainer.world.hosts,
    }


def environment_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two environments differs and makes a resumed run's numbers differ."""
    then = {"processes": 1, **then}  # runs of earlier versions do not say it
    changes = {key: f"({then.get(key)} then, {now[key]} now)" for key in _MATTERS if then.get(key) != now[key]}
    if set(changes) == {"processes"}:
        return [f"processes {changes['processes']}, which only rounds otherwise"]
    return [f"{key} {change}" for key, change in changes.items()]


def data_note(data: TokenData) -> dict[str, Any]:
    """Fingerprint and sizes of the data, and what of it could not be read."""
    return {
        "fingerprint": data.fingerprint,
        "counts": {
            side: {name: asdict(count) for name, count in counts.items()} for side, counts in data.counts.items()
        },
        "skipped": [asdict(skip) for skip in data.skipped],
        "duplicates": data.duplicates,
    }


def skipped_line(skipped: Sequence[Skipped]) -> str:
    """How much of the data could not be read, and an example with its reason; ``skipped`` is not empty."""
    count = sum(skip.count for skip in skipped)
    return f"skipped {count} that could not be read, such as {skipped[0].path}: {skipped[0].reason}"


def life_note(step: int) -> dict[str, Any]:
    """One process, or start of several, that works on a run: when it began, where from, and by which command."""
    return {
        "started": now(),
        "from_step": step,
        "command": shlex.join(sys.argv),
        "process": os.getpid(),
        "launch": launch(),
    }


def plain(results: Mapping[str, DomainResult]) -> dict[str, Any]:
    """Results as JSON takes them."""
    return {name: asdict(result) for name, result in results.items()}


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
