"""Block sizes of the two matmul kernels: what is tried, and when. Importing this needs Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.testing
from triton import Config
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moesaic.experts.triton import kernels

# Whether the kernels were made for Triton's interpreter, which runs them with numpy: TRITON_INTERPRET=1.
INTERPRETED = not isinstance(kernels.grouped_matmul_kernel, JITFunction)


def _config(row: int, depth: int, out: int, warps: int, stages: int, programs: int, **more: int) -> Config:
    blocks = {"BLOCK_ROW": row, "BLOCK_IN": depth, "BLOCK_OUT": out, "PROGRAMS": programs, **more}
    return Config(blocks, num_warps=warps, num_stages=stages)


# By bytes of an element. PROGRAMS is how many programs a multiprocessor is given. Few rows are bound by the reading of
# weights: small tiles, many of them under way. Many rows are bound by arithmetic: tiles as large as the registers
# allow, smaller ones in float32, whose exact products run on the ordinary units.
MATMUL_CONFIGS = {
    2: [
        _config(16, 128, 32, 4, 4, 4, GROUP=1),
        _config(16, 128, 64, 4, 4, 2, GROUP=1),
        _config(16, 64, 128, 4, 4, 2, GROUP=1),
        _config(32, 64, 64, 4, 4, 2, GROUP=8),
        _config(32, 64, 128, 4, 4, 2, GROUP=8),
        _config(64, 64, 64, 4, 4, 2, GROUP=8),
        _config(64, 64, 128, 4, 4, 1, GROUP=8),
        _config(64, 64, 256, 8, 3, 1, GROUP=8),
        _config(128, 64, 128, 8, 3, 1, GROUP=8),
        _config(128, 64, 256, 8, 3, 1, GROUP=8),
    ],
    4: [
        _config(16, 32, 64, 4, 3, 2, GROUP=1),
        _config(32, 32, 64, 4, 3, 2, GROUP=8),
        _config(64, 32, 64, 8, 3, 1, GROUP=8),
    ],
}
# Triton spends two stages of its pipeline on each step here, since where to read the rows is read first.
OUTER_CONFIGS = {
    2: [
        _config(32, 64, 64, 4, 7, 2),
        _config(32, 128, 128, 8, 7, 1),
        _config(64, 64, 128, 4, 5, 1),
        _config(64, 128, 128, 8, 5, 1),
        _config(64, 128, 256, 8, 5, 1),
    ],
    4: [
        _config(32, 32, 64, 4, 5, 2),
        _config(32, 64, 64, 8, 5, 1),
    ],
}


@dataclass(frozen=True)
class Limits:
    """What a GPU allows: bytes of shared memory for a program, and its major compute capability."""

    shared: int
    major: int

    def buffers(self, stages: int) -> int:
        """From 9 on (Hopper) the matmul units read shared memory themselves, which holds one buffer more for it."""
        return stages if self.major >= 9 else stages - 1


def matmul_candidates(configs: list[Config], itemsize: int, limits: Limits, rows: int, gated: bool) -> list[Config]:
    """What is tried for a grouped matmul.

    Args:
        configs: those for an element of ``itemsize`` bytes.
        rows: of an average expert: the height of a tile goes with it.
        gated: whether two columns of weights are multiplied at once.
    """
    heights = range(min(64, max(16, rows // 2)), max(16, 2 * rows) + 1)

    def fits(config: Config) -> bool:
        row, depth, out, stages = _sizes(config)
        if gated and row * out >= 128 * 256:
            return False  # two accumulators of this size do not fit into the registers
        shared = limits.buffers(stages) * depth * (row + out * (1 + gated)) * itemsize
        return row in heights and shared <= limits.shared

    return [config for config in configs if fits(config)]


def outer_candidates(configs: list[Config], itemsize: int, limits: Limits) -> list[Config]:
    """What is tried for a grouped outer product; arguments as for :func:`matmul_candidates`."""

    def fits(config: Config) -> bool:
        row, depth, out, stages = _sizes(config)
        slots = stages * row * 8
        steps = limits.buffers((stages + 1) // 2)
        return steps * row * (depth + out) * itemsize + slots <= limits.shared

    return [config for config in configs if fits(config)]


def _sizes(config: Config) -> tuple[int, int, int, int]:
    row, depth, out = (int(config.kwargs[name]) for name in ("BLOCK_ROW", "BLOCK_IN", "BLOCK_OUT"))
    return row, depth, out, int(config.num_stages)


def _limits(named: dict[str, Any]) -> Limits:
    device = named["a_ptr"].device
    shared = driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return Limits(shared, torch.cuda.get_device_properties(device).major)


def _prune_matmul(configs: list[Config], named: dict[str, Any], **meta: Any) -> list[Config]:
    itemsize = named["a_ptr"].element_size()
    return matmul_candidates(configs, itemsize, _limits(named), named["rows_bucket"], meta["GATED"])


def _prune_outer(configs: list[Config], named: dict[str, Any], **meta: Any) -> list[Config]:
    return outer_candidates(configs, named["a_ptr"].element_size(), _limits(named))


def _time(call: Callable[[], object], quantiles: tuple[float, ...]) -> Any:
    # Milliseconds; Triton's own 125 a candidate would make the first call of each shape take a second.
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _tuned(kernel: Any, configs: list[Config], key: list[str], prune: Callable[..., Any]) -> Any:
    decorate = triton.autotune(
        configs, key, prune_configs_by={"early_config_prune": prune}, do_bench=_time, cache_results=True
    )
    return decorate(kernel)


if INTERPRETED:  # no driver that could time anything; tiles small enough for small inputs to have several
    MATMUL_CONFIGS = {itemsize: [_config(16, 32, 32, 4, 1, 1, GROUP=2)] for itemsize in (2, 4)}
    OUTER_CONFIGS = {itemsize: [_config(16, 32, 32, 4, 1, 1)] for itemsize in (2, 4)}

# The kernels that pick their block sizes at the first call of each key, by bytes of an element; the picks are kept in
# Triton's cache on disk.
MATMUL = {
    itemsize: _tuned(
        kernels.grouped_matmul_kernel,
        configs,
        ["rows_bucket", "E", "IN", "OUT", "GATHER", "SCATTER", "GATED", "stride_w_in"],
        _prune_matmul,
    )
    for itemsize, configs in MATMUL_CONFIGS.items()
}
OUTER = {
    itemsize: _tuned(
        kernels.grouped_outer_kernel,
        configs,
        ["rows_bucket", "E", "IN", "OUT", "GATHER_A", "stride_out_in"],
        _prune_outer,
    )
    for itemsize, configs in OUTER_CONFIGS.items()
}
