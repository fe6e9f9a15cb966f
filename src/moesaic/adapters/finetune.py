"""Fine-tuning: the job that a run does, from a base model to an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.folder import Base
from moesaic.adapters.methods import METHODS, Task, Tuning
from moesaic.adapters.recipe import FinetuneRecipe
from moesaic.data import TokenData, prepare
from moesaic.errors import CheckpointError, ConfigError, UsageError
from moesaic.hf.load import load_config, load_model, model_folder
from moesaic.train import run
from moesaic.train.display import Display
from moesaic.train.evaluate import DomainResult, model_positions
from moesaic.train.job import Built, Job, Setting
from moesaic.train.model import check_train, count_parameters
from moesaic.train.recipe_file import absolute, with_absolute_paths


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished fine-tuning run came to.

    Attributes:
        folder: of the run.
        adapter: in it, the adapter; of method ``"full"`` the model.
        method: as the recipe names it.
        before, after: validation by domain, of the base and of what was made.
        steps, tokens: done and predicted in training, all lives of the run together.
        seconds: spent in steps.
        parameters, trained_parameters: of the base, and those that were trained.
        bytes: of the adapter's (or model's) files.
    """

    folder: Path
    adapter: Path
    method: str
    before: dict[str, DomainResult]
    after: dict[str, DomainResult]
    steps: int
    tokens: int
    seconds: float
    parameters: int
    trained_parameters: int
    bytes: int


def choose(
    words: Sequence[str], out: str | Path | None = None, *, resume: bool = False, sources: Sequence[str] | None = None
) -> tuple[FinetuneRecipe, Path]:
    """The recipe and the run folder that a command line means.

    Args:
        words: at most one model (a folder), at most one recipe (a ``.toml`` file), and any number of ``key=value``.
        out: ``runs/<name of the recipe>`` by default.
        resume: without a recipe file, that of the run in the folder is meant, and with it its base.
        sources: short for ``data.sources``.

    Raises:
        UsageError: for two models or recipes, no model, or what is named twice.
        ConfigError: for what a recipe does not allow. CheckpointError: where there is no run to resume.
    """
    models = [word for word in words if not word.endswith(".toml") and ("=" not in word or Path(word).exists())]
    if len(models) > 1:
        raise UsageError(f"give one model, not {len(models)}: {', '.join(models)}")
    rest = [word for word in words if word not in models]
    if models and any(word.partition("=")[0].strip() == "base" for word in rest):
        raise UsageError("the model is named twice: give either MODEL or base=...")
    recipe, folder = run.choose(rest, out, resume=resume, sources=sources, kind=FinetuneRecipe)
    if models:
        recipe = recipe.model_copy(update={"base": models[0]})
    if not recipe.base:
        raise UsageError("there is no model to fine-tune: give MODEL, a folder with a config.json or that of a run")
    return recipe, folder


def finetune(
    recipe: FinetuneRecipe,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    cache_dir: str | Path | None = None,
) -> FinetuneResult:
    """Fine-tune by a recipe into a folder, or go on with the run that is in it.

    It is a run as :func:`moesaic.train.run.execute` does it, with the same folder, checkpoints and resumption, and
    ``adapter/`` in it. The run's folder may be given wherever an adapter's may.

    Raises:
        UsageError: as ``execute``, and where base, tokenizer or method do not go together.
        TrainingError, Interrupted: as ``execute``.
    """
    job = Finetuning(recipe)
    done = run.execute(job, folder, resume=resume, overwrite=overwrite, display=display, cache_dir=cache_dir)
    return FinetuneResult(
        folder=done.folder,
        adapter=done.model,
        method=recipe.adapter.method,
        before=done.before,
        after=done.after,
        steps=done.steps,
        tokens=done.tokens,
        seconds=done.seconds,
        parameters=done.parameters,
        trained_parameters=done.trained_parameters,
        bytes=sum(path.stat().st_size for path in done.model.rglob("*") if path.is_file()),
    )


class Finetuning(Job):
    """A base, and what a method makes of it."""

    _tuning: Tuning

    def __init__(self, recipe: FinetuneRecipe) -> None:
        # Loaded from its own folder, whatever the working folder is when the run is resumed.
        self.recipe: FinetuneRecipe = with_absolute_paths(recipe).model_copy(update={"base": absolute(recipe.base)})
        self._method = METHODS.get(recipe.adapter.method)
        self.result = self._method.result

    def check(self) -> None:
        check_train(self.recipe.train)
        positions = model_positions(load_config(self.recipe.base))
        length = self.recipe.data.sequence_length
        if positions is not None and length > positions:
            raise ConfigError(
                f"data.sequence_length is {length}: it must be at most {positions}, the tokens that the model has "
                "positions for"
            )

    def read(self, cache_dir: str | Path | None) -> TokenData:
        data = self.recipe.data
        return prepare(
            data.sources,
            tokenizer=str(model_folder(self.recipe.base)),
            validation_fraction=data.validation_fraction,
            cache_dir=cache_dir,
        )

    def build(self, setting: Setting) -> Built:
        model, tokenizer = load_model(self.recipe.base, device=setting.device)
        base = Base(fingerprint(model), str(model.config.model_type), _name(self.recipe.base))
        recorded = self._recorded(base, setting.recorded)
        dtype = model.dtype
        # Only a bfloat16 forward takes bfloat16 weights as they are; everything else is computed in float32.
        if not (setting.precision == "bf16" and dtype == torch.bfloat16):
            nn.Module.to(model, dtype=torch.float32)
        parameters, active = count_parameters(model)
        torch.manual_seed(self.recipe.train.seed)
        task = Task(base, tokenizer, setting.batches, setting.precision, dtype, recorded, setting.say)
        self._tuning = self._method.attach(model, self.recipe.adapter, task)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError(
                f"the method {self.recipe.adapter.method!r} found nothing to train in {self.recipe.base!r}"
            )
        note = {"base": vars(base), "adapter": self._tuning.note()}
        return Built(model, parameters, active, note)

    def settle(self) -> None:
        self._tuning.settle()

    def save(self, folder: Path, results: Mapping[str, Any]) -> None:
        recipe = self.recipe.model_dump(mode="json")
        self._tuning.save(folder, {"recipe": recipe, **results})

    def _recorded(self, base: Base, note: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """What the run's method decided when it began, where a run is resumed."""
        if note is None:
            return None
        try:
            then, decided = note["base"]["fingerprint"], note["adapter"]
        except (LookupError, TypeError):
            return None  # killed before it wrote down anything: it begins anew
        if then != base.fingerprint:
            raise CheckpointError(
                f"the run cannot go on: {self.recipe.base!r} is not the model that it began with "
                f"(fingerprint {then} then, {base.fingerprint} now)"
            )
        return dict(decided)


def _name(path: str) -> str:
    """What to call a base: the name of its folder, or of the run whose ``model/`` it is."""
    folder = model_folder(path).resolve()
    return folder.parent.name if folder.name == "model" else folder.name
