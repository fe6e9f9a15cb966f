"""What one kind of run does its own way: which model it trains, and what it leaves. :mod:`moesaic.train.run` does the
rest, the same for all kinds.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from moesaic.data import Batches, TokenData, prepare
from moesaic.hf.state import full_state_dict
from moesaic.train.model import build_model, check, count_parameters, tell_frequencies
from moesaic.train.recipe import ParallelSettings, Recipe, RunRecipe
from moesaic.train.world import World


@dataclass(frozen=True)
class Setting:
    """What is known when the model is made: the data, and where and how it will be trained.

    Attributes:
        recorded: what ``run.json`` says, where a run is resumed; else None.
        say: tells a line to whoever watches.
        world: the ranks that train together.
    """

    data: TokenData
    batches: Batches
    device: torch.device
    precision: str
    recorded: Mapping[str, Any] | None
    say: Callable[[str], None]
    world: World = field(default_factory=World)


@dataclass(frozen=True)
class Built:
    """A model that is ready to be trained: its parameters that require a gradient.

    Attributes:
        parameters, active_parameters: of the model, and of those the ones that one token meets.
        note: more to be said in ``run.json``.
    """

    model: PreTrainedModel
    parameters: int
    active_parameters: int
    note: Mapping[str, Any]

    @property
    def trained_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


class Job(ABC):
    """One kind of run.

    Attributes:
        result: the part of the run's folder in which :meth:`save` leaves what was made.
        recipe: with absolute paths.
        parallel: how several ranks work together; None where a job is one process's.
    """

    result: str = "model"
    recipe: RunRecipe
    parallel: ParallelSettings | None = None

    @abstractmethod
    def check(self) -> None:
        """Refuse settings that do not go together, before anything is read; raises :class:`UsageError`."""

    @abstractmethod
    def read(self, cache_dir: str | Path | None) -> TokenData:
        """The text as tokens."""

    @abstractmethod
    def build(self, setting: Setting) -> Built:
        """Make the model, the same each time and on every rank; raises :class:`UsageError` where that cannot be."""

    @abstractmethod
    def settle(self) -> None:
        """The last step has been done: make the model what :meth:`save` writes, so that the same is measured."""

    @abstractmethod
    def save(self, folder: Path, results: Mapping[str, Any]) -> None:
        """Write what was made as ``folder``, which is there as a whole or not at all; called on all ranks.

        Args:
            results: validation before and after, steps, tokens, seconds: JSON values.
        """


class Training(Job):
    """A model from nothing, by a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe: Recipe = recipe
        self.parallel = recipe.parallel

    def check(self) -> None:
        check(self.recipe)

    def read(self, cache_dir: str | Path | None) -> TokenData:
        data = self.recipe.data
        return prepare(
            data.sources,
            tokenizer=data.tokenizer,
            vocab_size=data.vocab_size,
            validation_fraction=data.validation_fraction,
            cache_dir=cache_dir,
        )

    def build(self, setting: Setting) -> Built:
        self._tokenizer, self._world = setting.data.tokenizer, setting.world
        self._model = build_model(self.recipe, setting.data.vocab_size, self._tokenizer, setting.device)
        tell_frequencies(self._model, setting.data, setting.batches.mixture)
        return Built(self._model, *count_parameters(self._model), note={})

    def settle(self) -> None:
        """What is trained is what is saved."""

    def save(self, folder: Path, results: Mapping[str, Any]) -> None:
        weights = full_state_dict(self._model) if self._world.size > 1 else None
        self._world.first(lambda: save_model(self._model, self._tokenizer, folder, weights))


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Weights, configuration, generation settings and tokenizer; replaces what is in ``folder``.

    Args:
        weights: those of a model that is spread over ranks.
    """
    making = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    logging.disable_progress_bar()  # the display is ours
    model.save_pretrained(making, state_dict=weights)
    tokenizer.save_pretrained(making)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
