"""Balancing in a run: schedules that are kept, and the loss over the whole batch on several ranks with accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.parallel import harness
from tests.train import tiny
from tests.train.test_ranks import assert_alike, ranks

from moesaic import MoesaicForCausalLM
from moesaic.layer import moe_layers
from moesaic.routing import LayerBalancing
from moesaic.train.checkpoint import Checkpoints, newest_good
from moesaic.train.loop import Trainer
from moesaic.train.metrics import read_metrics
from moesaic.train.run import train

GLOBAL = "model.balancing={global_load_balancing=0.1, z_loss=0.01}"


@pytest.fixture(scope="module", autouse=True)
def pools() -> Iterator[None]:
    with harness.pools_stopped_at_end():
        yield


def test_a_model_keeps_it(corpus: list[str], tmp_path: Path) -> None:
    words = ["model.balancing.load_balancing.final=0.0", "model.balancing.z_loss={coefficient=0.1, warmup=5}"]
    trainer = tiny.trainer_of(tiny.recipe(corpus, *words))
    for _ in range(3):
        trainer.train_step()
    trainer.model.save_pretrained(tmp_path)
    model = MoesaicForCausalLM.from_pretrained(tmp_path).train()
    parts = [module for module in model.modules() if isinstance(module, LayerBalancing)]
    assert [int(part.step) for part in parts] == [3, 3]
    assert not any(part.slot_counts.any() for part in parts)
    ids = torch.arange(16)[None]
    assert model(ids).aux_loss == trainer.model(ids).aux_loss


def test_weights_without_a_step_begin_with_the_first(corpus: list[str], tmp_path: Path) -> None:
    tiny.trainer_of(tiny.recipe(corpus)).model.save_pretrained(tmp_path)
    changed = {"load_balancing": {"coefficient": 0.5, "final": 0.0, "steps": 10}}
    model = MoesaicForCausalLM.from_pretrained(tmp_path, balancing=changed)
    assert [int(part.step) for part in model.modules() if isinstance(part, LayerBalancing)] == [0, 0]


@pytest.mark.parametrize("words", [["accumulation=2"], []])
def test_a_restored_run_goes_on_exactly(corpus: list[str], tmp_path: Path, words: list[str]) -> None:
    balancing = [
        "router=sigmoid_topk",
        "model.balancing={bias_update={coefficient=0.01, final=0.001}, z_loss={coefficient=0.01, warmup=6}}",
        "model.balancing.global_load_balancing={coefficient=0.1, final=0.0, schedule='cosine', steps=6}",
    ]

    def fresh() -> Trainer:
        return tiny.trainer_of(tiny.recipe(corpus, *balancing, *words))

    straight, first, second = fresh(), fresh(), fresh()
    expected = [straight.train_step() for _ in range(8)]
    for _ in range(4):
        first.train_step()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(4, first.state(), {"progress": first.progress()})
    checkpoints.wait()
    found, _ = newest_good(tmp_path)
    assert found is not None
    second.restore(found)
    for before in expected[4:]:
        now = second.train_step()
        assert (now.loss, now.aux_loss, now.balancing) == (before.loss, before.aux_loss, before.balancing)
    assert expected[0].balancing.keys() == {"z_loss", "global_load_balancing"}


def gradients_of_a_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        kept.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train_step()
    return kept


@pytest.mark.parametrize("words", [[], ["gradient_checkpointing=true"]])
def test_exact_balancing_equals_the_batch_in_one_piece(corpus: list[str], words: list[str]) -> None:
    recipe = tiny.recipe(corpus, GLOBAL, *words)
    whole = gradients_of_a_step(tiny.trainer_of(recipe))
    exact = gradients_of_a_step(tiny.trainer_of(tiny.recipe(corpus, GLOBAL, "accumulation=4", "exact_balancing=true")))
    loose = gradients_of_a_step(tiny.trainer_of(tiny.recipe(corpus, GLOBAL, "accumulation=4", *words)))
    for name, gradient in whole.items():
        torch.testing.assert_close(exact[name], gradient, rtol=1e-4, atol=1e-6)
    assert any((loose[name] - gradient).abs().max() > 1e-5 for name, gradient in whole.items() if "router" in name)


def test_dropout_chooses_the_same_experts_again(corpus: list[str]) -> None:
    trainer = tiny.trainer_of(tiny.recipe(corpus, GLOBAL, "accumulation=2", "exact_balancing=true"))
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.4
    counted, routed = [], []
    last = moe_layers(trainer.model)[-1]

    def note(*_: object) -> None:
        assert last.last_routing is not None
        if torch.is_grad_enabled():
            routed.append(last.last_routing.counts())
            counted.append(last.balancers[0].slot_counts.clone())

    last.register_forward_hook(note)
    trainer.train_step()
    assert torch.equal(routed[0] + routed[1], counted[0])
    assert torch.equal(counted[0], counted[1])
    assert not last.balancers[0].slot_counts.any()


@pytest.mark.parametrize("words", [[], ["router=sigmoid_topk", "model.balancing.bias_update=0.01"]])
def test_four_ranks_with_accumulation_balance_as_one_process(
    corpus: list[str], out: Path, tmp_path: Path, words: list[str]
) -> None:
    # A part has 5 sequences: one rank of the four takes two.
    common = [GLOBAL, "batch_size=10", "steps=4", "warmup_steps=1", *words]
    train(tiny.recipe(corpus, *common), tmp_path / "one")
    ranks(4, tiny.recipe(corpus, *common, "accumulation=2", "exact_balancing=true"), out)
    assert_alike(out, tmp_path / "one")
    mine, theirs = (
        [line["balancing"] for line in read_metrics(path / "metrics.jsonl") if line["kind"] == "step"]
        for path in (out, tmp_path / "one")
    )
    assert mine[0].keys() == {"global_load_balancing", "z_loss"}
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
