"""The Triton backend: its numbers (``triton_numbers.py``), its machine code for GPUs that are not here, refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic import Routing
from moesaic.dispatch import Dispatch
from moesaic.errors import ConfigError
from moesaic.experts import ACTIVATIONS, BACKENDS, ExpertWeights, QuantFormat, status, triton, use_backend

HAS_GPU = torch.cuda.is_available()
NUMBERS = Path(__file__).with_name("triton_numbers.py")


@pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_numbers(part: str) -> None:
    # The interpreter of Triton 3.6 does not run with numpy 2.4.
    pytest.importorskip("triton", minversion=None if HAS_GPU else "3.7")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if not HAS_GPU:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", part, str(NUMBERS)]
    told = subprocess.run(command, env=environment, cwd=NUMBERS.parents[2], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-2000:]


# ------------------------------------------------------------------------------------------------- compiled, not run

# Bytes of shared memory that a program may have, from the CUDA programming guide's table of compute capabilities.
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


class FakeDriver:
    """What Triton asks about the GPU that it compiles for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils: Any = None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # the kernels that were compiled are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Compiler:
    """Stands in for a kernel and compiles what it is launched with, by Triton's own rules, instead of running it.

    ``choose`` picks among the block sizes that the tuning would try on this GPU.
    """

    kernel: Any
    capability: int
    choose: Callable[[list[Any]], list[Any]] = lambda configs: configs
    tuned: bool = False
    compiled: list[Any] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **meta: Any) -> None:
            for config in self.configs(args, meta):
                blocks = config.all_kwargs() if config else {}
                programs = grid(blocks) if callable(grid) else grid
                assert all(number >= 1 for number in programs)
                self.compiled.append(self.kernel.warmup(*args, grid=programs, **meta, **blocks))

        return launch

    def configs(self, args: tuple[Any, ...], meta: dict[str, Any]) -> list[Any]:
        from moesaic.experts.triton import tuning

        if not self.tuned:
            return [None]
        itemsize, limits = args[0].element_size(), tuning.Limits(SHARED[self.capability], self.capability // 10)
        if "SCATTER" not in meta:
            return self.choose(tuning.outer_candidates(tuning.OUTER_CONFIGS[itemsize], itemsize, limits))
        found: list[Any] = []
        for rows in (1, 16, 32, 64, 1024):
            every = tuning.MATMUL_CONFIGS[itemsize]
            tried = tuning.matmul_candidates(every, itemsize, limits, rows, meta["GATED"])
            assert tried, f"nothing to try at {rows} rows an expert"
            found += [config for config in tried if config not in found]
        return self.choose(found)


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Any]]:
    """A function that runs a training step and an inference step on a GPU that is not there; returns the kernels."""
    pytest.importorskip("triton")
    from triton.runtime import driver

    from moesaic.experts.triton import kernels, launch, tuning

    if tuning.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 100)

    def compile_steps(capability: int, choose: Callable[[list[Any]], list[Any]], **step: Any) -> list[Any]:
        monkeypatch.setattr(driver, "_active", FakeDriver(capability))
        stand_ins = []
        for tuners in (tuning.MATMUL, tuning.OUTER):
            for itemsize, tuner in tuners.items():
                stand_ins.append(Compiler(tuner.fn, capability, choose, tuned=True))
                monkeypatch.setitem(tuners, itemsize, stand_ins[-1])
        for name in ("sum_slots_kernel", "weigh_rows_kernel", "sum_rows_kernel"):
            stand_ins.append(Compiler(getattr(kernels, name), capability))
            monkeypatch.setattr(kernels, name, stand_ins[-1])
        take_steps(**step)
        return [kernel for stand_in in stand_ins for kernel in stand_in.compiled]

    return compile_steps


def take_steps(
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "swiglu",
    transposed: bool = False,
    bias: bool = False,
    d_model: int = 256,
    d_ff: int = 192,
) -> None:
    """Forward and backward, and forward without gradients; what the kernels leave in memory is not looked at."""
    weights_TK = torch.rand(5, 2, requires_grad=True)
    ids = torch.tensor([[0, 1], [2, 0], [3, 1], [0, 3], [2, 1]])
    dispatch = Dispatch.from_routing(Routing(ids, weights_TK, torch.zeros(5, 3)))
    act = ACTIVATIONS.get(activation)
    width = 2 * d_ff if act.gated else d_ff
    shapes = {"up": (3, width, d_model), "down": (3, d_model, d_ff)}
    if transposed:
        shapes = {"up": (3, d_model, width), "down": (3, d_ff, d_model)}
    if bias:
        shapes |= {"up_bias": (3, width), "down_bias": (3, d_model)}
    tensors: dict[str, Any] = {name: torch.zeros(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    weights = ExpertWeights(**tensors, activation=act, transposed=transposed)
    x_TD = torch.zeros(5, d_model, dtype=dtype, requires_grad=True)
    backend = BACKENDS.get("triton")
    backend.run(x_TD, dispatch, weights).backward(torch.zeros(5, d_model, dtype=dtype))
    with torch.no_grad():
        backend.run(x_TD, dispatch, weights)


def check_machine_code(kernel: Any, capability: int, itemsize: int) -> None:
    code = kernel.asm["ptx"]
    assert f".target sm_{capability}" in code
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED[capability]
    if kernel.metadata.name.startswith("grouped") and itemsize == 2:
        units = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
        assert any(unit in code for unit in units), "products that are not computed by the matmul units"


class EachInTurn:
    """One of the candidates for each launch, another one every time."""

    def __init__(self) -> None:
        self.turn = 0

    def __call__(self, configs: list[Any]) -> list[Any]:
        self.turn += 1
        return [configs[self.turn % len(configs)]]


STEPS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16, the other layout, biases": {"dtype": torch.float16, "transposed": True, "bias": True, "activation": "geglu"},
    "fp32, odd sizes": {"dtype": torch.float32, "activation": "gelu_tanh", "d_model": 37, "d_ff": 51},
}


@pytest.mark.parametrize("capability", [80, 90])
def test_operands_are_copied_while_products_are_computed(
    compile_for: Callable[..., list[Any]], capability: int
) -> None:
    """16 bytes at a time where sizes allow it, gathered or not: a mask or offset written otherwise can lose that."""
    kernels = compile_for(capability, EachInTurn(), d_ff=256)
    grouped = [kernel for kernel in kernels if kernel.metadata.name.startswith("grouped")]
    assert len(grouped) == 4 + 2 + 2  # the matmuls of training, its outer products, the matmuls of inference
    for kernel in grouped:
        check_machine_code(kernel, capability, 2)
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+),", kernel.asm["ptx"])
        assert copies.count("0x10") >= 4
        assert set(copies) <= {"0x10", "0x8"}  # 8 bytes: the slot of a row


STEPS: dict[str, dict[str, Any]] = {
    "fp16, the other layout, biases": {"dtype": torch.float16, "transposed": True, "bias": True, "activation": "geglu"},
    "fp32, odd sizes": {"dtype": torch.float32, "activation": "gelu_tanh", "d_model": 37, "d_ff": 51},
    "bf16": {},
}


@pytest.mark.parametrize(("name", "capability"), list(zip(STEPS, (80, 90), strict=False)))
def test_compiles_for_gpus_that_are_not_here(compile_for: Callable[..., list[Any]], name: str, capability: int) -> None:
    step = STEPS[name]
    kernels = compile_for(capability, EachInTurn(), **step)
    names = {kernel.metadata.name for kernel in kernels}
    assert {"grouped_matmul_kernel", "grouped_outer_kernel", "sum_slots_kernel", "weigh_rows_kernel"} <= names
    assert ("sum_rows_kernel" in names) == step.get("bias", False)
    for kernel in kernels:
        check_machine_code(kernel, capability, step["dtype"].itemsize)


@pytest.mark.slow
@pytest.mark.parametrize("capability", sorted(SHARED))
@pytest.mark.parametrize("name", STEPS)
def test_every_block_size_compiles(compile_for: Callable[..., list[Any]], name: str, capability: int) -> None:
    step = STEPS[name]
    for kernel in compile_for(capability, lambda configs: configs, **step):
        check_machine_code(kernel, capability, step.get("dtype", torch.bfloat16).itemsize)


class Recorder:
    """Stands in for a kernel under the tuning and notes the block sizes of each launch."""

    def __init__(self, kernel: Any) -> None:
        self.fn = kernel
        self.launches: list[tuple[int, ...]] = []

    def run(self, *args: Any, grid: Any, warmup: bool, **meta: Any) -> None:
        assert grid(meta)[0] >= 1 and not warmup
        self.launches.append((meta["BLOCK_ROW"], meta["BLOCK_IN"], meta["BLOCK_OUT"]))


def test_block_sizes_are_tuned_once_for_a_bucket_of_rows(
    compile_for: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import driver

    from moesaic.experts.triton import launch, tuning

    fake, tuner = FakeDriver(90), tuning.MATMUL[2]
    recorder = Recorder(tuner.fn)
    fake.utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": SHARED[90]})
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    monkeypatch.setattr(tuner, "fn", recorder)
    monkeypatch.setattr(tuner, "cache", {})
    times = iter([5.0, 3.0, 4.0, *[6.0] * 20])
    monkeypatch.setattr(tuner, "do_bench", lambda run, quantiles: [run(), next(times)][1:], raising=False)

    def multiply(rows: int) -> None:
        order = torch.arange(rows), torch.arange(rows).view(-1, 1), torch.tensor([rows // 2, rows], dtype=torch.int32)
        x_TD, w_EDG = torch.zeros(rows, 64).bfloat16(), torch.zeros(2, 64, 64).bfloat16()
        launch.matmul(x_TD, w_EDG, None, *order, None, True, False, "swiglu")

    multiply(200)  # 100 rows an expert: the bucket of 128
    tried = recorder.launches[:-1]
    assert len(set(tried)) == len(tried) > 2
    assert {row for row, _, _ in tried} <= {64, 128}
    assert recorder.launches[-1] == tried[1]  # the fastest
    recorder.launches.clear()
    multiply(256)
    assert recorder.launches == [tried[1]]
    multiply(20)
    assert {row for row, _, _ in recorder.launches[1:]} == {16, 32}


# -------------------------------------------------------------------------------------------------------- refusals


def call(dtype: torch.dtype = torch.bfloat16, **more: Any) -> tuple[torch.Tensor, ExpertWeights]:
    up, down = torch.zeros(2, 8, 4, dtype=dtype), torch.zeros(2, 4, 4, dtype=dtype)
    return torch.zeros(3, 4, dtype=dtype), ExpertWeights(up, down, ACTIVATIONS.get("swiglu"), **more)


@pytest.fixture
def backend() -> triton.TritonBackend:
    return triton.TritonBackend()


class TestMissing:
    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton, "_INSTALLED", False)
        assert "pip install 'moesaic[triton]'" in (status()["triton"] or "")
        with pytest.raises(ConfigError, match="'triton' cannot be used here: Triton is not installed"):
            use_backend("triton")

    @pytest.mark.parametrize("hip", [None, "7.1"])
    def test_without_an_nvidia_gpu(self, monkeypatch: pytest.MonkeyPatch, hip: str | None) -> None:
        monkeypatch.setattr(triton, "_INSTALLED", True)
        monkeypatch.setattr(triton, "_INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: hip is not None)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert status()["triton"] == "there is no NVIDIA GPU that PyTorch can use"

    def test_in_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton, "_INSTALLED", True)
        monkeypatch.setattr(triton, "_INTERPRETED", True)
        assert status()["triton"] is None

    @pytest.mark.parametrize("value", ["0", "1"])
    def test_only_who_asks_for_the_interpreter_sees_it(self, value: str) -> None:
        """And then "auto" still takes another one: the interpreter is slower than anything else."""
        program = (
            "from tests.experts.test_triton import BACKENDS, call\n"
            "backend = BACKENDS.get('triton')\n"
            "print(backend.refusal(*call()) is None, backend.preference < 0)"
        )
        environment = os.environ | {"TRITON_INTERPRET": value, "CUDA_VISIBLE_DEVICES": ""}
        told = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=NUMBERS.parents[2], capture_output=True, text=True
        )
        assert told.stdout.split() == [str(value == "1")] * 2, told.stderr


class TestRefusal:
    @pytest.fixture(autouse=True)
    def interpreted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that a call on a CPU gets as far as the other reasons."""
        monkeypatch.setattr(triton, "_INSTALLED", True)
        monkeypatch.setattr(triton, "_INTERPRETED", True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_nothing_to_refuse(self, backend: triton.TritonBackend, dtype: torch.dtype) -> None:
        assert backend.refusal(*call(dtype)) is None

    def test_float64(self, backend: triton.TritonBackend) -> None:
        assert "not in torch.float64" in (backend.refusal(*call(torch.float64)) or "")

    def test_device(self, backend: triton.TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        x_TD, weights = call()
        assert backend.refusal(x_TD.to("meta"), weights) == "it computes on NVIDIA GPUs, and this call is on meta"
        monkeypatch.setattr(triton, "_INTERPRETED", False)
        assert backend.refusal(x_TD, weights) == "it computes on NVIDIA GPUs, and this call is on cpu"

    def test_norm_after_the_experts(self, backend: triton.TritonBackend) -> None:
        assert "no norm after the experts" in (backend.refusal(*call(post_norm=torch.nn.Identity())) or "")

    def test_quantized_weights(self, backend: triton.TritonBackend) -> None:
        x_TD, weights = call()
        codes = replace(weights, format=QuantFormat(8, 0))
        assert "the weights are int8 codes" in (backend.refusal(x_TD, codes) or "")
