"""The registry of fine-tuning methods: a method is one file in this package and one registration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.adapters.folder import Base
from moesaic.data import Batches
from moesaic.registry import Registry
from moesaic.train.recipe import Section

METHODS: Registry[Method] = Registry("fine-tuning method")


class MethodSettings(Section):
    """``[adapter]`` of a fine-tuning recipe; a method's own keys are those of its subclass."""

    method: str = Field("esft", description="A name of moesaic.adapters.available().")


@dataclass(frozen=True)
class Task:
    """What a method may look at when it decides what to train.

    Attributes:
        base: the model that is tuned. tokenizer: its own.
        batches: the training data; ``batches.batch(step)`` is ``[batch_size, S + 1]`` token ids.
        precision: ``"fp32"`` or ``"bf16"`` (autocast), in which the model is trained.
        dtype: of the base's weights on disk; what is saved of them should be of it.
        recorded: what :meth:`Tuning.note` said when the run began, where it is resumed; else None.
        say: tells a line to whoever watches.
    """

    base: Base
    tokenizer: PreTrainedTokenizerBase
    batches: Batches
    precision: str = "fp32"
    dtype: torch.dtype = torch.float32
    recorded: Mapping[str, Any] | None = None
    say: Callable[[str], None] = field(default=lambda line: None)


class Tuning(ABC):
    """A model made ready by a method: what is trained are its parameters that require a gradient."""

    @abstractmethod
    def note(self) -> dict[str, Any]:
        """What was decided, as JSON values: kept in ``run.json``, and given back when the run is resumed."""

    def settle(self) -> None:  # noqa: B027  (not every method has something to round)
        """Training has ended: round what was trained to what :meth:`save` writes, so that the same is measured."""

    @abstractmethod
    def save(self, folder: Path, training: Mapping[str, Any]) -> None:
        """Write the result as ``folder``, which must appear when it is complete; ``training`` is for its manifest.

        Raises:
            UsageError, OSError: where it cannot be written.
        """


class Applied(ABC):
    """An adapter that a model in memory has taken on, by :func:`moesaic.adapters.load`."""

    path: Path

    @abstractmethod
    def merge(self) -> None:
        """Make it a part of the model for good: the model is then one like its base, and can be saved as one."""

    @abstractmethod
    def remove(self) -> None:
        """Take it off again: the model is then the base, bit for bit."""


class Method(ABC):
    """One way to fine-tune, registered by ``METHODS.register(name)(instance)``.

    Attributes:
        settings: its ``[adapter]`` section.
        result: what a run's result is called in its folder: ``"adapter"``, or ``"model"`` for a whole model.
        manifest: the file by which one knows a folder of this method; None where the result is no adapter.
    """

    settings: ClassVar[type[MethodSettings]]
    result: ClassVar[str] = "adapter"
    manifest: ClassVar[str | None] = None

    @abstractmethod
    def attach(self, model: PreTrainedModel, settings: Any, task: Task) -> Tuning:
        """Freeze what stays as it is, and give the model the parameters that are to be trained, in float32.

        Args:
            model: the base on its device, in eval mode, all of it requiring gradients.
            settings: an instance of this method's :attr:`settings`.

        Raises:
            UsageError, UnsupportedError: where the model or the settings do not suit the method.
        """

    def apply(self, model: PreTrainedModel, folder: Path) -> Applied:
        """Put an adapter of this method into a model in memory.

        Raises:
            CheckpointError: where the folder is damaged, or its base is another model.
        """
        raise NotImplementedError


def available() -> list[str]:
    """Names of the methods that ``adapter.method`` of a fine-tuning recipe accepts."""
    return METHODS.names()
