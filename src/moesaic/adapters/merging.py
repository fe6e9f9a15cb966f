"""Adapters in a model in memory: put on, taken off again, or made a part of it for good."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.adapters.folder import adapter_folder
from moesaic.adapters.methods import METHODS, Applied, Method
from moesaic.errors import CheckpointError, UsageError
from moesaic.hf.load import load_model

# Not the adapters themselves: they hold their model, which would then never go.
_LOADED: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()


class LoadedAdapter:
    """An adapter on a model, until :meth:`remove` or :meth:`merge`; as a context manager, until the block ends.

    Attributes:
        path: of the adapter's folder.
    """

    def __init__(self, model: PreTrainedModel, applied: Applied) -> None:
        self._model, self._applied, self._is_on = model, applied, True
        self.path = applied.path

    def merge(self) -> None:
        """Keep it for good: the model is one like its base now, and ``save_pretrained`` writes it as one.

        Raises:
            UsageError: where it has been removed or merged.
        """
        self._check()
        self._applied.merge()
        self._end()

    def remove(self) -> None:
        """Take it off: the model is what it was, bit for bit.

        Raises:
            UsageError: where it has been removed or merged.
        """
        self._check()
        self._applied.remove()
        self._end()

    def __enter__(self) -> LoadedAdapter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._is_on:
            self.remove()

    def _check(self) -> None:
        if not self._is_on:
            raise UsageError(f"the adapter {str(self.path)!r} is not on the model any more: it was removed or merged")

    def _end(self) -> None:
        self._is_on = False
        del _LOADED[self._model]


def load(model: PreTrainedModel, path: str | Path) -> LoadedAdapter:
    """Put an adapter on a model in memory; what it gave before comes back with ``remove()``, bit for bit.

    The weights of tuned experts take the place of the base's, rounded to the model's dtype where that is another one;
    the base's are kept beside them. One adapter at a time: for many at once, each request with its own, there is
    :class:`moesaic.adapters.AdapterPool`.

    Args:
        model: the base, of ours or of transformers with ``experts_implementation="moesaic"``.
        path: the folder of an adapter, ours or LoRA in PEFT's format, or that of the run that made it.

    Raises:
        CheckpointError: where the folder is missing or damaged, or belongs to another base.
        UsageError: where an adapter is on the model already.
        UnsupportedError: for quantized experts, where the adapter changes them.
    """
    if model in _LOADED:
        raise UsageError(
            f"the model has the adapter {str(_LOADED[model])!r} on it already: remove() or merge() that first"
        )
    folder = adapter_folder(path)
    loaded = LoadedAdapter(model, _method_of(folder).apply(model, folder))
    _LOADED[model] = loaded.path
    return loaded


def merge(model: PreTrainedModel, path: str | Path) -> None:
    """Put an adapter on a model for good: :func:`load`, then ``merge()``."""
    load(model, path).merge()


def load_adapted(path: str | Path, adapter: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model from a folder with an adapter on it, and its tokenizer.

    A LoRA stays beside the weights: quantized ones can have it so, and its numbers are those that training measured.

    Raises:
        CheckpointError, UnsupportedError: as :func:`moesaic.hf.load.load_model` and :func:`load`.
    """
    adapter_folder(adapter)  # before seconds of loading
    model, tokenizer = load_model(path)
    load(model, adapter)
    return model, tokenizer


def _method_of(folder: Path) -> Method:
    for method in METHODS.parts():
        if method.manifest is not None and (folder / method.manifest).is_file():
            return method
    raise CheckpointError(f"{str(folder)!r} is an adapter of a kind that this moesaic does not load")
