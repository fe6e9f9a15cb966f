"""Schedules of a balancer's coefficient against the numbers written out, on resume, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moesaic import MoE, MoEConfig, update_balancing
from moesaic.errors import ConfigError
from moesaic.routing import check_balancing
from moesaic.routing.router import ROUTERS
from moesaic.routing.schedule import Schedule, schedule_of, with_steps

COSINE = {"coefficient": 0.4, "final": 0.1, "steps": 6, "schedule": "cosine", "warmup": 3}


def wanted(entry: dict[str, Any], done: int) -> float:
    """The coefficient of the step that follows ``done`` ones, in words of Python."""
    start, warmup = entry["coefficient"], entry.get("warmup", 0)
    if done < warmup:
        return start * (done + 1) / warmup  # type: ignore[no-any-return]
    if "final" not in entry:
        return start  # type: ignore[no-any-return]
    if done - warmup >= entry["steps"]:
        return entry["final"]  # type: ignore[no-any-return]
    part = (done - warmup) / entry["steps"]
    if entry.get("schedule") == "cosine":
        part = (1 - math.cos(math.pi * part)) / 2
    return start + (entry["final"] - start) * part  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "entry",
    [
        COSINE,
        {**COSINE, "schedule": "linear"},
        {"coefficient": 0.0, "final": 0.3, "steps": 5},
        {"coefficient": 0.2, "final": 0.0, "steps": 1},
        {"coefficient": 0.2, "warmup": 4},
        {"coefficient": 0.2, "schedule": "constant"},
        {"coefficient": 0.2, "final": 0.2, "steps": 3, "warmup": 1},
    ],
)
def test_the_coefficient_of_each_step(entry: dict[str, Any]) -> None:
    planned = schedule_of("z_loss", entry)
    for done in range(12):
        value = planned.at(torch.tensor(done))
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert value.item() == pytest.approx(wanted(entry, done), rel=1e-6, abs=1e-9)


def test_a_number_is_constant() -> None:
    assert schedule_of("z_loss", 0.25) == Schedule(0.25)
    assert not Schedule(0.25).varies
    assert not schedule_of("z_loss", {"coefficient": 1}).varies
    assert schedule_of("z_loss", {"coefficient": 0.25, "final": None, "steps": None}) == Schedule(0.25)


MISTAKES: list[tuple[Any, str]] = [
    ("much", "the coefficient of balancer 'z_loss' is 'much': it must be a number"),
    (True, "the coefficient of balancer 'z_loss' is True: it must be a number"),
    (-0.5, "the coefficient of balancer 'z_loss' is -0.5: it must be finite and at least 0"),
    ({}, "balancer 'z_loss' needs a coefficient"),
    ({"final": 0.1, "steps": 3}, "balancer 'z_loss' needs a coefficient beside 'final', 'steps'"),
    ({"coefficient": math.inf}, "the coefficient of balancer 'z_loss' is inf: it must be finite and at least 0"),
    ({"coefficient": 1, "final": -1, "steps": 3}, "final of balancer 'z_loss' is -1: it must be finite and at least 0"),
    (
        {"coefficient": 1, "final": 0, "steps": 0},
        "steps of balancer 'z_loss' is 0: it must be a whole number, at least",
    ),
    ({"coefficient": 1, "final": 0, "steps": 1.5}, "steps of balancer 'z_loss' is 1.5: it must be a whole number"),
    ({"coefficient": 1, "warmup": -1}, "warmup of balancer 'z_loss' is -1: it must be a whole number, at least 0"),
    ({"coefficient": 1, "final": 0}, "balancer 'z_loss' with the schedule 'linear' needs steps"),
    ({"coefficient": 1, "schedule": "cosine"}, "balancer 'z_loss' with the schedule 'cosine' needs final and steps"),
    ({"coefficient": 1, "schedule": "cosin"}, "schedule of balancer 'z_loss' is 'cosin': did you mean 'cosine'?"),
    ({"coefficient": 1, "schedule": 3}, "schedule of balancer 'z_loss' is 3: "),
    (
        {"coefficient": 1, "final": 0, "steps": 3, "schedule": "constant"},
        "balancer 'z_loss' has final and steps but the schedule 'constant': leave it out, or choose 'linear'",
    ),
    ({"coefficient": 1, "finale": 0}, "balancer 'z_loss' has no option 'finale': did you mean 'final'? allowed:"),
    ({"coefficient": 1, "per_rank": True}, "balancer 'z_loss' has no option 'per_rank'"),
]


@pytest.mark.parametrize(("entry", "message"), MISTAKES)
def test_a_mistake_is_explained(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_balancing({"z_loss": entry}, ROUTERS.get("softmax_topk"))
    assert message in str(raised.value)


def test_an_option_of_another_type() -> None:
    with pytest.raises(ConfigError, match="option 'per_rank' of balancer 'load_balancing' is 1: it must be true or"):
        check_balancing({"load_balancing": {"coefficient": 1, "per_rank": 1}}, ROUTERS.get("softmax_topk"))


def test_a_runs_steps_are_filled_in_where_they_are_needed() -> None:
    given = {
        "load_balancing": 0.1,
        "z_loss": {"coefficient": 0.1, "final": 0.0, "warmup": 10},
        "bias_update": {"coefficient": 0.1, "final": 0.0, "steps": 7},
        "global_load_balancing": {"coefficient": 0.1},
    }
    assert with_steps(given, 100) == {**given, "z_loss": {**given["z_loss"], "steps": 90}}  # type: ignore[dict-item]
    assert with_steps({"z_loss": {"coefficient": 1, "final": 0, "warmup": 9}}, 5)["z_loss"]["steps"] == 1


def layer_of(**balancing: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig(d_model=8, d_ff=8, num_experts=4, router="sigmoid_topk", balancing=balancing))


def test_the_layer_goes_by_it() -> None:
    layer, plain = layer_of(z_loss=COSINE), layer_of(z_loss=1.0)
    x = torch.randn(6, 8)
    for done in range(12):
        layer(x), plain(x)
        assert layer.aux_loss.item() == pytest.approx(wanted(COSINE, done) * plain.aux_loss.item(), rel=1e-6)
        assert layer.balancing[0].losses["z_loss"].item() == plain.aux_loss.item()  # type: ignore[index]
        update_balancing(layer)


def test_a_bias_update_goes_by_it() -> None:
    layer = layer_of(bias_update={"coefficient": 0.5, "final": 0.0, "steps": 2})
    x = torch.randn(1, 8)  # two experts get it, two get none
    moved = []
    for _ in range(4):
        before = layer.router.get_buffer("selection_bias").clone()
        layer(x)
        layer.after_step()
        moved.append(float((layer.router.get_buffer("selection_bias") - before).abs().max()))
    assert moved == pytest.approx([0.5, 0.25, 0.0, 0.0])


def test_the_step_is_kept_where_it_is_needed() -> None:
    assert not any("balancing" in name for name in layer_of(z_loss=0.1, load_balancing=0.1).state_dict())
    layer = layer_of(z_loss=COSINE)
    assert layer.state_dict()["balancing.0.step"].dtype == torch.int64
    for _ in range(3):
        update_balancing(layer)
    other = layer_of(z_loss=COSINE)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(6, 8)
    layer(x), other(x)
    assert layer.aux_loss == other.aux_loss
    assert layer.bfloat16().balancing[0].step.dtype == torch.int64  # type: ignore[index]
