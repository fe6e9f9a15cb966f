"""Rows of expert layers: who takes part, and what is told about each."""

from __future__ import annotations

import stat
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.bench import Plan, Row, Shape, Workload, experts, field, measure
from moesaic.bench.contenders import ModuleContender, make_ours
from moesaic.bench.llama import LlamaContender
from moesaic.bench.workload import Call, make_banks, make_calls
from moesaic.errors import ConfigError, MoesaicError, UnsupportedError
from moesaic.experts import current_backend

TINY = Shape(4, 2, 64, 32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that take no time."""
    rates = {"read": lambda: 1e9, "registers": lambda: 2e9, "matmul": lambda: 1e9}
    monkeypatch.setattr(experts, "limits", lambda banks, dtype: rates)


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESAIC_VLLM_CPU", raising=False)
    monkeypatch.delenv("MOESAIC_LLAMA_PYTHON", raising=False)
    monkeypatch.setattr("moesaic.bench.vllm.util.find_spec", lambda name: None)
    monkeypatch.setattr("moesaic.bench.llama.util.find_spec", lambda name: None)


def one_row(work: Workload, ours: list[str], against: list[str]) -> Row:
    (row,) = measure(Plan([work], ours, against, seconds=0.01))
    return row


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_everyone_computes_the_same(tokens: int, dtype: str) -> None:
    row = one_row(Workload(TINY, tokens, dtype), ["grouped", "loop"], ["grouped_mm", "eager", "batched_mm"])
    names = ["moesaic/grouped", "moesaic/loop", "grouped_mm", "eager", "batched_mm"]
    assert [result.name for result in row.results] == names
    assert row.skipped == {}
    for result in row.results:
        assert 0 < result.error < (1e-2 if dtype == "bf16" else 1e-6)
        assert result.runs >= 5
        assert result.quartiles[0] <= result.seconds <= result.quartiles[1]
        assert result.ratio == pytest.approx(result.seconds / row.results[0].seconds)
        assert result.read_fraction == pytest.approx(row.bytes / result.seconds / 1e9)
        assert result.register_fraction == pytest.approx(row.flops / result.seconds / 2e9)
        assert result.matmul_fraction == pytest.approx(row.flops / result.seconds / 1e9)


def test_bytes_and_operations() -> None:
    row = one_row(Workload(TINY, 1), ["grouped"], [])
    assert row.bytes == 2 * 3 * 64 * 32 * 2  # both of a token's experts, two bytes each weight
    assert row.flops == 2 * 3 * 64 * 32 * 2
    row = one_row(Workload(TINY, 50, "fp32"), ["grouped"], [])
    assert row.bytes == 4 * 3 * 64 * 32 * 4
    assert row.flops == 100 * 3 * 64 * 32 * 2


def test_forward_and_backward() -> None:
    row = one_row(Workload(TINY, 20, "fp32", backward=True), ["grouped"], ["grouped_mm", "eager", "vllm"])
    assert [result.name for result in row.results] == ["moesaic/grouped", "grouped_mm", "eager"]
    assert row.skipped == {"vllm": "vllm computes no gradients"}
    assert all(0 < result.error < 1e-5 for result in row.results)
    assert row.flops == 3 * 40 * 3 * 64 * 32 * 2


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_experts_are_held_to_their_own_values(format: str) -> None:
    row = one_row(Workload(Shape(6, 2, 128, 96), 5), ["grouped", f"grouped+{format}"], [])
    plain, quantized = row.results
    assert quantized.name == f"moesaic/grouped+{format}"
    assert quantized.error < 1e-2
    assert quantized.bytes < plain.bytes * (0.6 if format == "int8" else 0.4)


def test_frozen_experts_have_weights_of_their_own() -> None:
    banks = make_banks(TINY, torch.bfloat16)
    frozen = make_ours("grouped+frozen", TINY, banks, backward=False)
    call = make_calls(Workload(TINY, 5), len(banks), 0)[0]
    before = frozen.output(call)
    banks[call.bank].up.zero_()
    assert torch.equal(frozen.output(call), before)
    assert before.any()


@pytest.mark.parametrize("variant", ["int8", "frozen"])
def test_variants_are_not_trained(variant: str) -> None:
    row = one_row(Workload(TINY, 5, backward=True), [f"grouped+{variant}"], [])
    assert row.skipped == {f"moesaic/grouped+{variant}": "quantized and frozen experts are not trained"}
    assert row.results == []


def test_the_backend_that_was_chosen_before_comes_back() -> None:
    before = current_backend()
    one_row(Workload(TINY, 1), ["loop"], [])
    assert current_backend() == before


def test_a_contender_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    output = ModuleContender.output

    def refuse(self: ModuleContender, call: Call) -> Tensor:
        if self.backend == "loop":
            raise UnsupportedError("not today")
        return output(self, call)

    monkeypatch.setattr(ModuleContender, "output", refuse)
    row = one_row(Workload(TINY, 1), ["loop", "grouped"], [])
    assert row.skipped == {"moesaic/loop": "not today"}
    assert [(result.name, result.ratio) for result in row.results] == [("moesaic/grouped", 1.0)]


def test_works_of_one_shape_share_weights() -> None:
    told: list[str] = []
    works = [Workload(TINY, 1), Workload(TINY, 2), Workload(TINY, 2, "fp32"), Workload(TINY, 1)]
    rows = list(measure(Plan(works, ["grouped"], [], 0.01), tell=told.append))
    assert [(row.tokens, row.dtype) for row in rows] == [(1, "bf16"), (2, "bf16"), (2, "fp32"), (1, "bf16")]
    assert sum("weights ready" in line for line in told) == 3


def test_names(no_peers: None) -> None:
    assert field.our_backends(["loop", "auto", "grouped+int8"]) == ["loop", "auto", "grouped+int8"]
    assert field.our_backends(None)[-1] == "auto"
    for names in (["lop"], ["loop+int2"], ["loop+"]):
        with pytest.raises(ConfigError):
            field.our_backends(names)
    assert field.others(["eager"]) == (["eager"], {})
    usual, absent = field.others(None)
    assert usual == ["grouped_mm", "eager"]
    assert set(absent) == {"vllm", "llama.cpp"}
    with pytest.raises(ConfigError, match="did you mean 'eager'"):
        field.others(["eagre"])
    for name in ("vllm", "llama.cpp"):
        with pytest.raises(UnsupportedError, match=f"{name} cannot take part: .*MOESAIC_"):
            field.others([name])


def test_a_python_without_llama_cpp(no_peers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_LLAMA_PYTHON", str(tmp_path / "python"))
    with pytest.raises(UnsupportedError, match="No such file"):
        field.others(["llama.cpp"])
    monkeypatch.setenv("MOESAIC_LLAMA_PYTHON", python(tmp_path, "import sys; sys.exit('ModuleNotFoundError: gguf')"))
    with pytest.raises(UnsupportedError, match="ModuleNotFoundError: gguf"):
        field.others(["llama.cpp"])


def test_an_empty_folder_is_no_vllm(no_peers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_VLLM_CPU", str(tmp_path))
    with pytest.raises(UnsupportedError, match="MOESAIC_VLLM_CPU"):
        field.others(["vllm"])
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    with pytest.raises(UnsupportedError, match="does not load"):
        field.others(["vllm"])


def python(folder: Path, code: str) -> str:
    """A program that runs ``code`` whatever it is asked to run."""
    path = folder / "python"
    (folder / "code.py").write_text(textwrap.dedent(code))
    path.write_text(f"#!/bin/sh\nexec {sys.executable} {folder / 'code.py'}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


WORKER = """
import json, sys
print(json.dumps({"ready": "0"}), flush=True)
rest = iter([0.001, 0.004, 0.001])
for line in sys.stdin:
    asked = json.loads(line)
    told = {"error": asked["tokens"] / 100} if asked.get("check") else {"layer": 0.005, "rest": next(rest)}
    print(json.dumps(told), flush=True)
"""


def test_llama_cpp_is_timed_without_the_rest_of_its_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_LLAMA_PYTHON", python(tmp_path, WORKER))
    work = Workload(TINY, 100)
    contender = LlamaContender(work)
    banks = make_banks(TINY, torch.bfloat16)
    call = make_calls(work, len(banks), 0)[0]
    assert contender.error(call, banks[0]) == 0.16  # 16 tokens are enough
    # the rest is the median of what there is: 1, 2.5, 1 ms
    assert [contender.seconds(call) for _ in range(3)] == pytest.approx([0.004, 0.0025, 0.004])
    assert contender.cpu_seconds() >= 0
    contender.close()
    assert contender.process.returncode == 0


def test_llama_cpp_that_ends_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_LLAMA_PYTHON", python(tmp_path, "import sys; sys.exit('no memory')"))
    with pytest.raises(MoesaicError, match="no memory"):
        LlamaContender(Workload(TINY, 1))


@pytest.mark.parametrize("work", [Workload(TINY, 1, "fp32"), Workload(Shape(4, 2, 32, 32), 1)])
def test_what_llama_cpp_is_not_compared_in(work: Workload) -> None:
    with pytest.raises(UnsupportedError, match="bf16"):
        LlamaContender(work)


@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
def test_a_peer_that_is_here_computes_what_it_should(name: str) -> None:
    if reason := field.PEERS[name]():
        pytest.skip(reason)
    row = one_row(Workload(Shape(4, 2, 128, 128), 5), ["grouped"], [name])
    assert row.skipped == {}
    assert 0 < row.results[1].error < 1e-2
