"""The tensors of a GGUF file, dequantized one at a time, with transformers' names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import logging

from moesaic.convert.source import TensorSource, sample_places
from moesaic.errors import CheckpointError, MissingDependencyError, UnsupportedError

_VALUES_AT_ONCE = 1 << 18
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""GGUF's own names; a Mistral is a ``llama`` there."""
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufSource(TensorSource):
    """A ``.gguf`` file of a dense model of :data:`ARCHITECTURES`; all values are float32.

    Names and, for ``llama``, the order of the rows of queries and keys (GGUF interleaves the two halves that RoPE
    turns) are undone as transformers' own reader of GGUF does it, which would hold the whole model.

    Raises:
        CheckpointError: where the file is missing or damaged.
        MissingDependencyError: where ``gguf`` is not installed.
        UnsupportedError: for another architecture, a mixture of experts, rescaled rotary frequencies, which a
            configuration cannot take over from GGUF, or values of a kind that ``gguf`` cannot dequantize.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise MissingDependencyError(
                "reading a .gguf file needs the package gguf: pip install 'moesaic[gguf]'"
            ) from error
        self.path = self.tokenizer_from = path
        if not path.is_file():
            raise CheckpointError(
                f"there is no file at {str(path)!r}: give a folder with a config.json or a .gguf file"
            )
        try:
            reader = GGUFReader(path)
            self._architecture = str(reader.fields["general.architecture"].contents())
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{str(path)!r} is no sound GGUF file, it is damaged or ends too early: {error}"
            ) from error
        self._check(reader)
        self.config = _config(path)
        # transformers does not read it for every architecture.
        head_dim = self._told(reader, "attention.key_length")
        self.config.head_dim = int(head_dim or self.config.hidden_size // self.config.num_attention_heads)
        self._tensors: dict[str, Any] = {}
        for tensor in reader.tensors:
            if (name := transformers_name(tensor.name)) is not None:
                self._tensors[name] = tensor
        self.names = tuple(self._tensors)
        of_each_kind = {tensor.tensor_type: name for name, tensor in self._tensors.items()}
        for name in of_each_kind.values():
            self._dequantized(name, self._tensors[name].data[:1])  # refuses what gguf cannot read, now

    def _check(self, reader: Any) -> None:
        where = f"the GGUF file {str(self.path)!r}"
        if self._architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"{where} holds a {self._architecture!r}: supported are {', '.join(ARCHITECTURES)} (Mistral is a llama)"
            )
        stored = {tensor.name for tensor in reader.tensors}
        if any("_exps." in name or "ffn_gate_inp" in name for name in stored):
            raise UnsupportedError(f"{where} is a mixture of experts: give its safetensors folder to --method prune")
        if any(name.startswith("rope_factors") or name == "rope_freqs.weight" for name in stored):
            raise UnsupportedError(f"{where} has rescaled rotary frequencies: give the model's safetensors folder")
        if (scaling := self._rope_scaling(reader)) != "none":
            raise UnsupportedError(
                f"{where} has rescaled rotary frequencies (rope.scaling.type {scaling}): give the model's safetensors "
                "folder"
            )
        nameless = [name for name in sorted(stored) if transformers_name(name) is None]
        if nameless:
            raise UnsupportedError(f"{where} holds {nameless[0]}, which no {self._architecture} that is supported has")

    def _told(self, reader: Any, name: str) -> Any:
        field = reader.fields.get(f"{self._architecture}.{name}")
        return None if field is None else field.contents()

    def _rope_scaling(self, reader: Any) -> str:
        """What llama.cpp would take it for: a factor without a type is linear scaling."""
        kind = self._told(reader, "rope.scaling.type")
        if kind is not None:
            return str(kind)
        factors = [self._told(reader, name) for name in ("rope.scaling.factor", "rope.scale_linear")]
        return "linear" if any(factor not in (None, 0, 1) for factor in factors) else "none"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def dtype(self, name: str) -> torch.dtype:
        self._tensor(name)
        return torch.float32

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise CheckpointError(f"{str(self.path)!r} holds no tensor {name}")
        return self._tensors[name]

    def _read(self, name: str, rows: slice | None) -> Tensor:
        stored = self._tensors[name]
        if len(self.shape(name)) < 2:
            whole = self._dequantized(name, stored.data)
            return (whole if rows is None else whole[rows]).clone()
        stored_rows = self._stored_rows(name)[rows or slice(None)]
        tensor = torch.empty(len(stored_rows), *self.shape(name)[1:])
        # gguf makes the values of all rows that it is given twice over.
        for start in range(0, len(stored_rows), step := max(1, _VALUES_AT_ONCE // self.shape(name)[1])):
            place = slice(start, start + step)
            tensor[place] = self._dequantized(name, stored.data[stored_rows[place]])
        return tensor

    def _dequantized(self, name: str, data: Any) -> Tensor:
        from gguf import dequantize

        kind = self._tensors[name].tensor_type
        try:
            return torch.from_numpy(np.array(dequantize(np.asarray(data), kind), dtype=np.float32))
        except NotImplementedError as error:
            raise UnsupportedError(
                f"the GGUF file {str(self.path)!r} holds {name} as {kind.name}, which the package gguf cannot read"
            ) from error

    def _stored_rows(self, name: str) -> Any:
        """Which stored row each row of the tensor is."""
        rows = np.arange(self.shape(name)[0])
        heads = self._interleaved_heads(name)
        # Stored are [heads, half, 2], wanted [heads, 2, half].
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1) if heads else rows

    def _sample(self, name: str) -> bytes:
        stored = self._tensor(name).data.reshape(-1).view(np.uint8)
        return b"".join(stored[place].tobytes() for place in sample_places(stored.size))

    def _interleaved_heads(self, name: str) -> int:
        if self._architecture != "llama":
            return 0
        if ".q_proj." in name:
            return int(self.config.num_attention_heads)
        return int(self.config.num_key_value_heads) if ".k_proj." in name else 0


def transformers_name(name: str) -> str | None:
    """transformers' name of a tensor that GGUF calls ``name``; None where it has none."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    if (found := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) and found[2] in _INSIDE:
        return f"model.layers.{found[1]}.{_INSIDE[found[2]]}.{kind}"
    return None


def _config(path: Path) -> Any:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(path.absolute().parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the configuration in {str(path)!r} cannot be read: {said}") from error
    finally:
        logging.set_verbosity(before)
    config.__dict__.pop("quantization_config", None)  # what is read here is not quantized any more
    return config
