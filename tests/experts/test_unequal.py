"""Experts of unequal width: against loops, and that narrow experts cost what they are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests import formulas, reference
from torch import Tensor, nn

import moesaic
from moesaic import MoE, MoEConfig
from moesaic.errors import ConfigError
from moesaic.experts import ExpertBank
from moesaic.experts.unequal import UnequalExperts, banks_of
from moesaic.routing import Routing

D = 10
WIDTHS = {
    "two sizes": [3, 3, 12, 12],
    "each its own": [2, 5, 9, 4],
    "taking turns": [3, 12, 3, 12],
    "small and big": [2, 32],
    "three of a kind": [4, 4, 4, 16],
}


def layer_of(d_ffs: list[int], **changes: Any) -> MoE:
    sizes: dict[str, Any] = {"d_model": D, "d_ff": 8, "num_experts": len(d_ffs), "top_k": 2, "expert_d_ffs": d_ffs}
    return formulas.layer_of(sizes, **changes)


def expert_parameters(parameters: Mapping[str, Tensor], d_ffs: list[int], e: int) -> dict[str, Tensor]:
    """Those of expert ``e`` under the names of a bank of one expert: the e-th of the runs of equal widths."""
    bank, local = 0, 0
    for before, after in itertools.pairwise(d_ffs[: e + 1]):
        bank, local = (bank, local + 1) if before == after else (bank + 1, 0)
    prefix = f"experts.banks.{bank}."
    return {
        "experts." + name.removeprefix(prefix): value[local : local + 1]
        for name, value in parameters.items()
        if name.startswith(prefix)
    }


def mixture(x: Tensor, parameters: Mapping[str, Tensor], config: MoEConfig) -> tuple[Tensor, Tensor]:
    d_ffs = list(config.expert_d_ffs or [])

    def answer(token: Tensor, taken: list[int], weights: list[Tensor]) -> Tensor:
        y = 0 * token
        for e, weight in zip(taken, weights, strict=True):
            y = y + weight * reference.expert(token, expert_parameters(parameters, d_ffs, e), 0, config.activation)
        return y

    return formulas.routed(x, parameters, formulas.settings_of(config), answer)


@pytest.mark.parametrize("changes", [{}, {"bias": True, "activation": "relu"}, {"top_k": 1}], ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
def test_against_the_formulas(widths: str, changes: dict[str, Any]) -> None:
    formulas.check_against(mixture, layer_of(WIDTHS[widths], **changes))


class TestCompute:
    def test_each_bank_computes_its_own_rows_only(self) -> None:
        layer = layer_of([3, 3, 12, 12])
        layer(torch.randn(40, D, dtype=torch.float64))
        counts = layer.last_routing.counts()
        small, big = layer.experts.banks
        assert small.last_counts.tolist() == counts[:2].tolist()
        assert big.last_counts.tolist() == counts[2:].tolist()
        assert (small.d_ff, big.d_ff) == (3, 12)
        assert layer.last_choice is big.last_choice

    def test_equal_widths_are_one_plain_bank(self) -> None:
        assert isinstance(layer_of([6, 6, 6]).experts, ExpertBank)

    def test_all_backends(self) -> None:
        formulas.check_the_backends_agree(layer_of([3, 3, 12, 12]))

    def test_capacity_is_that_of_equal_experts(self) -> None:
        x = torch.randn(40, D, dtype=torch.float64)
        for factor in (0.5, -0.5):
            layer = layer_of([3, 3, 12, 12], capacity_factor=factor)
            layer(x)
            assert int(layer.last_routing.dropped) > 0
            assert layer.last_routing.counts().max() <= 10

    def test_no_tokens_and_no_rows(self) -> None:
        layer = layer_of([3, 3, 12, 12])
        assert list(layer(torch.zeros(0, D, dtype=torch.float64)).shape) == [0, D]
        y = layer(torch.randn(5, D, dtype=torch.float64), token_mask=torch.zeros(5, dtype=torch.bool))
        assert not y.any()

    def test_small_big_or_skip(self) -> None:
        """Duo-LLM's three ways through a layer, one of them at no cost."""
        layer = layer_of([2, 32], top_k=1, zero_computation_experts={"zero": 1}, router_options={"normalize": False})
        x = torch.randn(60, D, dtype=torch.float64)
        y, ids = layer(x), layer.last_routing.expert_ids[:, 0]
        assert set(ids.tolist()) == {0, 1, 2}
        assert not y[ids == 2].any()
        rows = [int(bank.last_counts.sum()) for bank in layer.experts.banks]
        assert rows == [int((ids == 0).sum()), int((ids == 1).sum())]


class TestKeeping:
    def test_saved_and_loaded(self) -> None:
        layer, x = layer_of([3, 12, 3]), torch.randn(5, D, dtype=torch.float64)
        other = layer_of([3, 12, 3])
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))

    def test_parameters_that_a_token_meets(self) -> None:
        layer = layer_of([2, 2, 16, 4])
        banks = [sum(p.numel() for p in bank.parameters()) for bank in layer.experts.banks]
        assert layer.idle_parameters() == banks[0]  # at most the two widest of four are met

    def test_quantized(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = MoE(MoEConfig(d_model=64, d_ff=8, num_experts=4, top_k=2, expert_d_ffs=[32, 32, 64, 64]))

        torch.manual_seed(0)
        model, x = Model(), torch.randn(16, 64)
        before = model.layer(x)
        moesaic.quantize(model, "int8")
        assert all(bank.format is not None for bank in model.layer.experts.banks)
        assert reference.relative_error(model.layer(x), before) < 0.05


def test_slots_of_a_part() -> None:
    ids, weights, scores = torch.tensor([[0, 3], [2, 4], [4, 4]]), torch.ones(3, 2), torch.rand(3, 4)
    part = Routing(ids, weights, scores, logits=scores).part(range(2, 4))
    assert part.expert_ids.tolist() == [[2, 1], [0, 2], [2, 2]]
    assert part.weights.tolist() == [[0, 1], [1, 0], [0, 0]]
    assert torch.equal(part.scores, scores[:, 2:]) and torch.equal(part.logits, scores[:, 2:])


def test_banks_of_runs() -> None:
    experts = UnequalExperts(4, [8, 8, 2, 8])
    banks = [(bank.d_ff, own) for bank, own in banks_of(experts, 4)]
    assert banks == [(8, range(2)), (2, range(2, 3)), (8, range(3, 4))]


@pytest.mark.parametrize("widths", [[4], [4, 4, 4], [4, 0], [4, 2.5], [4, True], "44", 4])
def test_widths_are_one_for_each_expert(widths: Any) -> None:
    with pytest.raises(ConfigError, match="expert_d_ffs"):
        MoEConfig(d_model=4, d_ff=4, num_experts=2, expert_d_ffs=widths)
