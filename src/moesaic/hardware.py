"""What this machine is and how fast it is: the limits that every choice of kernel and every quoted speed is held to."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

PACKAGES = [
    "moesaic",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "triton",
]
# Features of a CPU that some kernel for experts can use; Linux names them alike in /proc/cpuinfo.
_FEATURES = [
    *["avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"],
    *["avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"],
    *["asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme"],
]


@dataclass(frozen=True)
class Cpu:
    """The processor as this process may use it.

    Attributes:
        model: its name.
        architecture: ``"x86_64"``, ``"aarch64"``, ...
        cores: logical cores that this process may run on: affinity and the container's quota are counted in.
        threads: threads that PyTorch uses inside one operation.
        features: the instruction sets that kernels for experts care about; empty where the system does not tell.
        capability: the level that PyTorch's own kernels were chosen for, such as ``"AVX512"``.
    """

    model: str
    architecture: str
    cores: int
    threads: int
    features: list[str]
    capability: str


@dataclass(frozen=True)
class Device:
    """A device that PyTorch can compute on. ``memory`` is in bytes; for the CPU it is what a container allows."""

    device: str
    name: str
    memory: int


@dataclass(frozen=True)
class Speed:
    """Measured limits of one device.

    Attributes:
        device: as PyTorch names it.
        read_bytes_per_second: see :func:`read_bandwidth`; of a CPU by the native kernels, where they are there.
        matmul_flop_per_second: for each dtype, see :func:`matmul_rate`.
    """

    device: str
    read_bytes_per_second: float
    matmul_flop_per_second: dict[str, float]


def versions() -> dict[str, str | None]:
    """Version of Python and of each package that matters to a result; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu() -> Cpu:
    """Describe the processor."""
    told = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", told, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", told, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return Cpu(
        model=model[1].strip() if model else platform.processor() or "unknown",
        architecture=platform.machine(),
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        features=[name for name in _FEATURES if name in present],
        capability=torch.backends.cpu.get_cpu_capability(),
    )


def devices() -> list[Device]:
    """The CPU, and every accelerator that this PyTorch can use."""
    found = [Device("cpu", cpu().model, _usable_memory())]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Device(f"cuda:{index}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU", torch.mps.recommended_max_memory()))
    return found


def measure(device: str, read: Callable[[], float] | None = None) -> Speed:
    """Measure one device; takes about two seconds, and wants the machine otherwise idle.

    Args:
        read: measures bytes per second of reading memory, where there is something faster than :func:`read_bandwidth`.
    """
    rates = {str(dtype).removeprefix("torch."): matmul_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return Speed(device, read() if read else read_bandwidth(device), rates)


def read_bandwidth(device: str = "cpu", num_bytes: int = 1 << 29, seconds: float = 0.5) -> float:
    """Bytes per second of reading memory front to back, as PyTorch reaches it.

    The sum of an int64 tensor larger than the caches, on all of PyTorch's threads: of its reductions the one with the
    least arithmetic a byte. It is a lower bound of what the memory can deliver, because a hand-written loop may read
    faster still.

    Args:
        device: as PyTorch names it.
        num_bytes: size of the tensor; must exceed the caches for the memory to be what is measured.
        seconds: how long to repeat.
    """
    values_N = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    return values_N.nbytes / typical_time(lambda: values_N.sum(), device, seconds)


def matmul_rate(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.5) -> float:
    """Floating-point operations per second of a large square matrix product (a multiply and an add count as two).

    The size doubles from 256 while one product fits well into ``seconds``, up to 2048 on a CPU and 8192 on an
    accelerator: a CPU without instructions for bfloat16 needs a hundred times as long as one with them.
    """
    size, largest = 256, 2048 if device == "cpu" else 8192
    while True:
        product = _product(size, dtype, device)
        once = typical_time(product, device, 0)
        if size == largest or once * 8 * 2 > seconds:
            return 2 * size**3 / typical_time(product, device, seconds)
        size *= 2


def _product(size: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    # A generator of its own: when something is measured must not show in the numbers that a model draws.
    dice = torch.Generator(device).manual_seed(0)
    a_NN = torch.randn(size, size, device=device, generator=dice).to(dtype)
    b_NN = torch.randn(size, size, device=device, generator=dice).to(dtype)
    return lambda: a_NN @ b_NN


def typical_time(work: Callable[[], object], device: str, seconds: float) -> float:
    """The time that the fastest quarter of the repetitions stays within, over ``seconds`` and at least two of them.

    What disturbs a measurement makes it slower, so the median says too little; the very best may be a clock's hiccup.
    """
    synchronize = _synchronizer(device)
    times: list[float] = []
    work()
    synchronize()
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 4]


def _synchronizer(device: str) -> Callable[[], object]:
    if device == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(torch.device(device))


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def _usable_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(allowed)) if allowed.isdigit() else total


def _read(path: str) -> str:
    """A file of the system's, or nothing where this system has no such file."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
