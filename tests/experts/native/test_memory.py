"""What is asked of Linux about memory: whole large pages inside a tensor, and its content stays."""

from __future__ import annotations

import sys

import pytest
import torch

import moesaic
from moesaic.experts import ExpertBank
from moesaic.experts.native import library, memory

LARGE = 2 << 20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked of Linux")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize("num_bytes", [0, LARGE, 2 * LARGE - 1])
def test_small_memory_is_left_alone(num_bytes: int, asked: list[tuple[int, int, int]]) -> None:
    tensor = torch.empty(num_bytes, dtype=torch.uint8)
    assert memory.filled_by_huge_pages(tensor) is tensor
    assert not asked


@pytest.mark.parametrize("offset", [0, 1, 4096, LARGE])
def test_only_whole_pages_of_the_tensor_itself(offset: int, asked: list[tuple[int, int, int]]) -> None:
    tensor = torch.empty(offset + 5 * LARGE + 7, dtype=torch.uint8)[offset : offset + 5 * LARGE]
    memory.filled_by_huge_pages(tensor)
    ((start, size, advice),) = asked
    assert advice == 14 and start % LARGE == size % LARGE == 0
    assert tensor.data_ptr() <= start and start + size <= tensor.data_ptr() + tensor.nbytes
    assert size >= 4 * LARGE


def test_content_that_is_there_stays() -> None:
    tensor = torch.randint(0, 255, (5 * LARGE,), dtype=torch.uint8)
    copy = tensor.clone()
    assert torch.equal(memory.filled_by_huge_pages(tensor), copy)


@pytest.mark.skipif(library.missing() is not None, reason=f"no native kernels: {library.missing()}")
def test_large_gradients_are_those_of_the_loop() -> None:
    layer = moesaic.MoE(moesaic.MoEConfig(d_model=256, d_ff=768, num_experts=8, top_k=2))
    assert isinstance(layer.experts, ExpertBank) and layer.experts.up.nbytes >= 4 * LARGE
    x_TD, found = torch.randn(40, 256), {}
    for backend in ("native", "loop"):
        with moesaic.use_backend(backend):
            layer.zero_grad(set_to_none=True)
            layer(x_TD).square().sum().backward()
            found[backend] = [parameter.grad for parameter in layer.parameters()]
    for ours, theirs in zip(found["native"], found["loop"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
