"""One step: accumulation, clipping, balancing, precision, learning, and what happens to a loss that is not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train import tiny
from torch.nn import functional as F

from moesaic.layer import moe_layers
from moesaic.train.checkpoint import Checkpoints, newest_good
from moesaic.train.loop import NonFiniteError, Trainer, repeatable
from moesaic.train.loss import token_losses
from moesaic.train.metrics import RoutingMeter
from moesaic.train.optimizer import learning_rate


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def keep_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What the next step's optimizer is given."""
    kept: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        kept.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(keep)
    return kept


def test_a_step_is_the_gradient_of_the_mean_loss(corpus: list[str]) -> None:
    trainer = tiny.trainer_of(tiny.recipe(corpus, "clip=0"))
    gradients = keep_gradients(trainer)
    ids = trainer.batches.batch(0)
    output = trainer.model(input_ids=ids[:, :-1])
    loss = F.cross_entropy(output.logits.double().flatten(0, 1), ids[:, 1:].flatten())
    expected = torch.autograd.grad(loss + output.aux_loss, list(trainer.model.parameters()))
    metrics = trainer.train_step()
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-6)
    assert metrics.aux_loss == pytest.approx(output.aux_loss.item(), rel=1e-6)
    assert metrics.aux_loss > 0
    for (name, _), gradient in zip(trainer.model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in expected))
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_big_batch(corpus: list[str], parts: int) -> None:
    # Without a balancing loss: that is a product of means, which does not split.
    whole = tiny.trainer_of(tiny.recipe(corpus, "model.balancing={}"))
    split = tiny.trainer_of(tiny.recipe(corpus, "model.balancing={}", f"accumulation={parts}"))
    whole_gradients, split_gradients = keep_gradients(whole), keep_gradients(split)
    for _ in range(3):
        one, many = whole.train_step(), split.train_step()
        assert many.loss == pytest.approx(one.loss, rel=1e-5)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert (many.tokens, many.imbalance, many.dropped) == (one.tokens, pytest.approx(one.imbalance), one.dropped)
        for name, gradient in whole_gradients.items():
            torch.testing.assert_close(split_gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_the_gradient_is_clipped_to_the_norm(corpus: list[str]) -> None:
    clipped = tiny.trainer_of(tiny.recipe(corpus, "clip=0.01"))
    gradients = keep_gradients(clipped)
    metrics = clipped.train_step()
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    assert metrics.grad_norm > 0.1  # as it was before
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_of_the_step_is_used(corpus: list[str]) -> None:
    trainer = tiny.trainer_of(tiny.recipe(corpus))
    for step in range(5):
        metrics = trainer.train_step()
        assert metrics.learning_rate == learning_rate(step, trainer.settings)
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {metrics.learning_rate}
    assert (metrics.step, metrics.tokens) == (5, 5 * 4 * 16)


def test_the_loss_falls_below_what_token_frequencies_alone_give(corpus: list[str]) -> None:
    recipe = tiny.recipe(corpus, "steps=150")
    trainer = tiny.trainer_of(recipe)
    losses = [trainer.train_step().loss for _ in range(150)]
    counts = torch.bincount(torch.cat([trainer.batches.batch(step).flatten() for step in range(150)])).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = -float((shares * shares.log()).sum())
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert sum(losses[-10:]) / 10 < 0.7 * entropy


def test_balancers_act_once_a_step(corpus: list[str]) -> None:
    words = ["router=sigmoid_topk", "model.balancing={bias_update=0.125}", "accumulation=2"]
    trainer = tiny.trainer_of(tiny.recipe(corpus, *words))
    trainer.train_step()
    for layer in moe_layers(trainer.model):
        assert layer.router.selection_bias.abs().max() == 0.125
        assert not layer.slot_counts.any()


def test_dropped_and_imbalance_are_those_of_the_step(corpus: list[str]) -> None:
    trainer = tiny.trainer_of(tiny.recipe(corpus, "capacity_factor=0.5", "accumulation=2"))
    metrics = trainer.train_step()
    # Every expert is full at half its even share, or nearly: half of the slots are lost.
    assert metrics.dropped == pytest.approx(0.5, abs=0.05)
    assert 1 <= metrics.imbalance <= metrics.worst_imbalance < 1.5
    assert tiny.trainer_of(tiny.recipe(corpus)).train_step().dropped == 0


def test_the_meter_counts_all_forwards_since_it_was_read(corpus: list[str]) -> None:
    model = tiny.trainer_of(tiny.recipe(corpus)).model.eval()
    meter = RoutingMeter(model)
    counts = torch.zeros(2, 4)
    for seed in range(2):
        model(input_ids=torch.arange(16)[None] + seed)
        meter.add()
        counts += torch.stack([layer.last_routing.counts() for layer in moe_layers(model)])
    ratios = (counts.amax(1) / counts.mean(1)).tolist()
    assert meter.figures(meter.take()) == pytest.approx((sum(ratios) / 2, max(ratios), 0.0))
    assert meter.figures(meter.take()) == (1.0, 1.0, 0.0)


def test_a_model_without_experts_trains_too(corpus: list[str]) -> None:
    metrics = tiny.trainer_of(tiny.recipe(corpus, "dense_layers=[0, 1]")).train_step()
    assert (metrics.aux_loss, metrics.imbalance, metrics.dropped) == (0.0, 1.0, 0.0)


def test_bf16_keeps_weights_and_gradients_in_float32_and_is_close(corpus: list[str]) -> None:
    exact, close = (tiny.trainer_of(tiny.recipe(corpus)) for _ in range(2))
    close.precision = "bf16"
    gradients = keep_gradients(close)
    loss = exact.train_step().loss
    assert close.train_step().loss == pytest.approx(loss, rel=1e-2)
    assert {value.dtype for value in gradients.values()} == {torch.float32}
    assert {parameter.dtype for parameter in close.model.parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_no_number(corpus: list[str]) -> None:
    plain = tiny.trainer_of(tiny.recipe(corpus))
    saving = tiny.trainer_of(tiny.recipe(corpus, "gradient_checkpointing=true"))
    for _ in range(3):
        one, other = plain.train_step(), saving.train_step()
        assert (one.loss, one.aux_loss, one.grad_norm) == (other.loss, other.aux_loss, other.grad_norm)


@pytest.mark.slow
def test_a_compiled_model_trains_alike(corpus: list[str]) -> None:
    plain = tiny.trainer_of(tiny.recipe(corpus))
    compiled = tiny.trainer_of(tiny.recipe(corpus, "compile=true"))
    for _ in range(3):
        one, other = plain.train_step(), compiled.train_step()
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.imbalance == pytest.approx(one.imbalance)


@pytest.mark.parametrize("poison", ["weight", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(corpus: list[str], poison: str) -> None:
    trainer = tiny.trainer_of(tiny.recipe(corpus))
    trainer.train_step()
    parameter = trainer.model.model.layers[1].mlp.router.weight
    if poison == "weight":
        parameter.data[0, 0] = math.inf
    else:
        parameter.register_hook(lambda gradient: gradient * math.nan)
    before = weights(trainer)
    with pytest.raises(NonFiniteError) as raised:
        trainer.train_step()
    message = str(raised.value)
    assert "step 2 is not finite" in message
    assert "nan" in message
    assert "on batch 1 (sequences: " in message
    counted = trainer.batches.domains(1)
    assert f"{counted.count('sums')} of sums" in message
    assert same(before, weights(trainer))
    assert trainer.step == 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "words", [[], ["router=sigmoid_topk", "model.balancing={bias_update=0.01}"], ["accumulation=2"]]
)
def test_a_restored_trainer_goes_on_exactly(
    corpus: list[str], tmp_path: Path, words: list[str], dropout: float
) -> None:
    def fresh() -> Trainer:
        trainer = tiny.trainer_of(tiny.recipe(corpus, *words))
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = dropout
        return trainer

    straight = fresh()
    expected = [straight.train_step() for _ in range(8)]
    if dropout:  # it does draw random numbers
        assert expected[0].loss != tiny.trainer_of(tiny.recipe(corpus, *words)).train_step().loss

    first = fresh()
    for _ in range(4):
        first.train_step()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(4, first.state(), {"progress": first.progress()})
    first.train_step()  # while it is being written
    checkpoints.wait()

    second = fresh()
    second.train_step()
    found, damaged = newest_good(tmp_path)
    assert found is not None
    assert damaged == []
    second.restore(found)
    assert (second.step, second.tokens) == (4, 4 * 4 * 16)
    for before in expected[4:]:
        now = second.train_step()
        assert (now.step, now.loss, now.aux_loss) == (before.step, before.loss, before.aux_loss)
        assert (now.grad_norm, now.learning_rate, now.tokens) == (before.grad_norm, before.learning_rate, before.tokens)
    assert same(weights(straight), weights(second))


def test_repeatable_sets_and_gives_back() -> None:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with repeatable(threads + 1):
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() == deterministic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_parts_is_the_loss(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50, 20_000, dtype=dtype, requires_grad=True)  # parts of 26 rows
    targets = torch.randint(0, 20_000, (3, 50))
    losses = token_losses(logits, targets)
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none").view(3, 50)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(losses.mean(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(expected.mean(), logits)
    torch.testing.assert_close(gradient, exact)
