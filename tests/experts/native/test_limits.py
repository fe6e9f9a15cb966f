"""The limits that the native kernels measure."""

from __future__ import annotations

import pytest
import torch
from tests.experts.native.problems import ISAS, needs_library

from moesaic.experts.native import library, limits

pytestmark = needs_library


@pytest.mark.parametrize("isa", ISAS)
def test_rates(isa: str) -> None:
    with library.use_isa(isa):
        # Every variant does some operations a step on a thread, and twice as many on two threads or in two steps.
        for dtype in (torch.float32, torch.bfloat16):
            once = library.multiply_adds(dtype, 100, 1)
            assert once > 0
            assert library.multiply_adds(dtype, 200, 1) == library.multiply_adds(dtype, 100, 2) == 2 * once
        assert limits.multiply_add_rate(torch.float32, seconds=0) > 0
        assert limits.read_bandwidth(num_bytes=(1 << 20) + 7, seconds=0) > 0


def test_the_description() -> None:
    native = limits.measure()
    assert native.isa in native.isas == ISAS
    assert set(native.multiply_add_flop_per_second) == {"float32", "bfloat16"}
