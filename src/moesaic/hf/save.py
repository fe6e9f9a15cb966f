"""A model folder on disk that is complete, or not there at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.errors import CheckpointError, UsageError


def check_new(out: str | Path) -> Path:
    """``out`` as a path that may be written.

    Raises:
        CheckpointError: where it exists already.
    """
    path = Path(out)
    if path.exists():
        raise CheckpointError(f"{str(out)!r} exists already: give a folder that does not")
    return path


def save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: str | Path) -> Path:
    """Write both with ``save_pretrained`` to the new folder ``out``, which appears when it is complete.

    Raises:
        CheckpointError: where ``out`` exists already.
        UsageError: where it cannot be written.
    """
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(out)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A path to make a folder at, which becomes ``out`` at the end of the block, or goes where that raises.

    Raises:
        CheckpointError: where ``out`` exists already.
        UsageError: where it cannot be written.
    """
    path = check_new(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            folder = Path(scratch) / path.name
            yield folder
            folder.rename(path)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by an error of its own
        raise UsageError(f"{str(out)!r} cannot be written: {error}") from error
