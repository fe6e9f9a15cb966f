from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moesaic import experts, hardware
from moesaic.cli.main import run
from moesaic.experts.native import library, limits
from moesaic.experts.native.limits import Native
from moesaic.hardware import Speed
from moesaic.parallel.choice import network
from moesaic.parallel.choice.links import Link, Links
from moesaic.parallel.choice.network import Network


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds and backends with known values: the measuring itself is tested with the hardware."""
    rates = {"float32": 1e11, "bfloat16": 4.53e11}
    monkeypatch.setattr(hardware, "measure", lambda device, read: Speed(device, read() if read else 9e9, rates))
    monkeypatch.setattr(experts, "status", lambda: {"loop": None, "triton": "there is no [CUDA] device"})
    monkeypatch.setattr(library, "missing", lambda: None)
    monkeypatch.setattr(limits, "read_bandwidth", lambda: 41e9)
    native = Native("avx2", ["avx512", "avx2"], True, {"float32": 2.27e11})
    monkeypatch.setattr(limits, "measure", lambda: native)


def test_doctor_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    for told in ["torch", "PyTorch kernels", "41.0 GB/s", "453 GFLOP/s", "not here: there is no [CUDA] device"]:
        assert told in printed
    for told in ["avx2 (this CPU also runs avx512)", "PyTorch's, by OpenMP", "227 GFLOP/s"]:
        assert told in printed


def test_doctor_without_native_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "missing", lambda: "there is no compiler")
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "9.0 GB/s" in printed and "Native kernels" not in printed
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["native"] is None


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
    assert told["native"] == {
        "isa": "avx2",
        "isas": ["avx512", "avx2"],
        "openmp": True,
        "multiply_add_flop_per_second": {"float32": 2.27e11},
    }
    assert told["backends"] == {
        "loop": {"available": True, "reason": None},
        "triton": {"available": False, "reason": "there is no [CUDA] device"},
    }


def test_the_network_of_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--network"]) == 0
    assert "torchrun --nproc-per-node N -m moesaic doctor --network" in capsys.readouterr().out


NETWORK = Network(0, 4, 2, 2, Links(Link(1e-4, 2e-10, 1e-10), Link(5e-4, 8e-9, 4e-9), cpu=3e-10), True, True)


def test_the_network_of_several_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(network, "measure_job", lambda: NETWORK)
    assert run(["doctor", "--network"]) == 0
    printed = capsys.readouterr().out
    for told in [
        "4 ranks on 2 hosts",
        "inside a host",
        "100 us",
        "5.00 GB/s",
        "10.00 GB/s",
        "between hosts",
        "8.00 ns",
    ]:
        assert told in printed
    assert run(["doctor", "--network", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["between"] == {"alpha": 5e-4, "beta": 8e-9, "shared": 4e-9} and told["ranks"] == 4
    monkeypatch.setattr(network, "measure_job", lambda: replace(NETWORK, rank=1))
    assert run(["doctor", "--network"]) == 0
    assert capsys.readouterr().out == ""
