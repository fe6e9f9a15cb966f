from __future__ import annotations

import json

import pytest

from moesaic import experts, hardware
from moesaic.cli.main import run
from moesaic.hardware import Speed


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds and backends with known values: the measuring itself is tested with the hardware."""
    monkeypatch.setattr(hardware, "measure", lambda device: Speed(device, 41e9, {"float32": 1e11, "bfloat16": 4.53e11}))
    monkeypatch.setattr(experts, "status", lambda: {"loop": None, "triton": "there is no [CUDA] device"})


def test_doctor_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    for told in ["torch", "PyTorch kernels", "41.0 GB/s", "453 GFLOP/s", "not here: there is no [CUDA] device"]:
        assert told in printed


def test_doctor_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"] == hardware.versions()
    assert told["cpu"]["cores"] >= 1
    assert told["devices"][0]["device"] == "cpu"
    assert told["measured"][0] == {
        "device": "cpu",
        "read_bytes_per_second": 41e9,
        "matmul_flop_per_second": {"float32": 1e11, "bfloat16": 4.53e11},
    }
    assert told["backends"] == {
        "loop": {"available": True, "reason": None},
        "triton": {"available": False, "reason": "there is no [CUDA] device"},
    }
