"""A model that is to be measured: its tokenizer is at hand, its weights are still on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.data import load_tokenizer
from moesaic.hf.load import load_config, load_model, model_folder


@dataclass(frozen=True)
class ModelOnDisk:
    """What is known of a model before its weights are read, so that what does not fit is refused first.

    Attributes:
        path: as the user gave it.
        vocab_size: entries of its embedding.
        tokenizer: what it reads text with.
        load: reads the weights; the model comes in evaluation mode.
    """

    path: str
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[], PreTrainedModel]


def on_disk(model: str | Path | ModelOnDisk) -> ModelOnDisk:
    """The model in a folder, or in that of a training run; what is one already stays it.

    Raises:
        CheckpointError: where there is none, or its tokenizer cannot be read. ``load`` raises as
            :func:`moesaic.hf.load.load_model`.
    """
    if isinstance(model, ModelOnDisk):
        return model
    folder = model_folder(model)
    size = load_config(folder).get_text_config().vocab_size
    return ModelOnDisk(str(model), size, load_tokenizer(folder), partial(_load, folder))


def _load(folder: Path) -> PreTrainedModel:
    return load_model(folder)[0]
