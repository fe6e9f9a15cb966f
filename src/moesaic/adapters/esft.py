"""Expert-specialized fine-tuning: only the experts that a task uses are trained, router and all the rest stay.

Source: Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning for Sparse Architectural Large Language Models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.folder import MANIFEST, AdapterLayer, ExpertAdapter, read_adapter, write_adapter
from moesaic.adapters.methods import METHODS, Applied, Method, MethodSettings, Task, Tuning
from moesaic.adapters.scoring import choose_experts, num_experts, of_layers, score_experts
from moesaic.adapters.tuned import TunedExperts, plain_weights
from moesaic.errors import CheckpointError, UsageError
from moesaic.hf.quantized import expert_modules


class EsftSettings(MethodSettings):
    """``[adapter]`` with ``method = "esft"``: whole experts, those that the task uses most."""

    score: Literal["gate", "token"] = Field(
        "gate", description="gate: an expert's mean routing weight on the data. token: its share of the tokens' slots."
    )
    threshold: float = Field(
        0.2, gt=0, le=1, description="In each layer the fewest experts are tuned whose scores add up to this share."
    )
    sample_tokens: int = Field(32768, ge=1, description="Training tokens on which the experts are scored.")


class EsftTuning(Tuning):
    """A model with some of its experts as parameters of their own."""

    def __init__(self, model: PreTrainedModel, layers: Mapping[str, AdapterLayer], task: Task) -> None:
        modules = expert_modules(model)
        model.requires_grad_(False)
        self.layers, self._task = dict(layers), task
        self._modules = {name: modules[name] for name in layers}
        self._tuned = {name: TunedExperts(modules[name], layer.experts) for name, layer in layers.items()}
        for name, tuned in self._tuned.items():
            modules[name].add_module("tuned", tuned)

    def note(self) -> dict[str, Any]:
        return {"layers": {name: vars(layer) for name, layer in self.layers.items()}}

    def settle(self) -> None:
        for name, tuned in self._tuned.items():
            tuned.put_back(self._modules[name], self._task.dtype)

    def save(self, folder: Path, training: Mapping[str, Any]) -> None:
        tensors = {name: tuned.rows(self._task.dtype) for name, tuned in self._tuned.items()}
        write_adapter(folder, self._task.base, self.layers, tensors, training)


class Esft(Method):
    """Tune the experts that a task uses; the adapter is a folder of whole experts."""

    settings = EsftSettings
    manifest = MANIFEST

    def attach(self, model: PreTrainedModel, settings: EsftSettings, task: Task) -> Tuning:
        modules = expert_modules(model)
        if not modules:
            raise UsageError(f"{type(model).__name__} has no experts to tune: it is a dense model; use method = 'lora'")
        for module in modules.values():
            plain_weights(module)  # before minutes of scoring
        if task.recorded is not None:
            layers = {name: AdapterLayer(**told) for name, told in task.recorded["layers"].items()}
        else:
            task.say(f"scoring the experts on {settings.sample_tokens:,} tokens")
            layers = relevant_layers(model, settings, task)
        tuned, all_of_them = (
            sum(len(layer.experts) for layer in layers.values()),
            sum(map(num_experts, modules.values())),
        )
        task.say(f"tuning {tuned} of {all_of_them} experts, in {len(of_layers(model, layers))} layers")
        return EsftTuning(model, layers, task)

    def apply(self, model: PreTrainedModel, folder: Path) -> Applied:
        return AppliedExperts(model, read_adapter(folder))


def relevant_layers(model: PreTrainedModel, settings: EsftSettings, task: Task) -> dict[str, AdapterLayer]:
    """By the path of each experts module the experts that a task uses most, with their scores.

    A layer whose experts are of unequal size has several modules; those of which no expert was chosen are left out.
    """
    scores = score_experts(model, _sample(task, settings.sample_tokens), settings.score, task.precision)
    found: dict[str, AdapterLayer] = {}
    for names in of_layers(model, scores).values():
        chosen = choose_experts([score for name in names for score in scores[name]], settings.threshold)
        first = 0
        for name in names:
            own = [expert - first for expert in chosen if first <= expert < first + len(scores[name])]
            if own:
                found[name] = AdapterLayer(own, [scores[name][expert] for expert in own], len(scores[name]))
            first += len(scores[name])
    return found


def _sample(task: Task, tokens: int) -> Iterator[Tensor]:
    step = 0
    while tokens > 0:
        ids = task.batches.batch(step)[:, :-1]
        yield ids
        step, tokens = step + 1, tokens - ids.numel()


class AppliedExperts(Applied):
    """A model with an adapter's experts in the rows of its own; the base's rows are kept beside it.

    Raises:
        CheckpointError: where the adapter is of another base.
        UnsupportedError: for quantized experts.
        UsageError: where an AdapterPool holds the model's experts.
    """

    def __init__(self, model: PreTrainedModel, adapter: ExpertAdapter) -> None:
        self.path = adapter.path
        modules = expert_modules(model)
        for module in modules.values():
            plain_weights(module)
            if getattr(module, "slots", None) is not None:
                raise UsageError("the model's experts are in an AdapterPool: load the adapter there")
        check_base(model, adapter.path, adapter.fingerprint)
        placed = list(_placed(adapter, modules))
        self._kept = [(parameter, experts, parameter.detach()[experts]) for parameter, experts, _ in placed]
        for parameter, experts, rows in placed:
            _write(parameter, experts, rows)

    def merge(self) -> None:
        self._kept = []

    def remove(self) -> None:
        for parameter, experts, rows in self._kept:
            _write(parameter, experts, rows)
        self._kept = []


def check_base(model: nn.Module, path: Path, wanted: str) -> None:
    """Refuse an adapter of another base.

    Raises:
        CheckpointError: with both fingerprints.
    """
    if (found := fingerprint(model)) != wanted:
        raise CheckpointError(
            f"the adapter in {str(path)!r} was trained from another base model: its fingerprint is {wanted}, "
            f"this model's {found}"
        )


def _placed(
    adapter: ExpertAdapter, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[nn.Parameter, list[int], Tensor]]:
    """(parameter, expert ids, rows) of everything in an adapter; all of it checked before anything is given."""
    placed = []
    for name, layer in adapter.layers.items():
        for key, rows in adapter.tensors(name).items():
            parameter = getattr(modules.get(name), key, None)
            if not isinstance(parameter, nn.Parameter) or (
                tuple(parameter.shape) != (layer.num_experts, *rows.shape[1:])
            ):
                raise CheckpointError(
                    f"the adapter in {str(adapter.path)!r} does not fit the model: {name}.{key} would have to be "
                    f"{[layer.num_experts, *rows.shape[1:]]}"
                )
            placed.append((parameter, layer.experts, rows))
    yield from placed


@torch.no_grad()
def _write(parameter: nn.Parameter, experts: list[int], rows: Tensor) -> None:
    parameter[experts] = rows.to(parameter.device, parameter.dtype)


METHODS.register("esft")(Esft())
