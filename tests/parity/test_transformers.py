"""Every MoE of transformers: its experts by ``"moesaic"`` against its own code, outputs and gradients.

A test a class; the last one fails when the installed transformers has a class that none of them covers.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from tests.parity.experts_classes import NUM_EXPERTS, WIDTH, build, decorated, load, wrapped
from tests.reference import relative_error
from torch import Tensor, nn

import moesaic
import moesaic.hf
from moesaic.hf import experts

CLASSES = decorated()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# A class that is not compared, and why. Empty: every class of transformers 5.17 to 5.23 runs.
NOT_COVERED: dict[str, str] = {}

TOKENS, TOP_K = 17, 3


def routing(kind: str) -> tuple[Tensor, Tensor]:
    """Ids and weights ``[T, K]``: ``even``, ``skewed`` (experts without a token), or with ``sentinel`` ids."""
    scores = torch.rand(TOKENS, NUM_EXPERTS)
    if kind == "skewed":
        scores[:, [1, 4, 5]] = -1.0
    weights, ids = scores.topk(TOP_K)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    if kind == "sentinel":
        null = torch.rand(TOKENS, TOP_K) < 0.4
        null[3] = True
        ids = ids.masked_fill(null, NUM_EXPERTS)  # their weights stay: they must not matter
    return ids, weights


Result = dict[str, Tensor]


def run(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, implementation: str) -> Result:
    """The output and every gradient."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(x, ids, weights)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return {"output": y, "gradient of the input": x.grad, "gradient of the weights": weights.grad, **gradients}


def eager(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
    """The class's own forward; where it knows no sentinels, with an expert whose weight is zero in their place."""
    null = ids == NUM_EXPERTS
    if null.any():
        try:
            return run(module, x, ids, weights, "eager")
        except (RuntimeError, IndexError):
            ids, weights = ids.masked_fill(null, 0), weights.masked_fill(null, 0.0)
    result = run(module, x, ids, weights, "eager")
    # To that expert's weight a gradient flows, which a slot that costs nothing does not have.
    result["gradient of the weights"].masked_fill_(null, 0.0)
    return result


def assert_same(got: Result, wanted: Result, dtype: torch.dtype) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype, name
        assert wanted[name].any(), f"{name} is zero: nothing is compared"
        assert relative_error(got[name], wanted[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("module_name", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_experts(
    module_name: str, name: str, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    torch.manual_seed(0)
    record_property("compared with eager", name)  # for the list at the end of the run, see conftest.py
    module = build(load(module_name, name), dtype)
    assert moesaic.hf.is_experts_module(module)
    x = torch.randn(TOKENS, WIDTH).to(dtype)
    for kind in ("even", "skewed", "sentinel"):
        ids, weights = routing(kind)
        weights = weights.to(dtype)
        wanted = eager(module, x, ids, weights)
        for backend in ("grouped", "loop"):
            with (
                moesaic.use_backend(backend),
                mock.patch.object(experts, "compute_and_tell", wraps=experts.compute_and_tell) as ours,
            ):
                got = run(module, x, ids, weights, "moesaic")
            assert ours.call_count == 1
            assert_same(got, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_weights_of_another_precision(dtype: torch.dtype) -> None:
    """Several routers hand over float32 weights whatever the model's precision."""
    torch.manual_seed(0)
    for module_name, name in CLASSES[:: len(CLASSES) // 8]:
        module = build(load(module_name, name), dtype)
        x, (ids, weights) = torch.randn(TOKENS, WIDTH).to(dtype), routing("even")
        module.config._experts_implementation = "moesaic"
        y = module(x, ids.int(), weights)
        assert y.dtype == dtype
        assert relative_error(y, module.float()(x.float(), ids, weights)) < TOLERANCE[dtype]


def test_nothing_is_left_out() -> None:
    """What the loaded classes say against what the sources say, from which the tests above are made."""
    found = {(cls.__module__, cls.__name__) for cls in wrapped()}
    covered = set(CLASSES)
    reasons = {name for _, name in covered} & NOT_COVERED.keys()
    missing = sorted(name for _, name in found - covered if name not in NOT_COVERED)
    assert not missing, f"not compared, and no reason stated: {', '.join(missing)}"
    assert covered <= found, f"in the sources, but not loaded: {sorted(covered - found)}"
    assert not reasons, f"compared, though a reason says that they are not: {', '.join(sorted(reasons))}"
    assert len(covered) >= 50
