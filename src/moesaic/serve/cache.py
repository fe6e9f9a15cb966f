"""The memory of the KV cache: a pool of pages for each attention layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.serve.model import KVShape

_SHARE = 4  # of the free memory, where nobody says how much


def num_pages(
    layers: Mapping[nn.Module, KVShape], page_size: int, kv_bytes: int | None, max_batch: int, context: int
) -> int:
    """How many pages the cache has.

    Args:
        kv_bytes: of all layers' pages; None: a quarter of the free memory, but not more than ``max_batch`` requests of
            ``context`` tokens need.

    Raises:
        ConfigError: where there is not room for a page.
    """
    page_bytes = page_size * sum(shape.token_bytes for shape in layers.values())
    if kv_bytes is None:
        device = next(iter(layers.values())).device
        pages = min(free_memory(device) // _SHARE // page_bytes, max_batch * -(-context // page_size))
    else:
        pages = kv_bytes // page_bytes
    if pages < 1:
        given = "a quarter of the free memory" if kv_bytes is None else f"kv_bytes = {kv_bytes}"
        raise ConfigError(f"{given} does not hold a page of the KV cache, which has {page_bytes} bytes")
    return pages


def make_pools(
    layers: Mapping[nn.Module, KVShape], pages: int, page_size: int
) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Key pool ``[pages, heads, dk, page_size]`` and value pool ``[pages, heads, page_size, dv]`` of each layer.

    On a CPU the system commits their memory as it is written.
    """
    pools = {}
    for module, shape in layers.items():
        keys = torch.empty(pages, shape.heads, shape.dk, page_size, dtype=shape.dtype, device=shape.device)
        values = torch.empty(pages, shape.heads, page_size, shape.dv, dtype=shape.dtype, device=shape.device)
        pools[module] = keys, values
    return pools


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated, as the driver tells, or the system and the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    free = int(told["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in told else 1 << 30
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    return min(free, max(0, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else free


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
