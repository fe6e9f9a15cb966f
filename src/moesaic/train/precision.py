"""Where and in which precision a model is trained and measured."""

from __future__ import annotations

import torch

from moesaic import hardware
from moesaic.errors import ConfigError

PRECISIONS = ("fp32", "bf16")
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # features as Linux names them; the last one is of aarch64


def choose_device(wanted: str) -> torch.device:
    """``"auto"``, ``"cpu"`` or ``"cuda"`` to a device; raises :class:`ConfigError` for a GPU that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is 'cuda', but PyTorch finds no CUDA GPU here: use 'cpu' or 'auto'")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> str:
    """``"auto"`` to ``"bf16"`` where the hardware multiplies bf16, else ``"fp32"``; the others as they are."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _BF16 & set(hardware.cpu().features) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which a forward pass runs in ``precision``; raises :class:`ConfigError` for an unknown one."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}: it must be one of {', '.join(PRECISIONS)}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
