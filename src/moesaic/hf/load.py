"""A model and its tokenizer from a folder on disk: ours or any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from moesaic.errors import CheckpointError, MoesaicError


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for inference, with experts implementation ``"moesaic"``, and its tokenizer.

    Nothing is fetched from anywhere: the folder must hold all that is needed. Code that it brings along is not run.

    Args:
        path: a model folder as ``save_pretrained`` writes it, or the folder of a training run (its ``model/``).
        dtype: of the parameters; as saved by default.
        device: CUDA where there is one by default, else the CPU.

    Raises:
        CheckpointError: where the folder is missing or no model, a file is damaged, weights are missing, are more or
            have other shapes than the configuration says, or the tokenizer does not fit the model.
    """
    folder = model_folder(path)
    logging.disable_progress_bar()
    with _quiet():
        config = _read(folder, "configuration", AutoConfig.from_pretrained)
        tokenizer = _read(folder, "tokenizer", AutoTokenizer.from_pretrained)
        model = _load_weights(folder, config, dtype)
    check_tokenizer(tokenizer, model.config.get_text_config().vocab_size, folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device=torch.device(device))
    return model.eval(), tokenizer


def load_config(path: str | Path) -> PretrainedConfig:
    """The configuration in a model folder, or in that of a training run.

    Raises:
        CheckpointError: as :func:`load_model`.
    """
    folder = model_folder(path)
    with _quiet():
        return _read(folder, "configuration", AutoConfig.from_pretrained)  # type: ignore[no-any-return]


def model_folder(path: str | Path) -> Path:
    """The folder with ``config.json``: ``path`` itself, or the ``model/`` of the training run that it holds.

    Raises:
        CheckpointError: where there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no model folder at {str(path)!r}: give a folder that holds a config.json")
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if (path / "adapter").is_dir():
        raise CheckpointError(
            f"{str(path)!r} holds an adapter, not a model: give the model that it adapts, and this as --adapter"
        )
    if (path / "run.json").is_file():
        raise CheckpointError(
            f"the training run in {str(path)!r} has not finished, it has no model yet: go on with --resume"
        )
    raise CheckpointError(f"{str(path)!r} is no model folder: it holds no config.json")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, folder: Path) -> None:
    """Refuse a tokenizer that can produce ids which the model's embedding does not have."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer in {str(folder)!r} does not fit the model: its highest token id is {highest}, "
            f"but the model's vocabulary has {vocab_size} entries"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of the weights: what is wrong with them we say ourselves, in one line."""
    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _read(folder: Path, what: str, read: Any, **options: Any) -> Any:
    try:
        # Where it is not said, transformers asks on standard input whether it may run code from the folder.
        return read(folder, local_files_only=True, trust_remote_code=False, **options)
    except MoesaicError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception, transformers nearly everything else
        raise CheckpointError(f"the {what} in {str(folder)!r} cannot be loaded: {_one_line(error)}") from error


def _load_weights(folder: Path, config: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    model, report = _read(
        folder,
        "weights",
        AutoModelForCausalLM.from_pretrained,
        config=config,
        dtype=dtype or "auto",
        experts_implementation="moesaic",
        output_loading_info=True,
        # They come back in the report, instead of as an error that only points to it.
        ignore_mismatched_sizes=True,
    )
    # transformers only warns of these and goes on, with random weights or a part of the model. Keys that it knows to be
    # of no use (a model class's _keys_to_ignore_on_load_unexpected, rotary frequencies of old) are not in its report.
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := sorted(report[kind]):
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            what = f"{kind.replace('_', ' ')}: {_key(keys[0])}{more}"
            raise CheckpointError(f"the weights in {str(folder)!r} do not match their configuration: {what}")
    return model  # type: ignore[no-any-return]


def _key(key: str | tuple[str, Any, Any]) -> str:
    if isinstance(key, str):
        return key
    name, saved, configured = key
    return f"{name} (saved {list(saved)}, configured {list(configured)})"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
