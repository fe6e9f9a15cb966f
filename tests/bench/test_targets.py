"""Targets, the trace, a whole model, and what is written about them."""

from __future__ import annotations

import json
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from transformers import OlmoeConfig

from moesaic.bench import Result, Row, Shape
from moesaic.bench.generation import random_olmoe, run_generation
from moesaic.bench.limits import machine
from moesaic.bench.parallel.parts import PARTS
from moesaic.bench.part import Part
from moesaic.bench.report import cells, document, notes, rows_of, title, write
from moesaic.bench.results import add, read
from moesaic.bench.roofline import write_roofline
from moesaic.bench.targets import (
    GROUPS,
    Verdict,
    batches,
    model_verdicts,
    row_verdicts,
    trace_verdicts,
)
from moesaic.bench.trace import _summary, run_trace
from moesaic.errors import UnsupportedError
from moesaic.experts import BACKENDS, available, use_backend
from moesaic.experts.backend import tune_with

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"read": 40e9, "registers": 400e9, "matmul": 300e9}


def result(name: str, ratio: float = 1.0) -> Result:
    return Result(name, 0.01 * ratio, (0.009 * ratio, 0.011 * ratio), 5, 1e-3, 1e8, 0.8, 0.7, 0.9, ratio, (0.9, 1.1))


def row(tokens: int, *results: Result, shape: str = "A", dtype: str = "bf16", backward: bool = False) -> Row:
    return Row(shape, tokens, dtype, "balanced", backward, 1e8, 1e9, LIMITS, list(results))


OURS = result("moesaic/native")


def told(row: Row) -> list[tuple[str, str, bool]]:
    return [(verdict.group, verdict.cells()[4], verdict.passed) for verdict in row_verdicts(row)]


def test_a_verdict_says_by_how_much_it_misses() -> None:
    assert Verdict("decode", "w", "what", 2.0, 2.0).cells() == ("w", "what", "2.00x", "2.00x", "pass")
    assert Verdict("decode", "w", "what", 2.0, 1.5).cells()[4] == "misses by 25%"
    at_most = Verdict("trace", "w", "what", 0.01, 0.015, "%", at_most=True)
    assert at_most.cells() == ("w", "what", "at most 1.0%", "1.5%", "misses by 50%")
    assert replace(at_most, measured=0.0).passed
    assert replace(at_most, disturbed=True).cells()[4] == "misses by 50% (disturbed)"


def test_decode_is_held_to_grouped_mm_to_bandwidth_and_to_peers() -> None:
    measured = row(
        4, OURS, result("grouped_mm", 2.4), result("eager", 1.1), result("vllm", 0.9), result("llama.cpp", 1.2)
    )
    assert told(measured) == [
        ("decode", "pass", True),
        ("decode", "misses by 6%", False),
        ("decode", "misses by 10%", False),
        ("decode", "pass", True),
    ]


def test_only_two_shapes_have_a_target_at_64_tokens() -> None:
    for shape, expected in (("A", [("middle", "misses by 5%", False)]), ("B", [])):
        assert told(row(64, OURS, result("grouped_mm", 1.9), shape=shape)) == expected


def test_prefill_is_held_to_the_faster_one_and_to_arithmetic() -> None:
    measured = row(512, OURS, result("grouped_mm", 1.5), result("eager", 1.2))
    assert [verdict.what for verdict in row_verdicts(measured)] == [
        "faster of grouped_mm and eager (eager) / ours",
        "of multiply-adds on registers",
    ]
    assert told(measured) == [("prefill", "misses by 8%", False), ("prefill", "misses by 7%", False)]


def test_the_other_rows() -> None:
    grouped_mm = result("grouped_mm", 1.3)
    assert told(row(16, OURS, grouped_mm, dtype="fp32")) == [("fp32", "misses by 48%", False)]
    assert told(row(2048, OURS, grouped_mm, backward=True)) == [("training", "pass", True)]
    quantized = [result("moesaic/native+int8", 0.5), result("moesaic/native+int4", 0.4)]
    assert told(row(1, OURS, *quantized)) == [("quantized", "pass", True), ("quantized", "misses by 17%", False)]
    assert told(replace(row(16, OURS, grouped_mm), routing="hot")) == []
    busy = replace(row(2048, OURS, grouped_mm, backward=True), others=0.2)
    assert told(busy) == [("training", "pass (disturbed)", True)]
    assert told(row(1, grouped_mm)) == []  # without our native kernels nothing is claimed


def test_every_row_of_the_table_is_measured() -> None:
    works = [work for batch in batches(list(GROUPS), ["vllm"]) for work in batch.works]
    told = {(str(work.shape), work.tokens, work.dtype, work.routing, work.backward) for work in works}
    for shape in "ABC":
        assert {(shape, tokens, "bf16", "balanced", False) for tokens in (1, 4, 16, 64, 512, 2048)} <= told
        assert {(shape, tokens, "fp32", "balanced", False) for tokens in (16, 64)} <= told
    assert ("E16K2D512F672", 2048, "bf16", "balanced", True) in told
    quantized = [batch for batch in batches(["quantized"], []) if "native+int4" in batch.ours]
    assert [work.tokens for batch in quantized for work in batch.works] == [1, 1, 1]
    only = batches(["decode"], [])
    assert {work.tokens for batch in only for work in batch.works} == {1, 4, 16}
    assert all(batch.against == ["grouped_mm", "eager"] for batch in only)


def test_the_trace_is_summed_up() -> None:
    # 2 calls; backends a, b; auto is the last. a is best for the first call, b for the second.
    rounds = np.array([[[1.0, 2.0, 2.0], [5.0, 3.0, 4.0]], [[1.0, 2.0, 1.0], [5.0, 3.0, 3.0]]])

    class Tuner:
        @staticmethod
        def statistics() -> object:
            return type("Statistics", (), {"overhead": 0.25, "explored": 3})

    trace = _summary(Shape(4, 2, 8, 8), [1, 9], ["a", "b"], rounds, Tuner())  # type: ignore[arg-type]
    assert trace.fixed == {"a": 6.0, "b": 5.0}
    assert (trace.oracle, trace.auto, trace.rounds) == (4.0, 5.0, 2)
    assert (trace.first_ratio, trace.ratio) == (1.5, 1.25)
    assert [(verdict.passed, verdict.measured) for verdict in trace_verdicts(trace)] == [(False, 1.25), (False, 0.25)]


def test_a_trace_runs_on_a_tuner_of_its_own() -> None:
    def mine(*arguments: object) -> object:
        raise UnsupportedError("the process's own tuner is not asked")

    before = tune_with(mine)  # type: ignore[arg-type]
    try:
        with use_backend("auto"):
            trace = run_trace(0.01, Shape(4, 2, 16, 8), most_tokens=20, calls=5)
        assert tune_with(mine) is mine  # type: ignore[arg-type]
    finally:
        tune_with(before)
    assert set(trace.fixed) == set(available()) <= set(BACKENDS)
    assert trace.rounds >= 3
    assert sorted(trace.tokens) == [1, 2, 4, 9, 20]


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def test_a_whole_model_says_the_same() -> None:
    # All experts for every token: no choice of the router hangs on a rounding.
    settings = {**SMALL, "num_experts_per_tok": 4}
    found = run_generation(["moesaic", "grouped_mm", "eager"], 0.01, new_tokens=4, layers=2, **settings)
    assert [each.name for each in found] == ["moesaic", "grouped_mm", "eager"]
    assert (found[0].ratio, found[0].same_tokens) == (1.0, 4)
    for each in found:
        assert 0 < each.logits_error < 0.03
        assert each.runs >= 3
    assert [verdict.measured for verdict in model_verdicts(found)] == [found[1].ratio]


def test_a_random_model_is_alive() -> None:
    model = random_olmoe(OlmoeConfig(num_hidden_layers=2, eos_token_id=None, **SMALL), seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = model(torch.tensor([[1, 2, 3]])).logits.float()
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1


def test_a_document_is_read_back(tmp_path: Path) -> None:
    rows = [row(1, OURS, result("grouped_mm", 2.0)), row(16, OURS)]
    rows[0].skipped["vllm"] = "not here"
    write(document(rows), tmp_path / "new" / "experts.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["experts.json"]
    told = json.loads((tmp_path / "new" / "experts.json").read_text())
    assert [asdict(each) for each in rows_of(told)] == json.loads(json.dumps([asdict(each) for each in rows]))
    assert {"cpu", "versions", "measured"} <= set(told["machine"])


def test_a_line_of_the_table() -> None:
    one = row(1, OURS)
    assert cells(one, result("eager", 2.5)) == (
        *("eager", "25", "22.5 - 27.5", "4.0", "40.0"),
        *("80%", "70%", "90%", "1.0e-03", "2.50 (0.90 - 1.10)"),
    )
    assert "100.0 MB of weights, 1 GFLOP" in title(one)
    assert "forward and backward" in title(replace(one, backward=True))
    assert cells(one, replace(OURS, register_fraction=None))[6] == "-"


def test_what_spoils_a_row_is_told() -> None:
    one = row(1, OURS, replace(result("eager"), quartiles=(0.005, 0.02)))
    one.skipped["vllm"] = "not here"
    assert notes(one) == ["vllm does not take part: not here", "widely spread, so with care: eager"]
    assert "other processes used 30% of the machine" in notes(replace(one, others=0.3))[1]
    assert len(notes(replace(one, others=0.01))) == 2


def test_the_roofline_is_drawn(tmp_path: Path) -> None:
    without = replace(row(16, OURS), limits={"read": 40e9, "matmul": 300e9}, dtype="fp32")
    rows = [row(1, OURS, result("grouped_mm", 2.0)), row(512, *(result(f"contender {i}") for i in range(10))), without]
    write_roofline(rows, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_is_made_of_a_run() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "benchmark_page.py"))
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [row(1, OURS, result("grouped_mm", 2.0))]
    told = document(rows)
    told["verdicts"] = [{**asdict(verdict), "passed": verdict.passed} for verdict in row_verdicts(rows[0])]
    told["absent"] = {"vllm": "not here"}
    page = script["page"](text, told)
    assert "vllm did not take part: not here." in page
    assert "| A, 1 token | grouped_mm / ours | 2.30x | 2.00x | misses by 13% |" in page
    assert "| grouped_mm | 20 | 18 - 22 |" in page
    before, _ = text.split(script["BEGIN"])
    assert page.startswith(before)
    assert script["page"](page, told) == page


def test_the_page_tells_of_the_trace_and_the_model() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "benchmark_page.py"))
    trace = {"fixed": {"loop": 2.0}, "oracle": 1.0, "auto": 1.02, "first_ratio": 1.5}
    assert "| auto | 1020 | 1.020 |" in script["trace"]({"trace": trace})
    model = {
        "name": "eager",
        "seconds": 2.0,
        "quartiles": [1.9, 2.1],
        "runs": 3,
        "same_tokens": 64,
        "logits_error": 0.01,
        "ratio": 1.8,
        "ratio_quartiles": [1.7, 1.9],
    }
    assert "| eager | 2.000 | 1.900 - 2.100 | 64 | 1.0e-02 | 1.80 (1.70 - 1.90) |" in script["model"](
        {"model": [model]}
    )
    assert script["trace"]({}) == script["model"]({}) == ""


def test_the_page_on_parallelism_tells_measured_and_simulated_apart(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "benchmark_page.py"))
    assert list(script["PARALLEL"]) == [name for name in PARTS if name != "scale"]
    fast, slow, lost = [1.0] * 4, [2.0] * 4, [5.0]
    points = [
        {
            "work": {"num_experts": 8},
            "times": {"auto": fast, "tokens, overlap 1": fast, "weights": slow, "hybrid, 1 fetched, overlap 1": lost},
        },
        {
            "work": {"num_experts": 64},
            "times": {"auto": slow, "tokens, overlap 1": slow, "weights": fast, "hybrid, 8 fetched, overlap 1": fast},
        },
    ]
    verdict = Verdict("grid", "2 points", "auto / best fixed, worst", 1.15, 2.0, at_most=True)
    parts = {
        "scale": Part(
            "Simulated, not measured: speed-up over static EP, K2 D8", ("", "16 ranks"), [("H100", "1.5x")], []
        ),
        "tutel": Part("Against Tutel", (), [], [], ["Tutel does not take part: it is not here"]),
        "grid": Part("The choice", ("ranks", "points"), [("4 hosts", "2")], [verdict], points=points),
    }
    for name, part in parts.items():
        add(name, part, machine(), read(tmp_path / "parallel.json"), tmp_path / "parallel.json")
    text = f"before\n{script['BEGIN']}old\n{script['END']}after\n"
    page = script["parallel_page"](text, read(tmp_path / "parallel.json"))
    assert page.startswith("before\n") and page.endswith("after\n") and "\nold" not in page
    assert "0 of 1 targets reached." in page and "at most 1.15x | 2.00x | misses by 74%" in page
    assert page.index("**The choice**") < page.index("**Against Tutel**") < page.index("### Simulated, not measured")
    assert "Tutel does not take part: it is not here." in page
    assert "| `weights` | 1 | 1.41x | 1.50x | 2.00x | 1.41x | 1.50x | 2.00x |" in page
    assert "| `hybrid` | 1 | 2.24x | 3.00x | 5.00x |" in page
    assert "| one plan for all: tokens, overlap 1 | 1 | 1.41x | 1.50x | 2.00x |" in page
    assert "| `auto` | 1 | 1.41x | 1.50x | 2.00x |" in page
    assert "| h100 | 989 TFLOP/s, memory 3350 GB/s | NVIDIA H100 SXM data sheet" in page and "| hdr | 25 GB/s" in page
    assert "**Speed-up over static EP, K2 D8**" in page and "| H100 | 1.5x |" in page
    assert script["parallel_page"](page, read(tmp_path / "parallel.json")) == page
