"""LoRA runs: what they train and leave, that they go on as if nothing had happened, and that PEFT takes the result."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.adapters import bases
from tests.adapters.lora_models import logits
from tests.train import tiny
from torch import Tensor

from moesaic import adapters
from moesaic.adapters.finetune import finetune
from moesaic.adapters.lora import LoraAdapter
from moesaic.adapters.lora_format import read_lora
from moesaic.data import prepare
from moesaic.errors import CheckpointError, ConfigError, Interrupted
from moesaic.hf.load import load_model
from moesaic.train.evaluate import evaluate

Folders = dict[str, Path]
IDS = torch.arange(20).view(2, 10)
LORA = ["adapter.method=lora", "train.learning_rate=0.03"]


@pytest.mark.parametrize("kind", bases.MOE)
@pytest.mark.parametrize("targets", ["attention", "experts", "both"])
def test_it_learns_and_leaves_what_peft_loads(
    kind: str, targets: str, base_folders: Folders, corpus: list[str], out: Path
) -> None:
    result = finetune(bases.recipe(base_folders[kind], corpus, *LORA, f"adapter.targets={targets}"), out)
    for domain in ("sums", "words"):
        assert result.after[domain].loss < result.before[domain].loss
    base, _ = load_model(base_folders[kind])
    before = logits(base, IDS)
    adapter = read_lora(result.adapter, base)
    assert {"self_attn" in name for name in adapter.parts} == {targets != "experts", targets == "attention"}
    assert result.trained_parameters == sum(part.a.numel() + part.b.numel() for part in adapter.parts.values())
    assert adapter.base is not None and adapter.base.model_type == base.config.model_type
    assert adapter.training["recipe"]["adapter"]["rank"] == 8
    loaded = adapters.load(base, out)
    after = logits(base, IDS)
    assert not torch.equal(after, before)
    loaded.remove()
    assert torch.equal(logits(base, IDS), before)
    adapters.merge(base, out)
    torch.testing.assert_close(logits(base, IDS), after, rtol=0, atol=1e-5)
    theirs = PeftModel.from_pretrained(load_model(base_folders[kind])[0], str(result.adapter)).eval()
    torch.testing.assert_close(logits(theirs, IDS), after, rtol=0, atol=1e-5)


def test_what_was_measured_is_what_the_adapter_gives(base_folders: Folders, corpus: list[str], out: Path) -> None:
    result = finetune(bases.recipe(base_folders["olmoe"], corpus, *LORA, "adapter.targets=both"), out)
    model, _ = load_model(base_folders["olmoe"])
    data = prepare(corpus, tokenizer=str(base_folders["olmoe"]), validation_fraction=0.2)
    with adapters.load(model, out):
        measured = evaluate(model, data.validation, sequence_length=16, batch_size=4, max_tokens=128)
    assert {name: each.loss for name, each in measured.items()} == {
        name: each.loss for name, each in result.after.items()
    }


def test_only_scored_experts_get_a_part_and_a_run_goes_on_with_them(
    base_folders: Folders, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*LORA, "adapter.targets=experts", "adapter.experts=scored", "adapter.sample_tokens=256"]
    recipe = bases.recipe(base_folders["olmoe"], corpus, *settings, "adapter.threshold=0.4")
    whole = finetune(recipe, tmp_path / "whole")
    model, _ = load_model(base_folders["olmoe"])
    wanted = read_lora(whole.adapter, model)
    counts = {len(part.experts or ()) for part in wanted.parts.values()}
    assert counts and max(counts) < 8
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "parted", display=tiny.AtStep(5, tiny.send(signal.SIGTERM)))
    monkeypatch.setattr("moesaic.adapters.lora_method.relevant_layers", lambda *_: pytest.fail("scored again"))
    finetune(recipe, tmp_path / "parted", resume=True)
    assert_equal(read_lora(tmp_path / "parted", model), wanted)


def assert_equal(one: LoraAdapter, other: LoraAdapter) -> None:
    def tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
        return {f"{name}.{key}": getattr(part, key) for name, part in adapter.parts.items() for key in "ab"}

    assert tensors(one).keys() == tensors(other).keys()
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, tensors(other)[name]), name


def test_a_dense_model_has_attention_to_tune_and_no_experts(
    base_folders: Folders, corpus: list[str], out: Path
) -> None:
    result = finetune(bases.recipe(base_folders["dense"], corpus, *LORA), out)
    assert result.after["sums"].loss < result.before["sums"].loss
    with pytest.raises(ConfigError, match="the model has no experts that LoRA could be put on"):
        finetune(bases.recipe(base_folders["dense"], corpus, *LORA, "adapter.targets=both"), out, overwrite=True)


def test_another_base_is_refused(base_folders: Folders, corpus: list[str], out: Path) -> None:
    result = finetune(bases.recipe(base_folders["olmoe"], corpus, *LORA), out)
    model, _ = load_model(base_folders["olmoe"])
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="this base is another model"):
        adapters.load(model, result.adapter)
    extra: dict[str, Any] = json.loads((result.adapter / "moesaic.json").read_text())
    (result.adapter / "moesaic.json").write_text(json.dumps(extra | {"base": None}))
    adapters.load(model, result.adapter)  # PEFT writes down no fingerprint
