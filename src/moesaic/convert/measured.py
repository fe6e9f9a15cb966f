"""A dense model in a ``.gguf`` file as one that can be measured, without a folder of it being written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moesaic.convert.dense import DenseModel, check_dense
from moesaic.convert.source import load_tokenizer, open_source
from moesaic.convert.teacher import load_dense
from moesaic.hf.load import check_tokenizer
from moesaic.train.on_disk import ModelOnDisk


def gguf_model(path: str | Path) -> ModelOnDisk:
    """The model for :func:`moesaic.train.evaluation.evaluate_folder`; its weights come as float32, when they are read.

    Raises:
        CheckpointError, UnsupportedError, MissingDependencyError: as :func:`moesaic.convert.open_source` and
            :func:`moesaic.convert.check_dense`; where the tokenizer cannot be loaded, or does not fit the model.
    """
    dense = check_dense(open_source(path))
    size, tokenizer = dense.source.config.vocab_size, load_tokenizer(dense.source.tokenizer_from)
    check_tokenizer(tokenizer, size, Path(path))
    return ModelOnDisk(str(path), size, tokenizer, lambda: _load(dense))


def _load(dense: DenseModel) -> Any:
    return load_dense(dense, torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
