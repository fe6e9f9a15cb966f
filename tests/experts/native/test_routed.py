"""Routes and experts in one native call, against the routers themselves and the experts in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.experts.native.problems import ISAS, TOLERANCE, Problem, error, needs_library
from torch import Tensor

from moesaic.experts.native import library
from moesaic.experts.native.routed import Routed, RoutedLayer
from moesaic.routing import create_router
from moesaic.routing.gate import Gate

pytestmark = [needs_library, pytest.mark.usefixtures("isa")]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.use_isa(request.param):
        yield


def scored(gate: Gate, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and scores in float64."""
    logits_TE = x_TD.double() @ gate.weight.double().t()
    if gate.bias is not None:
        logits_TE = logits_TE + gate.bias.double()
    return logits_TE, logits_TE.softmax(-1) if gate.scores == "softmax" else logits_TE.sigmoid()


def weighed(gate: Gate, scores_E: Tensor, ids_K: Tensor) -> Tensor:
    """The weights of one token's experts, one after the other."""
    weights = []
    for expert in ids_K.tolist():
        score = scores_E[expert]
        weights.append(score if gate.unit_scale is None else 1 + gate.unit_scale[expert].double() * (2 * score - 1))
    total = sum(weights) + gate.epsilon
    return torch.stack([gate.scale * (weight / total if gate.normalize else weight) for weight in weights])


def check(problem: Problem, gate: Gate, mask_T: Tensor | None = None) -> Routed:
    x_TD, top_k, num_experts = problem.x, problem.top_k, problem.num_experts
    found = RoutedLayer(problem.expert_weights(), problem.dtype).run(x_TD, gate, top_k, mask_T)
    logits_TE, scores_TE = scored(gate, x_TD)
    torch.testing.assert_close(found.logits.double(), logits_TE, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scores.double(), scores_TE, rtol=2e-5, atol=1e-6)
    chosen_by = found.logits if gate.selection is None else found.scores + gate.selection
    for token in range(len(x_TD)):
        ids, weights = found.expert_ids[token], found.weights[token]
        if mask_T is not None and not mask_T[token]:
            assert (ids == num_experts).all() and not weights.any()
            continue
        # The largest first, of equals the lower number.
        wanted = sorted(range(num_experts), key=lambda e: (-float(chosen_by[token, e]), e))[:top_k]
        assert ids.tolist() == wanted
        torch.testing.assert_close(weights.double(), weighed(gate, scores_TE[token], ids), rtol=2e-5, atol=1e-6)
    assert found.counts.tolist() == [int((found.expert_ids == expert).sum()) for expert in range(num_experts)]
    problem.ids, problem.weights = found.expert_ids, found.weights
    assert error(found.y_TD, problem.wanted()) < TOLERANCE[problem.dtype]
    return found


def gate_of(router: str, problem: Problem, **options: float | bool) -> Gate:
    torch.manual_seed(problem.seed)
    made = create_router(router, problem.d_model, problem.num_experts, problem.top_k, **options).to(problem.dtype)
    made.reset_parameters(0.5)
    with torch.no_grad():
        for name in ("bias", "scale", "selection_bias"):
            if isinstance(values := getattr(made, name, None), Tensor):
                values.normal_()
    gate = made.linear_gate()
    assert gate is not None
    return Gate(*(each.detach() if isinstance(each, Tensor) else each for each in gate))


ROUTERS = [
    ("softmax_topk", {}),
    ("softmax_topk", {"normalize": False}),
    ("sigmoid_topk", {}),
    ("sigmoid_topk", {"normalize": False, "scale": 2.5}),
    ("unit_topk", {}),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("router", "options"), ROUTERS, ids=str)
def test_routers(router: str, options: dict[str, float | bool], dtype: torch.dtype) -> None:
    for number, (tokens, d_model, num_experts, top_k) in enumerate(
        [(1, 20, 5, 2), (1, 64, 16, 8), (3, 33, 17, 3), (16, 7, 40, 40), (2, 1, 1, 1), (4, 100, 3, 1)]
    ):
        problem = Problem(
            tokens=tokens, d_model=d_model, num_experts=num_experts, top_k=top_k, dtype=dtype, seed=number
        )
        check(problem, gate_of(router, problem, **options))


@pytest.mark.parametrize(
    "form", [{"bias": True}, {"transposed": True}, {"swapped": True}, {"activation": "relu"}], ids=str
)
def test_forms_of_experts(form: dict[str, bool | str]) -> None:
    problem = Problem(tokens=3, **form)  # type: ignore[arg-type]
    check(problem, gate_of("softmax_topk", problem))


@pytest.mark.parametrize("quantized", ["int8", "int4"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_quantized_experts(dtype: torch.dtype, quantized: str) -> None:
    problem = Problem(tokens=2, d_model=128, d_ff=64, dtype=dtype)
    problem.quantize(quantized)
    check(problem, gate_of("sigmoid_topk", problem))


def test_masked_tokens_get_no_expert() -> None:
    problem = Problem(tokens=4)
    found = check(problem, gate_of("softmax_topk", problem), torch.tensor([True, False, True, False]))
    assert not found.y_TD[1].any() and not found.y_TD[3].any() and found.y_TD[0].any()
    found = check(problem, gate_of("softmax_topk", problem), torch.zeros(4, dtype=torch.bool))
    assert not found.y_TD.any() and not found.counts.any()


def test_equal_logits_take_the_lower_number() -> None:
    problem = Problem(tokens=2, num_experts=6, top_k=3)
    gate = Gate("softmax", torch.zeros(6, problem.d_model), normalize=True)
    found = check(problem, gate)
    assert found.expert_ids.tolist() == [[0, 1, 2]] * 2 and (found.weights == 1 / 3).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_whatever_the_values_experts_are_valid(scores: str, value: float) -> None:
    problem = Problem(tokens=2, num_experts=7, top_k=4)
    problem.x[0, 3] = value
    gate = Gate(scores, torch.randn(7, problem.d_model), normalize=True)
    found = RoutedLayer(problem.expert_weights(), problem.dtype).run(problem.x, gate, 4)
    assert all(len(set(ids)) == 4 and set(ids) <= set(range(7)) for ids in found.expert_ids.tolist())
    assert found.y_TD[1].isfinite().all()


def test_a_nan_goes_first_as_in_pytorch() -> None:
    problem = Problem(tokens=1, num_experts=5, top_k=2)
    weight = torch.randn(5, problem.d_model)
    weight[3] = float("nan")
    found = RoutedLayer(problem.expert_weights(), problem.dtype).run(problem.x, Gate("sigmoid", weight), 2)
    assert found.expert_ids[0, 0] == 3 == found.logits.topk(2).indices[0, 0]


def test_large_logits() -> None:
    problem = Problem(tokens=2, num_experts=9, top_k=3)
    check(problem, Gate("softmax", 30 * torch.randn(9, problem.d_model), normalize=True))
    check(problem, Gate("sigmoid", 30 * torch.randn(9, problem.d_model), selection=torch.randn(9)))


def test_features_with_a_stride() -> None:
    problem = Problem(tokens=3)
    gate = gate_of("softmax_topk", problem)
    layer = RoutedLayer(problem.expert_weights(), problem.dtype)
    wide = torch.cat([problem.x, torch.full_like(problem.x, float("nan"))], dim=1)
    assert torch.equal(layer.run(wide[:, : problem.d_model], gate, 2).y_TD, layer.run(problem.x, gate, 2).y_TD)
