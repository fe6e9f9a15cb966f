"""Linear layers on the native kernels: the same numbers, and PyTorch's own where gradients or tracing are wanted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.experts.native.problems import needs_library
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from moesaic import MoE, MoEConfig
from moesaic.experts.native import linear
from moesaic.experts.row_invariance import row_invariant
from moesaic.hf import use_native_linears

pytestmark = needs_library


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each native call had."""
    made: list[int] = []
    original = linear.linear

    def counted(x: Tensor, *rest: object, **options: object) -> Tensor:
        made.append(x.shape[0])
        return original(x, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "linear", counted)
    return made


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 3, bias=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_numbers(dtype: torch.dtype, calls: list[int]) -> None:
    model, x = network().to(dtype), torch.randn(7, 24).to(dtype)
    with torch.inference_mode():
        wanted = model(x)
        assert use_native_linears(model) == 2
        got = model(x)
    assert calls == [7, 7]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_gradients_other_dtypes_and_tracing_stay_pytorchs(calls: list[int]) -> None:
    model, x = network(), torch.randn(7, 24)
    use_native_linears(model)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert not calls
        torch.testing.assert_close(compiled, model(x))
        assert calls


def test_copies_are_models_of_their_own(calls: list[int]) -> None:
    model, x = network(), torch.randn(7, 24)
    use_native_linears(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            before = model(x)
            for parameter in other.parameters():
                parameter.zero_()
            assert torch.equal(model(x), before) and not other(x).any()
    assert calls


def test_subclasses_are_left_alone() -> None:
    class Other(nn.Linear):
        pass

    assert use_native_linears(nn.Sequential(Other(3, 3))) == 0


def test_projections_to_a_narrower_width_too() -> None:
    """PyTorch's matrix product gives other bits for one row than for several at these widths."""
    torch.manual_seed(0)
    layer = MoE(MoEConfig(d_model=320, d_ff=32, num_experts=4, top_k=2, communication_width=192))
    x = torch.randn(33, 320)
    assert use_native_linears(layer) == 3
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    assert linears == [layer.descend, layer.ascend]
    assert all("forward" in module.__dict__ for module in linears)
    with torch.inference_mode(), row_invariant():
        together = layer(x)
        for first, rows in ((0, 1), (3, 1), (5, 4), (8, 17)):
            assert torch.equal(layer(x[first : first + rows]), together[first : first + rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_routers_that_multiply_by_a_weight_of_their_own(dtype: torch.dtype, calls: list[int]) -> None:
    router = OlmoeTopKRouter(OlmoeConfig(hidden_size=24, num_experts=8, num_experts_per_tok=2)).to(dtype)
    torch.manual_seed(0)
    nn.init.normal_(router.weight)
    x = torch.randn(7, 24).to(dtype)
    with torch.inference_mode():
        wanted = router(x)
        assert use_native_linears(nn.Sequential(router, nn.LayerNorm(8))) == 1
        got = router(x)
    assert calls == [7]
    for one, other in zip(got[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert torch.equal(got[2], wanted[2])
    router(x)[0].sum().backward()
    assert router.weight.grad is not None and len(calls) <= 1
