"""Scores of experts against a loop over tokens, and the choice against all subsets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters import bases
from torch import nn
from transformers import PreTrainedModel

from moesaic import MoE, MoesaicConfig, MoesaicForCausalLM
from moesaic.adapters import choose_experts, score_experts
from moesaic.errors import ConfigError, DataError, UsageError
from moesaic.hf.quantized import expert_modules

IDS = [torch.randint(0, 290, (3, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def slots_of_tokens(model: PreTrainedModel) -> dict[str, list[tuple[list[int], list[float]]]]:
    """By experts module: expert ids and weights of every token, from the router's own outputs."""
    seen: dict[str, list[tuple[list[int], list[float]]]] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def of_ours(layer: MoE, args: Any, output: Any) -> None:
            routing = layer.last_routing
            assert routing is not None
            seen.setdefault(f"{name}.experts", []).extend(
                zip(routing.expert_ids.tolist(), routing.weights.tolist(), strict=True)
            )

        def of_theirs(module: nn.Module, args: Any) -> None:
            seen.setdefault(name, []).extend(zip(args[1].tolist(), args[2].tolist(), strict=True))

        if isinstance(module, MoE):
            return module.register_forward_hook(of_ours)
        return module.register_forward_pre_hook(of_theirs)

    modules = {name: module for name, module in model.named_modules() if isinstance(module, MoE)} or expert_modules(
        model
    )
    hooks = [watch(name, module) for name, module in modules.items()]
    with torch.no_grad():
        for ids in IDS:
            model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


def expected(model: PreTrainedModel, experts: int, score: str) -> dict[str, list[float]]:
    result = {}
    for name, tokens in slots_of_tokens(model).items():
        sums = [0.0] * (experts + 1)
        for ids, weights in tokens:
            for expert, weight in zip(ids, weights, strict=True):
                sums[min(expert, experts)] += (weight if score == "gate" else 1) / len(tokens)
        result[name] = [value / sum(sums[:experts]) for value in sums[:experts]]
    return result


@pytest.mark.parametrize("kind", bases.MOE)
@pytest.mark.parametrize("score", ["gate", "token"])
def test_scores_are_those_of_a_loop(kind: str, score: Any) -> None:
    model = bases.make(kind).train()
    found = score_experts(model, IDS, score)
    assert model.training
    wanted = expected(model.eval(), 8 if kind == "olmoe" else 4, score)
    assert list(found) == list(wanted) == [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    for name, scores in found.items():
        assert scores == pytest.approx(wanted[name], abs=1e-6)
        assert sum(scores) == pytest.approx(1)


@pytest.mark.parametrize("factor", [0.5, -0.5])
def test_slots_that_lost_their_expert_count_for_nobody(factor: float) -> None:
    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    model = MoesaicForCausalLM(MoesaicConfig(**bases.SIZES, head_dim=8, capacity_factor=factor, **experts)).eval()
    for score in ("gate", "token"):
        wanted = expected(model, 4, score)
        found = score_experts(model, IDS, score)  # type: ignore[arg-type]
        assert all(found[name] == pytest.approx(wanted[name], abs=1e-6) for name in wanted)


def test_nothing_of_the_model_changes() -> None:
    model = bases.make("ours").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score_experts(model, IDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(layer.slot_counts.sum() == 0 for layer in model.modules() if isinstance(layer, MoE))


def test_what_cannot_be_scored_is_told() -> None:
    with pytest.raises(UsageError, match="has no experts to score: it is a dense model"):
        score_experts(bases.make("dense"), IDS)
    with pytest.raises(DataError, match="no token of the data came to the experts of"):
        score_experts(bases.make("ours"), [])
    with pytest.raises(ConfigError, match="score is 'gates': it must be one of gate, token"):
        score_experts(bases.make("ours"), IDS, "gates")  # type: ignore[arg-type]
    model = bases.make("olmoe")
    with pytest.raises(ConfigError, match="precision is 'fp8'"):
        score_experts(model, IDS, precision="fp8")
    assert not any(module._forward_pre_hooks for module in model.modules())


raw_scores = st.lists(st.integers(0, 20), min_size=1, max_size=7).filter(any)


@given(raw=raw_scores, threshold=st.floats(0.01, 1))
def test_the_choice_is_the_smallest_set_that_reaches_the_threshold(raw: list[int], threshold: float) -> None:
    scores = [value / sum(raw) for value in raw]
    chosen = choose_experts(scores, threshold)
    assert chosen == sorted(set(chosen))
    assert all(scores[expert] > 0 for expert in chosen)
    least = min(scores[expert] for expert in chosen)
    assert all(scores[other] <= least for other in range(len(scores)) if other not in chosen)
    # Whole numbers, whose sums are exact, decide which sets reach it.
    wanted = threshold * sum(raw)
    assert sum(raw[expert] for expert in chosen) >= wanted - 1e-9
    for size in range(1, len(chosen)):
        assert all(
            sum(raw[e] for e in subset) < wanted + 1e-9 for subset in itertools.combinations(range(len(raw)), size)
        )


def test_ties_go_to_the_lower_id_and_a_threshold_of_one_takes_all_that_are_used() -> None:
    assert choose_experts([0.25, 0.25, 0.25, 0.25], 0.5) == [0, 1]
    assert choose_experts([0.1] * 10, 1) == list(range(10))
    assert choose_experts([0.0, 0.7, 0.0, 0.3], 1) == [1, 3]
    assert choose_experts([0.0, 0.7, 0.0, 0.3], 0.7) == [1]


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_told(threshold: float) -> None:
    with pytest.raises(ConfigError, match="it must be above 0 and at most 1"):
        choose_experts([1.0], threshold)
