"""Fine-tuning runs: what they train, what stays, what they leave, and that they go on as if nothing had happened."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import bases
from tests.train import tiny
from torch.distributed.checkpoint import FileSystemReader
from transformers import PreTrainedModel

import moesaic
from moesaic import adapters
from moesaic.adapters.finetune import FinetuneResult, choose, finetune
from moesaic.data import Batches, prepare
from moesaic.errors import CheckpointError, ConfigError, Interrupted, UnsupportedError, UsageError
from moesaic.hf.load import load_model
from moesaic.train.evaluate import DomainResult, evaluate
from moesaic.train.evaluation import evaluate_folder
from moesaic.train.optimizer import learning_rate

Folders = dict[str, Path]


def tuned_rows(run: Path) -> dict[str, torch.Tensor]:
    adapter = adapters.read_adapter(run)
    return {f"{name}.{key}": rows for name in adapter.layers for key, rows in adapter.tensors(name).items()}


@pytest.mark.parametrize("kind", bases.MOE)
def test_it_trains_the_chosen_experts_and_nothing_else(
    kind: str, base_folders: Folders, corpus: list[str], out: Path
) -> None:
    result = finetune(bases.recipe(base_folders[kind], corpus), out)
    assert result.adapter == out / "adapter"
    adapter = adapters.read_adapter(out)
    base, _ = load_model(base_folders[kind])
    before = {name: value.clone() for name, value in base.state_dict().items()}
    adapters.merge(base, out)
    changed = 0
    for name, value in base.state_dict().items():
        layer = adapter.layers.get(name.rpartition(".")[0])
        tuned = set(layer.experts) if layer else set()
        assert len(tuned) < (layer.num_experts if layer else 1)
        if not tuned:
            assert torch.equal(value, before[name]), name
            continue
        for expert in range(len(value)):
            assert torch.equal(value[expert], before[name][expert]) == (expert not in tuned), (name, expert)
        changed += value[sorted(tuned)].numel()
    assert changed == result.trained_parameters
    for domain in ("sums", "words"):
        assert result.after[domain].loss < result.before[domain].loss


@pytest.mark.parametrize("kind", bases.MOE)
def test_what_was_measured_is_what_the_adapter_gives_bit_for_bit(
    kind: str, base_folders: Folders, corpus: list[str], out: Path
) -> None:
    result = finetune(bases.recipe(base_folders[kind], corpus), out)
    model, _ = load_model(base_folders[kind])
    base = measured(model, base_folders[kind], corpus)
    # While experts are tuned, their part of a sum is added apart.
    assert base == pytest.approx(losses_of(result.before), rel=1e-6)
    with adapters.load(model, out):
        assert measured(model, base_folders[kind], corpus) == losses_of(result.after)
    assert measured(model, base_folders[kind], corpus) == base


def measured(model: PreTrainedModel, folder: Path, corpus: list[str]) -> dict[str, float]:
    data = prepare(corpus, tokenizer=str(folder), validation_fraction=0.2)
    return losses_of(evaluate(model, data.validation, sequence_length=16, batch_size=4, max_tokens=128))


def losses_of(results: Mapping[str, DomainResult]) -> dict[str, float]:
    return {name: result.loss for name, result in results.items()}


def test_a_run_of_all_experts_is_the_run_whose_other_parameters_are_frozen(
    base_folders: Folders, corpus: list[str], out: Path
) -> None:
    """With threshold 1 ESFT is ordinary training of the experts: the losses are those of a plain loop."""
    recipe = bases.recipe(base_folders["ours"], corpus, "adapter.threshold=1", "train.clip=0", "train.steps=4")
    finetune(recipe, out)
    model, _ = load_model(base_folders["ours"])
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    model.requires_grad_(False)
    for parameter in experts:
        parameter.requires_grad_(True)
    expected = plain_losses(model, experts, recipe, corpus, str(base_folders["ours"]))
    logged = [loss for loss, _, _ in tiny.losses(out).values()]
    assert logged == pytest.approx(expected, rel=1e-5)


def plain_losses(model: Any, experts: list[Any], recipe: Any, corpus: list[str], folder: str) -> list[float]:
    data = prepare(corpus, tokenizer=folder, validation_fraction=0.2)
    batches = Batches(data.train, sequence_length=16, batch_size=4, seed=0)
    matrices = [p for p in experts if p.ndim == 3]
    biases = [p for p in experts if p.ndim == 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": biases}], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0
    )
    losses = []
    for step in range(recipe.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.train)
        ids = batches.batch(step)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["ours", "olmoe"])
@pytest.mark.parametrize("method", ["esft", "full"])
def test_an_interrupted_run_goes_on_with_the_same_numbers(
    kind: str, method: str, base_folders: Folders, corpus: list[str], tmp_path: Path
) -> None:
    recipe = bases.recipe(base_folders[kind], corpus, f"adapter.method={method}")
    whole = finetune(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted, match=r"after step 5 of 8.*moesaic finetune --resume --out"):
        finetune(recipe, tmp_path / "parts", display=tiny.AtStep(5, tiny.send(signal.SIGINT)))
    assert not (tmp_path / "parts" / "adapter").exists()
    resumed, folder = choose([], tmp_path / "parts", resume=True)
    again = finetune(resumed, folder, resume=True)
    assert tiny.losses(tmp_path / "parts") == tiny.losses(tmp_path / "whole")
    assert again.after == whole.after
    if method == "esft":
        one, other = tuned_rows(tmp_path / "whole"), tuned_rows(tmp_path / "parts")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_does_not_choose_its_experts_anew(base_folders: Folders, corpus: list[str], out: Path) -> None:
    recipe = bases.recipe(base_folders["ours"], corpus)
    with pytest.raises(Interrupted):
        finetune(recipe, out, display=tiny.AtStep(2, tiny.send(signal.SIGTERM)))
    display = tiny.AtStep()
    finetune(recipe, out, resume=True, display=display)
    assert not any("scoring" in line for line in display.said)


def test_another_base_cannot_take_over_a_run(
    base_folders: Folders, corpus: list[str], out: Path, tmp_path: Path
) -> None:
    recipe = bases.recipe(base_folders["ours"], corpus)
    with pytest.raises(Interrupted):
        finetune(recipe, out, display=tiny.AtStep(2, tiny.send(signal.SIGTERM)))
    other = bases.save("ours", tmp_path / "other", corpus)
    bases.make("ours", seed=1).save_pretrained(other)
    with pytest.raises(CheckpointError, match="is not the model that it began with"):
        finetune(recipe.model_copy(update={"base": str(other)}), out, resume=True)


def test_checkpoints_hold_only_what_is_trained(base_folders: Folders, corpus: list[str], out: Path) -> None:
    finetune(bases.recipe(base_folders["olmoe"], corpus), out)
    (newest, *_) = sorted((out / "checkpoints").iterdir(), reverse=True)
    names = [name for name in FileSystemReader(newest).read_metadata().state_dict_metadata if name.startswith("model.")]
    assert names
    assert all(".experts.tuned." in name for name in names)


@pytest.mark.parametrize("method", ["esft", "full"])
def test_a_bfloat16_base_gives_a_bfloat16_result(method: str, corpus: list[str], tmp_path: Path, out: Path) -> None:
    base = bases.save("olmoe", tmp_path / "base", corpus, torch.bfloat16)
    recipe = bases.recipe(base, corpus, f"adapter.method={method}", "train.precision=bf16")
    result = finetune(recipe, out)
    if method == "esft":
        assert {rows.dtype for rows in tuned_rows(out).values()} == {torch.bfloat16}
        model, _ = load_model(base)
        adapters.merge(model, out)
    else:
        model, _ = load_model(out)
    assert model.dtype == torch.bfloat16
    assert result.after["words"].loss < result.before["words"].loss


def test_full_fine_tuning_leaves_a_model(base_folders: Folders, corpus: list[str], out: Path) -> None:
    result = finetune(bases.recipe(base_folders["mixtral"], corpus, "adapter.method=full"), out)
    assert (result.adapter, result.trained_parameters) == (out / "model", result.parameters)
    measured = evaluate_folder(out, max_tokens=128)
    assert measured.sequence_length == 16
    assert {name: round(r.loss, 5) for name, r in measured.domains.items()} == {
        name: round(r.loss, 5) for name, r in result.after.items()
    }
    with pytest.raises(CheckpointError, match="has no adapter"):
        adapters.read_adapter(out)


def test_the_run_says_what_it_did(base_folders: Folders, corpus: list[str], out: Path) -> None:
    result = finetune(bases.recipe(base_folders["ours"], corpus), out)
    note = json.loads((out / "run.json").read_text())
    adapter = adapters.read_adapter(out)
    assert (note["command"], note["status"]) == ("finetune", "finished")
    assert note["model"]["trained_parameters"] == result.trained_parameters
    assert note["base"]["fingerprint"] == adapter.fingerprint
    assert {name: told["experts"] for name, told in note["adapter"]["layers"].items()} == {
        name: layer.experts for name, layer in adapter.layers.items()
    }
    assert adapter.training["recipe"]["adapter"] == {
        "method": "esft",
        "score": "gate",
        "threshold": 0.5,
        "sample_tokens": 256,
    }
    assert adapter.training["after"]["words"]["loss"] == result.after["words"].loss
    assert adapter.base.model_type == "moesaic"
    assert result.bytes >= adapter.bytes == 4 * result.trained_parameters


def test_a_frozen_router_is_not_balanced(base_folders: Folders, corpus: list[str], tmp_path: Path) -> None:
    finetune(bases.recipe(base_folders["ours"], corpus), tmp_path / "esft")
    finetune(bases.recipe(base_folders["ours"], corpus, "adapter.method=full"), tmp_path / "full")
    assert {aux for _, aux, _ in tiny.losses(tmp_path / "esft").values()} == {0.0}
    assert all(aux > 0 for _, aux, _ in tiny.losses(tmp_path / "full").values())


@pytest.mark.parametrize(
    ("kind", "overrides", "error", "message"),
    [
        ("dense", [], UsageError, "has no experts to tune: it is a dense model; use method = 'lora'"),
        ("ours", ["data.sequence_length=65"], ConfigError, "data.sequence_length is 65: it must be at most 64"),
        ("ours", ["train.accumulation=3"], ConfigError, "train.accumulation = 3 must divide it"),
    ],
)
def test_what_does_not_go_together_is_refused(
    kind: str,
    overrides: list[str],
    error: type[Exception],
    message: str,
    base_folders: Folders,
    corpus: list[str],
    out: Path,
) -> None:
    with pytest.raises(error, match=message):
        finetune(bases.recipe(base_folders[kind], corpus, *overrides), out)
    assert not out.exists()


def test_quantized_experts_are_refused(base_folders: Folders, corpus: list[str], tmp_path: Path, out: Path) -> None:
    model, tokenizer = load_model(base_folders["ours"])
    moesaic.quantize(model, "int8")
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "quantized")
    for method in ("esft", "full"):
        with pytest.raises(UnsupportedError, match="the experts are quantized"):
            finetune(bases.recipe(tmp_path / "quantized", corpus, f"adapter.method={method}"), out)


def test_a_result_is_plain_values(base_folders: Folders, corpus: list[str], out: Path) -> None:
    result = finetune(bases.recipe(base_folders["ours"], corpus, "train.steps=1", "train.warmup_steps=0"), out)
    assert isinstance(result, FinetuneResult)
    assert (result.steps, result.tokens, result.method) == (1, 64, "esft")
