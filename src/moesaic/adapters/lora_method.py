"""LoRA as a fine-tuning method: the base stays as it is, low-rank parts beside its matrices are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from moesaic.adapters.esft import EsftSettings, relevant_layers
from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.folder import PEFT_MANIFEST
from moesaic.adapters.lora import ATTENTION, choose_targets, find_targets, new_lora
from moesaic.adapters.lora_format import read_lora, save_lora
from moesaic.adapters.lora_merge import merge_lora
from moesaic.adapters.lora_modules import AttachedLora, attach_lora
from moesaic.adapters.methods import METHODS, Applied, Method, Task, Tuning


class LoraSettings(EsftSettings):
    """``[adapter]`` with ``method = "lora"``; score, threshold and sample_tokens count where experts = "scored"."""

    rank: int = Field(8, ge=1, description="Of every part.")
    alpha: float = Field(16.0, gt=0, description="A part is weighted with alpha / rank.")
    targets: str | list[str] = Field(
        ATTENTION,
        description="attention, experts, both, or endings of names, as in ['q_proj', 'experts.down_proj'].",
    )
    experts: Literal["all", "scored"] = Field(
        "all", description="Which experts get a part. scored: those that ESFT would tune."
    )


class LoraTuning(Tuning):
    """A model with a low-rank adapter attached, which is all that is trained."""

    def __init__(self, model: PreTrainedModel, settings: LoraSettings, task: Task, note: dict[str, Any]) -> None:
        self._model, self._task, self._note = model, task, note
        seed = int(torch.randint(2**31, ()))
        adapter = new_lora(model, settings.rank, settings.alpha, settings.targets, note["experts"], seed)
        model.requires_grad_(False)
        self._attached: AttachedLora = attach_lora(model, adapter)

    def note(self) -> dict[str, Any]:
        return self._note

    def save(self, folder: Path, training: Mapping[str, Any]) -> None:
        adapter = self._attached.adapter(self._task.base)
        save_lora(folder, replace(adapter, training=dict(training)), self._model)


class Lora(Method):
    """Train low-rank parts of attention, of experts, or of both; the adapter is a folder in PEFT's format."""

    settings = LoraSettings
    manifest = PEFT_MANIFEST

    def attach(self, model: PreTrainedModel, settings: LoraSettings, task: Task) -> Tuning:
        choose_targets(find_targets(model), settings.targets)  # refused before minutes of scoring
        if task.recorded is not None:
            experts = task.recorded["experts"]
        elif settings.experts == "all":
            experts = None
        else:
            task.say(f"scoring the experts on {settings.sample_tokens:,} tokens")
            experts = {name: layer.experts for name, layer in relevant_layers(model, settings, task).items()}
        return LoraTuning(model, settings, task, {"experts": experts})

    def apply(self, model: PreTrainedModel, folder: Path) -> Applied:
        return AppliedLora(model, folder)


class AppliedLora(Applied):
    """A model with a low-rank adapter attached; merged for good it is a part of the weights."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.path, self._model = folder, model
        self._adapter = read_lora(folder, model, fingerprint(model))
        self._attached = attach_lora(model, self._adapter)
        for parameter in self._attached.parameters():
            parameter.requires_grad_(False)

    def merge(self) -> None:
        merge_lora(self._model, self._adapter, keep=False)
        self._attached.remove()

    def remove(self) -> None:
        self._attached.remove()


METHODS.register("lora")(Lora())
