"""The tensors of a model on disk, read one at a time: a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from moesaic.convert.meter import watch
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hf.load import load_config, model_folder

EMBEDDING = "model.embed_tokens.weight"
SEQUENCE_LENGTH = 512
"""Tokens of a passage where nobody says otherwise and the models read as many at once."""
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HASHED_ROWS = 4096
_SAMPLE_BYTES = 4096
_NO_CONTENT = ("_name_or_path", "name_or_path", "transformers_version")
"""Of a configuration, what says nothing about the model."""


class TensorSource(ABC):
    """A model's tensors by transformers' names; nothing is in memory but what :meth:`read` has returned.

    ``path`` is what the user gave, ``config`` transformers' configuration, ``names`` all tensors in a fixed order, and
    ``tokenizer_from`` where the tokenizer is: a folder, or a ``.gguf`` file.
    """

    path: Path
    config: PretrainedConfig
    names: tuple[str, ...]
    tokenizer_from: Path

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            CheckpointError: where there is none of that name.
        """

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """What :meth:`read` returns; float32 for all tensors of a GGUF file."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some rows of it, on the CPU in memory of its own.

        Raises:
            CheckpointError: where there is none of that name, or the file is damaged.
        """
        if name not in self:
            raise CheckpointError(f"{str(self.path)!r} holds no tensor {name}")
        return watch(self._read(name, rows))

    @abstractmethod
    def _read(self, name: str, rows: slice | None) -> Tensor: ...

    def __contains__(self, name: object) -> bool:
        return name in self._known

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    def structure(self) -> str:
        """``"v1:"`` and 32 hexadecimal digits of the architecture (``model_type``) and every tensor's name and shape:
        the same for all fine-tuned models of one base, whatever the precision they are saved in."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr(self.config.model_type).encode())
        for name in sorted(self.names):
            digest.update(repr((name, self.shape(name))).encode())
        return f"v1:{digest.hexdigest()}"

    def fingerprint(self) -> str:
        """:meth:`structure`, and the values of the embedding rounded to bfloat16: which base model this is.

        A base saved in float32 and in bfloat16 has one fingerprint; a fine-tuned model has its base's as long as its
        embedding was not trained.
        """
        digest = hashlib.blake2b(self.structure().encode(), digest_size=16)
        if EMBEDDING in self:
            for start in range(0, self.shape(EMBEDDING)[0], _HASHED_ROWS):
                rows = self.read(EMBEDDING, slice(start, start + _HASHED_ROWS)).to(torch.bfloat16)
                digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
        return f"v1:{digest.hexdigest()}"

    def content(self) -> str:
        """``"v1:"`` and 32 hexadecimal digits of the configuration, and of every tensor's name, shape, dtype and stored
        bytes, of these the first, middle and last 4 KiB: whether this is the model that a conversion was begun with.

        The same for a copy elsewhere, in whatever shards; another one after any training of all values.

        Raises:
            CheckpointError: where a file cannot be read.
        """
        config = {name: value for name, value in self.config.to_dict().items() if name not in _NO_CONTENT}
        digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
        for name in sorted(self.names):
            digest.update(repr((name, self.shape(name), str(self.dtype(name)))).encode())
            digest.update(self._sample(name))
        return f"v1:{digest.hexdigest()}"

    @abstractmethod
    def _sample(self, name: str) -> bytes:
        """The first, middle and last bytes of a tensor as it is stored."""


def sample_places(size: int) -> tuple[slice, ...]:
    """Which of ``size`` bytes tell a tensor's content: the first, middle and last 4 KiB."""
    starts = (0, max(0, (size - _SAMPLE_BYTES) // 2), max(0, size - _SAMPLE_BYTES))
    return tuple(slice(start, min(start + _SAMPLE_BYTES, size)) for start in starts)


def open_source(path: str | Path) -> TensorSource:
    """A model on disk as its tensors: a folder with safetensors (one file, or shards with an index), the folder of a
    training run that holds one, or a ``.gguf`` file of a dense Llama, Mistral, Qwen2 or Qwen3.

    Reads the configuration and the headers only.

    Raises:
        CheckpointError: where there is no such model, or a file is damaged.
        MissingDependencyError: for a ``.gguf`` file where ``gguf`` is not installed.
        UnsupportedError: for a ``.gguf`` file of another architecture.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from moesaic.convert.gguf_source import GgufSource  # gguf is optional

        return GgufSource(path)
    return SafetensorsSource(path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or a ``.gguf`` file (``TensorSource.tokenizer_from``).

    Raises:
        CheckpointError: where there is none.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        folder, options = (path.absolute().parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # the tokenizers library raises plain Exception
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the tokenizer in {str(path)!r} cannot be loaded: {said}") from error
    finally:
        logging.set_verbosity(before)
    return tokenizer


def passage_length(given: int | None, *models: TensorSource) -> int:
    """Tokens of a passage for all of ``models``: those that are ``given``, or 512 or as many as they read at once.

    Raises:
        ConfigError: where more are given than one of the models reads at once.
    """
    length = given or SEQUENCE_LENGTH
    for model in models:
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
        if longest < length and given is not None:
            raise ConfigError(
                f"sequence_length is {length}: {str(model.path)!r} reads at most {longest} tokens at once "
                "(max_position_embeddings)"
            )
        length = min(length, longest)
    return length


class SafetensorsSource(TensorSource):
    """A folder as ``save_pretrained`` writes it.

    Raises:
        CheckpointError: where it is none, it has weights in other formats only, or a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = self.tokenizer_from = model_folder(path)
        self.config = load_config(path)
        self._entries: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
        self._from_end: dict[str, tuple[int, int]] = {}  # where a tensor's bytes are, counted from the file's end
        for file in self._files():
            header = read_header(self._folder / file)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                self._from_end[name] = (start - end, stop - start)
                self._entries[name] = (file, tuple(entry["shape"]), _dtype(name, entry["dtype"]))
        self.names = tuple(self._entries)

    def _files(self) -> list[str]:
        index = self._folder / _INDEX
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{str(index)!r} is damaged: {error}") from error
            missing = [file for file in files if not (self._folder / file).is_file()]
            if missing:
                raise CheckpointError(f"{str(self._folder)!r} is incomplete: {missing[0]} is missing")
            return files
        if (self._folder / _SINGLE).is_file():
            return [_SINGLE]
        found = sorted(file.name for file in self._folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        holds = f"it holds {found[0]}" if found else "it holds none"
        raise CheckpointError(
            f"{str(self._folder)!r} has no weights as safetensors ({holds}): allowed are {_SINGLE}, shards with "
            f"{_INDEX}, or the path of a .gguf file"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1]

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name)[2]

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], torch.dtype]:
        if name not in self._entries:
            raise CheckpointError(f"{str(self.path)!r} holds no tensor {name}")
        return self._entries[name]

    def _read(self, name: str, rows: slice | None) -> Tensor:
        file = self._folder / self._entries[name][0]
        try:
            with safe_open(file, framework="pt") as opened:
                mapped: Tensor = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
                # What comes is a view of the file in memory, which would keep all of it.
                return mapped.clone()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{str(file)!r} is damaged: {error}") from error

    def _sample(self, name: str) -> bytes:
        file = self._folder / self._entry(name)[0]
        start, size = self._from_end[name]
        pieces = []
        try:
            with file.open("rb") as opened:
                begin = opened.seek(0, os.SEEK_END) + start
                for place in sample_places(size):
                    opened.seek(begin + place.start)
                    pieces.append(opened.read(place.stop - place.start))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{str(file)!r} is damaged: {error}") from error
        return b"".join(pieces)


def read_header(file: Path) -> dict[str, Any]:
    """What a safetensors file says of each of its tensors: ``dtype``, ``shape`` and ``data_offsets``.

    Raises:
        CheckpointError: where it is damaged.
    """
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if lacks := [part for part in ("dtype", "shape", "data_offsets") if part not in entry]:
                    raise ValueError(f"its header does not say the {lacks[0]} of the tensor {name}")
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if file.stat().st_size != 8 + length + end:
                raise ValueError(f"it has {file.stat().st_size} bytes instead of {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {error}") from error
    return header


def _dtype(name: str, code: str) -> torch.dtype:
    if code not in _DTYPES:
        raise CheckpointError(
            f"the tensor {name} has values of an unknown kind, {code}: known are {', '.join(_DTYPES)}"
        )
    return _DTYPES[code]
