"""The training loop: its gradient against a plain one, learning, and going on exactly where it stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.convert.models import SIZES, dense_model
from torch.nn import functional as F

from moesaic.convert import lessons as module
from moesaic.convert.lessons import Lessons
from moesaic.convert.mixture import ExcessLossMixture
from moesaic.convert.targets import TARGETS
from moesaic.errors import CheckpointError, TrainingError
from moesaic.hf import MoesaicConfig, MoesaicForCausalLM

TOKENS = {
    name: (np.arange(4000, dtype=np.uint16) * step % 97 + shift).astype(np.uint16)
    for name, step, shift in (("code", 3, 0), ("prose", 5, 100))
}


def pair(**changes: Any) -> tuple[Any, Any]:
    teacher = dense_model(seed=3)
    kept = {name: SIZES[name] for name in SIZES if name != "intermediate_size"}
    settings: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "qk_norm": False,
        "router": "unit_topk",
    }
    torch.manual_seed(0)
    student = MoesaicForCausalLM(MoesaicConfig(**kept, **{**settings, **changes}))
    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    return student, teacher


def lessons(student: Any, teacher: Any, loss: str = "kl", **changes: Any) -> Lessons:
    settings: dict[str, Any] = {
        "sequence_length": 32,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "seed": 1,
        "budget_tokens": 4 * 32 * 40,
    }
    mixture = ExcessLossMixture(dict.fromkeys(TOKENS, 1.0))
    return Lessons(student, teacher, TARGETS.get(loss)(), mixture, TOKENS, **{**settings, **changes})


@pytest.mark.parametrize("labels", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("loss", TARGETS.names())
def test_gradients_are_those_of_the_whole_loss(monkeypatch: pytest.MonkeyPatch, loss: str, labels: float) -> None:
    """In chunks of 50 tokens, whose last is shorter, against one backward of everything."""
    monkeypatch.setattr(module, "_ROWS", 50)
    student, teacher = pair(balancing={"load_balancing": 0.1})
    whole = copy.deepcopy(student)
    found = lessons(student, teacher, loss, labels=labels)
    ids = found.passages(["code", "prose", "code", "prose"])
    mean, own, excess = found._backward(ids)
    logits, theirs = whole(ids[:, :-1]), teacher(ids[:, :-1]).logits.detach().flatten(0, 1)
    ours = logits.logits.flatten(0, 1)
    target = TARGETS.get(loss)().losses(ours, theirs).mean()
    entropy = F.cross_entropy(ours, ids[:, 1:].flatten(), reduction="none")
    assert own == pytest.approx(target.item() if labels < 1 else 0.0, rel=1e-5)
    expected = (1 - labels) * target + labels * entropy.mean()
    assert mean == pytest.approx(expected.item(), rel=1e-5)
    (expected + logits.aux_loss).backward()
    for name, parameter in whole.named_parameters():
        own = dict(student.named_parameters())[name]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert own.grad is None
        elif parameter.grad is not None:
            torch.testing.assert_close(own.grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    gap = entropy - F.cross_entropy(theirs, ids[:, 1:].flatten(), reduction="none")
    assert excess == pytest.approx(gap.view(4, -1).mean(1).tolist(), rel=1e-4, abs=1e-5)


def test_learns_and_spends_its_budget() -> None:
    student, teacher = pair()
    kept = student.model.embed_tokens.weight.clone()
    found = lessons(student, teacher)
    told = []
    while found.progress < 1:
        told.append(found.take())
    assert [each.step for each in told] == list(range(1, 41))
    assert told[-1].tokens == 4 * 32 * 40
    assert sum(each.loss for each in told[-5:]) < 0.9 * sum(each.loss for each in told[:5])
    assert torch.equal(student.model.embed_tokens.weight, kept)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    found = lessons(*pair(), budget_tokens=4 * 32 * 20)
    rates = []
    for _ in range(20):
        found.take()
        rates.append(found.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(3e-3 / 10)
    for step, rate in enumerate(rates):
        assert rate == pytest.approx(3e-3 * min(1, (step + 1) / 10) * (1 - step / 20))


def test_only_the_feed_forwards() -> None:
    names = lessons(*pair(), train="ffn").trained
    assert not any("self_attn" in name or "embed" in name or "lm_head" in name for name in names)
    for part in ("mlp.router.weight", "mlp.experts.up", "mlp.experts.down", "input_layernorm", "model.norm"):
        assert any(part in name for name in names)


def test_goes_on_exactly(tmp_path: Path) -> None:
    student, teacher = pair(balancing={"bias_update": 0.01}, router="sigmoid_topk")
    straight = lessons(student, teacher, "taid")
    for _ in range(3):
        straight.take()
    straight.save(tmp_path / "state.safetensors")
    expected = [straight.take().loss for _ in range(3)]
    again, _ = pair(balancing={"bias_update": 0.01}, router="sigmoid_topk")
    resumed = lessons(again, teacher, "taid")
    resumed.load(tmp_path / "state.safetensors")
    assert (resumed.step, resumed.tokens) == (3, 3 * 4 * 32)
    assert [resumed.take().loss for _ in range(3)] == expected
    for name, value in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_router_that_draws_goes_on_exactly(tmp_path: Path) -> None:
    """Whatever else drew numbers before."""
    student, teacher = pair(router="noisy_topk")
    straight = lessons(student, teacher)
    straight.take()
    straight.save(tmp_path / "state.safetensors")
    torch.rand(5)
    state = torch.get_rng_state()
    expected = [straight.take().loss for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    resumed = lessons(pair(router="noisy_topk")[0], teacher)
    resumed.load(tmp_path / "state.safetensors")
    assert [resumed.take().loss for _ in range(2)] == expected
    ids = resumed.passages(["code", "prose", "code", "prose"])
    resumed.student.train()
    assert resumed._backward(ids)[0] != resumed._backward(ids)[0]  # it does draw


def test_the_target_is_told_its_own_loss() -> None:
    student, teacher = pair()
    found = lessons(student, teacher, "taid", labels=0.9)
    ids = lessons(copy.deepcopy(student), teacher, "taid").passages(["code", "prose", "code", "prose"])
    ours, theirs = (model(ids[:, :-1]).logits.detach().flatten(0, 1) for model in (student, teacher))
    expected = TARGETS.get("taid")().losses(ours, theirs).mean()
    mixed = found.take().loss
    assert found.target.state()["before"] == pytest.approx(expected.item(), rel=1e-4)
    assert abs(mixed - expected) > 0.1


def test_what_is_finished_stays_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = {"now": 100.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: clock["now"])
    student, teacher = pair()
    found = lessons(student, teacher, budget_tokens=None, budget_seconds=50.0)
    clock["now"] += 20
    found.finish()
    found.save(tmp_path / "state.safetensors")
    again = lessons(copy.deepcopy(student), teacher, budget_tokens=None, budget_seconds=50.0)
    again.load(tmp_path / "state.safetensors")
    clock["now"] += 5
    assert again.finished and again.progress == 1 and again.seconds == found.seconds == 20


def test_time_is_a_budget_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 100.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: clock["now"])
    found = lessons(*pair(), budget_tokens=None, budget_seconds=50.0)
    clock["now"] += 20
    assert found.progress == pytest.approx(0.4)
    assert found.take().seconds == 20
    clock["now"] += 100
    assert found.progress == 1.0


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    student, teacher = pair()
    found = lessons(student, teacher)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        teacher.lm_head.weight.mul_(float("nan"))
    found = lessons(student, teacher)
    with pytest.raises(TrainingError, match="the loss of step 1 is nan: try a lower learning rate"):
        found.take()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    student, teacher = pair()
    found = lessons(student, teacher)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    next(iter(found.trained.values())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=r"the gradient's norm of step 1 is (nan|inf): try a lower learning rate"):
        found.take()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    found = lessons(*pair())
    found.save(path)
    whole = load_file(path)
    name = next(name for name in whole if name.startswith("model."))
    save_file({other: value for other, value in whole.items() if other != name}, path)
    with pytest.raises(CheckpointError, match="cannot be gone on from"):
        lessons(*pair()).load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be gone on from"):
        lessons(*pair()).load(path)
