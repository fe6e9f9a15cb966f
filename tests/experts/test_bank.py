"""The expert bank and the shared experts as modules: layout, initial values, activations, views without copies."""

from __future__ import annotations

import pytest
import torch
from tests.reference import FUNCTIONS, activate

from moesaic.errors import ConfigError
from moesaic.experts import ACTIVATIONS, ExpertBank, SharedExperts

GATED = {"swiglu", "geglu", "geglu_tanh"}


def test_every_activation_is_in_the_reference() -> None:
    assert set(ACTIVATIONS.names()) == set(FUNCTIONS)
    assert {name for name in ACTIVATIONS if ACTIVATIONS.get(name).gated} == GATED


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_activations_are_their_formulas(name: str) -> None:
    h = torch.linspace(-6, 6, 48, dtype=torch.float64).view(3, 16)[:, torch.randperm(16)]
    wanted = torch.stack([activate(row, name) for row in h])
    torch.testing.assert_close(ACTIVATIONS.get(name).apply(h), wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", sorted(FUNCTIONS))
def test_parameters(activation: str, bias: bool) -> None:
    bank = ExpertBank(6, 10, 3, activation, bias)
    width = 20 if activation in GATED else 10
    shapes = {name: list(p.shape) for name, p in bank.named_parameters()}
    biases = {"up_bias": [3, width], "down_bias": [3, 6]} if bias else {}
    assert shapes == {"up": [3, width, 6], "down": [3, 6, 10], **biases}


def test_initial_values() -> None:
    torch.manual_seed(0)
    bank = ExpertBank(64, 256, 4, bias=True)
    assert bank.up.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert bank.down.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert not bank.up_bias.any()
    assert not bank.down_bias.any()
    bank.reset_parameters(0.02)
    assert bank.up.std().item() == pytest.approx(0.02, rel=0.05)
    assert bank.down.std().item() == pytest.approx(0.02, rel=0.05)


def test_backends_get_views() -> None:
    bank = ExpertBank(6, 10, 3, bias=True)
    weights = bank.weights()
    assert weights.up_EDG().data_ptr() == bank.up.data_ptr()
    assert weights.down_EFD().data_ptr() == bank.down.data_ptr()
    assert list(weights.up_EDG().shape) == [3, 6, 20]
    assert list(weights.down_EFD().shape) == [3, 10, 6]
    assert weights.to(torch.float32) is weights
    half = weights.to(torch.bfloat16)
    assert {t.dtype for t in (half.up, half.down, half.up_bias, half.down_bias)} == {torch.bfloat16}


def test_unknown_activation() -> None:
    with pytest.raises(ConfigError, match=r"unknown activation 'swigul': did you mean 'swiglu'\?"):
        ExpertBank(4, 4, 2, "swigul")
    with pytest.raises(ConfigError, match=r"unknown activation 'silu'"):
        SharedExperts(4, 4, 1, "silu", False)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_shared_experts_are_the_sum_of_separate_ones(activation: str) -> None:
    torch.manual_seed(0)
    shared, x = SharedExperts(6, 5, 3, activation, False), torch.randn(4, 6)
    total = torch.zeros(4, 6)
    for s in range(3):
        rows = [slice(s * 5, s * 5 + 5)] + ([slice(15 + s * 5, 20 + s * 5)] if activation in GATED else [])
        up = torch.cat([shared.up.weight[r] for r in rows])
        h = ACTIVATIONS.get(activation).apply(x @ up.T)
        total = total + h @ shared.down.weight[:, s * 5 : s * 5 + 5].T
    torch.testing.assert_close(shared(x), total)


def test_the_shared_gate() -> None:
    torch.manual_seed(0)
    shared, x = SharedExperts(6, 5, 1, "swiglu", True, gated_output=True), torch.randn(4, 6)
    with torch.no_grad():
        shared.gate.weight.zero_()
        halved = shared(x)
        shared.gate.weight.copy_(torch.randn(1, 6))
        logits = x @ shared.gate.weight.T
        torch.testing.assert_close(shared(x), halved * 2 / (1 + (-logits).exp()))
