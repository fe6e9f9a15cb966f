"""Where and how it is computed, where the recipe leaves it to the machine."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moesaic import hardware
from moesaic.train.precision import choose_precision

# What the processor has; what "auto" then is.
FEATURES = [
    (["avx2"], "fp32"),
    (["asimd", "i8mm"], "fp32"),
    (["avx512_bf16"], "bf16"),
    (["amx_tile", "amx_bf16"], "bf16"),
    (["asimd", "bf16"], "bf16"),
]


@pytest.mark.parametrize(("features", "expected"), FEATURES, ids=str)
def test_auto_is_bf16_where_the_processor_multiplies_it(
    features: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = dataclasses.replace(hardware.cpu(), features=features)
    monkeypatch.setattr(hardware, "cpu", lambda: cpu)
    assert choose_precision("auto", torch.device("cpu")) == expected
    assert choose_precision("fp32", torch.device("cpu")) == "fp32"
