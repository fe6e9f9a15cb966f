"""Full fine-tuning: every parameter is trained; the result is a model, not an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moesaic.adapters.methods import METHODS, Method, MethodSettings, Task, Tuning
from moesaic.errors import UnsupportedError
from moesaic.experts.storage import ExpertStorage
from moesaic.hf.quantized import expert_modules
from moesaic.train.job import save_model


class FullSettings(MethodSettings):
    """``[adapter]`` with ``method = "full"``: there is nothing to choose."""


class FullTuning(Tuning):
    """A model in float32, all of which is trained."""

    def __init__(self, model: PreTrainedModel, task: Task) -> None:
        self._model, self._task = model, task
        nn.Module.to(model, dtype=torch.float32).requires_grad_(True)

    def note(self) -> dict[str, Any]:
        return {}

    def settle(self) -> None:
        nn.Module.to(self._model, dtype=self._task.dtype)

    def save(self, folder: Path, training: Mapping[str, Any]) -> None:
        save_model(self._model, self._task.tokenizer, folder)


class Full(Method):
    """Train every parameter and write a whole model. Our routers are balanced as in training; transformers' are not."""

    settings = FullSettings
    result = "model"

    def attach(self, model: PreTrainedModel, settings: FullSettings, task: Task) -> Tuning:
        for module in expert_modules(model).values():
            if isinstance(module, ExpertStorage) and module.format is not None:
                raise UnsupportedError(
                    f"the experts are quantized ({module.format.name}), which cannot be trained: use method = 'lora'"
                )
        return FullTuning(model, task)


METHODS.register("full")(Full())
