"""ESFT adapters for a model with random weights: some experts of every layer, changed a little."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.folder import AdapterLayer, Base, write_adapter
from moesaic.bench.workload import tiled
from moesaic.hf.experts import parameter_names
from moesaic.hf.quantized import expert_modules

_CHANGE = 0.1


def make_adapters(model: Any, folder: Path, count: int, tuned: int, seed: int = 0) -> list[Path]:
    """``count`` adapters of ``tuned`` experts in each layer, drawn at random for each adapter and layer; made once.

    The model's experts plus noise of a tenth of their size. Which tokens meet a tuned expert is the router's choice.

    Args:
        folder: where they are kept, in a folder of their own that tells their number and the model they are of.
    """
    base = Base(fingerprint(model), model.config.model_type, folder.name)
    own = folder / f"esft-{count}x{tuned}-{base.fingerprint[-8:]}-{seed}"
    names = [f"adapter-{i:02d}" for i in range(count)]
    if not own.exists():
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder))
        try:
            for i, name in enumerate(names):
                _make(model, base, beside / name, tuned, seed + i)
            beside.rename(own)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return [own / name for name in names]


def _make(model: Any, base: Base, folder: Path, tuned: int, seed: int) -> None:
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layers: dict[str, AdapterLayer] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for path, module in expert_modules(model).items():
        parameters = {name: module.get_parameter(name) for name in parameter_names(module).values()}
        num_experts = len(next(iter(parameters.values())))
        chosen = sorted(dice.sample(range(num_experts), tuned))
        layers[path] = AdapterLayer(chosen, [1 / num_experts] * tuned, num_experts)
        tensors[path] = {name: _changed(values[chosen], generator) for name, values in parameters.items()}
    write_adapter(folder, base, layers, tensors)


def _changed(rows: Tensor, generator: torch.Generator) -> Tensor:
    rows = rows.detach()
    return rows + tiled(tuple(rows.shape), _CHANGE * float(rows[0].float().std()), rows.dtype, generator)
