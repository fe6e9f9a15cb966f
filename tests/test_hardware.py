from __future__ import annotations

import time

import pytest
import torch

from moesaic import hardware

X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_tile unheard_of\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\nCPU part\t: 0xd40\n"


def files(monkeypatch: pytest.MonkeyPatch, **content: str) -> None:
    """Let the module see a system with exactly these files; the keyword is the end of the path."""
    monkeypatch.setattr(
        hardware,
        "_read",
        lambda path: next((text for name, text in content.items() if path.endswith(name.replace("__", "."))), ""),
    )


def test_features_of_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, cpuinfo=X86)
    assert hardware.cpu().model == "Some CPU"
    assert hardware.cpu().features == ["avx2", "avx512f", "amx_tile"]


def test_features_of_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, cpuinfo=ARM)
    assert hardware.cpu().features == ["asimd", "i8mm", "bf16", "sve"]


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch)
    assert hardware.cpu().features == []
    assert hardware.cpu().model
    assert hardware.cpu().cores >= 1
    assert hardware.devices()[0].memory > 0


def test_a_container_limits_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hardware.devices()[0].memory
    files(monkeypatch, cpu__max="100000 100000\n", memory__max=f"{whole // 2}\n")
    assert hardware.cpu().cores == 1
    assert hardware.devices()[0].memory == whole // 2
    files(monkeypatch, cpu__max="max 100000\n", memory__max="max\n")
    assert hardware.devices()[0].memory >= whole


def test_versions_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "PACKAGES", ["torch", "a-package-that-nobody-wrote"])
    found = hardware.versions()
    assert found.pop("python")
    assert found == {"torch": torch.__version__, "a-package-that-nobody-wrote": None}


class Clock:
    """Time that passes only where the work says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def take(self, seconds: float) -> None:
        self.now += seconds


def test_disturbed_repetitions_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, durations = Clock(monkeypatch), iter([9.0, *[1.0, 1.0, 5.0, 5.0] * 3])
    assert hardware.typical_time(lambda: clock.take(next(durations)), "cpu", seconds=36.0) == 1.0


def test_rates_count_bytes_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "typical_time", lambda work, device, seconds: work() is not None and 0.01)
    assert hardware.read_bandwidth(num_bytes=1 << 20) == (1 << 20) / 0.01
    # 16 times this product would take longer than asked for, so its size does not grow.
    assert hardware.matmul_rate(torch.float32, seconds=0.1) == 2 * 256**3 / 0.01
    assert hardware.matmul_rate(torch.float32, seconds=0.2) == 2 * 2048**3 / 0.01


def test_another_way_of_reading_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "matmul_rate", lambda dtype, device: 2.0)
    assert hardware.measure("cpu", lambda: 3.0) == hardware.Speed("cpu", 3.0, {"float32": 2.0, "bfloat16": 2.0})


def test_a_real_measurement_is_positive() -> None:
    assert hardware.read_bandwidth(num_bytes=1 << 20, seconds=0) > 0
    assert hardware.matmul_rate(torch.bfloat16, seconds=0) > 0
