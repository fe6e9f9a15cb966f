"""The tensors of a safetensors file as views of the mapped file.

As ``safetensors.torch`` does it, except that nothing stays behind: version 0.8 keeps 64 bytes of every tensor that it
hands out, for good, which a server that loads adapters day after day cannot have.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name; they keep the mapping alive, and what is written to them stays in this process.

    Tensors of a dtype that PyTorch has not are left out.

    Raises:
        OSError: where it cannot be read. SafetensorError: where it is damaged or truncated.
    """
    with safe_open(path, framework="pt") as file:  # checks header and sizes
        file.keys()
    with path.open("rb") as raw:
        start = 8 + int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(start - 8))
        memory = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
    header.pop("__metadata__", None)
    tensors = {}
    for name, told in header.items():
        if told["dtype"] in _DTYPES:
            shape, dtype, count = told["shape"], _DTYPES[told["dtype"]], math.prod(told["shape"])
            at = start + told["data_offsets"][0]
            flat = (
                torch.frombuffer(memory, dtype=dtype, count=count, offset=at) if count else torch.empty(0, dtype=dtype)
            )
            tensors[name] = flat.view(shape)
    return tensors
