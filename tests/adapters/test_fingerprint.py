"""One base has one fingerprint, whatever it is loaded in; every other model has another one."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.adapters import bases
from torch import nn

from moesaic.adapters.fingerprint import fingerprint
from moesaic.errors import UnsupportedError
from moesaic.hf.load import load_model


@pytest.mark.parametrize("kind", [*bases.MOE, "dense"])
def test_it_does_not_depend_on_dtype_layout_or_process(kind: str, base_folders: dict[str, Path]) -> None:
    folder = base_folders[kind]
    model, _ = load_model(folder)
    found = fingerprint(model)
    assert found.startswith("v1:")
    assert len(found) == 35
    assert fingerprint(load_model(folder, dtype=torch.bfloat16)[0]) == found
    for parameter in model.parameters():
        if parameter.ndim == 3:  # as moesaic.freeze lays out transposed experts
            parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert fingerprint(model) == found
    line = (
        "import sys; from moesaic.adapters.fingerprint import fingerprint; from moesaic.hf.load import load_model; "
        "print(fingerprint(load_model(sys.argv[1])[0]))"
    )
    if kind == "ours":
        told = subprocess.run([sys.executable, "-c", line, str(folder)], capture_output=True, text=True, check=True)
        assert told.stdout.strip() == found


@pytest.mark.parametrize("kind", bases.MOE)
def test_every_expert_and_every_matrix_counts(kind: str) -> None:
    model = bases.make(kind)
    found = {fingerprint(model)}
    changes = 1
    for parameter in model.parameters():
        parts = parameter.data if parameter.ndim == 3 else [parameter.data]
        for part in parts:
            before = part.clone()
            part.mul_(1.01).add_(0.01)
            found.add(fingerprint(model))
            part.copy_(before)
            changes += 1
    assert len(found) == changes
    assert fingerprint(model) in found


def test_names_and_shapes_count() -> None:
    one, other, wide = nn.Module(), nn.Module(), nn.Module()
    one.a = nn.Parameter(torch.zeros(2, 3))
    other.b = nn.Parameter(torch.zeros(2, 3))
    wide.a = nn.Parameter(torch.zeros(3, 2))
    assert len({fingerprint(module) for module in (one, other, wide)}) == 3


def test_samples_lie_all_over_a_matrix() -> None:
    """A change of any one row or column of a large matrix is seen, or of nearly any."""
    module = nn.Linear(256, 256, bias=False)
    found = fingerprint(module)
    seen = 0
    for axis in (0, 1):
        for start in range(0, 256, 16):
            changed = copy.deepcopy(module)
            changed.weight.data.narrow(axis, start, 16).add_(1)
            seen += fingerprint(changed) != found
    assert seen == 32


def test_empty_scalar_and_integer_tensors_take_part() -> None:
    module = nn.BatchNorm1d(0)
    found = fingerprint(module)
    assert module.num_batches_tracked is not None
    module.num_batches_tracked += 1
    assert fingerprint(module) != found


def test_it_changes_nothing_and_needs_values() -> None:
    model = bases.make("ours")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fingerprint(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.device("meta"):
        empty = bases.make("olmoe")
    with pytest.raises(UnsupportedError, match="is on the meta device: a model without values has no fingerprint"):
        fingerprint(empty)
