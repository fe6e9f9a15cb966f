"""The serving benchmark's parts on tiny models: loads, our engine, the peers, and what is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import moesaic
from moesaic.bench.limits import machine
from moesaic.bench.part import Part
from moesaic.bench.results import add, read, section
from moesaic.bench.serving import arrivals, decode, mixtures, prefixes, throughput, vllm
from moesaic.bench.serving.batching import ContinuousBatching
from moesaic.bench.serving.engine import EngineUnderTest
from moesaic.bench.serving.http import Server
from moesaic.bench.serving.load import Job, grouped, mixed, spread
from moesaic.bench.serving.models import load, load_tokenizer, olmoe_folder, vocab_size, words_tokenizer
from moesaic.bench.serving.served import Served
from moesaic.bench.targets import Verdict
from moesaic.errors import MoesaicError, UsageError
from moesaic.serve.request import EngineSettings

TINY = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return olmoe_folder(layers=2, parent=tmp_path_factory.mktemp("models"), **TINY)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "REQUESTS", 4)
    monkeypatch.setattr(mixtures, "ADAPTERS", 3)
    monkeypatch.setattr(throughput, "REQUESTS", 3)
    for name, value in {"RUNNING": 2, "NEW": 12, "ARRIVALS": 2, "LONG": 600, "EVERY": 3}.items():
        monkeypatch.setattr(arrivals, name, value)
    for name, value in {"GROUPS": 2, "EACH": 3, "PROMPT": 80, "NEW": 2}.items():
        monkeypatch.setattr(prefixes, name, value)
    monkeypatch.setattr(decode, "SECONDS", 0.1)
    monkeypatch.setattr(decode, "NEW", 6)


def ignore(line: str) -> None:
    assert line


def test_the_model_is_made_once(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert olmoe_folder(layers=2, parent=folder.parent, **TINY) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]
    model = load(folder)
    assert str(model.dtype) == "torch.bfloat16" and vocab_size(folder) == len(load_tokenizer(folder)) == 300


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no model \(config.json is missing\)"):
        load(tmp_path)


def test_a_prompt_as_text_has_the_tokens_it_was_made_of() -> None:
    tokenizer = words_tokenizer(1000)
    ids = [1, 26, 27, 702, 703, 999, 1]
    assert tokenizer(tokenizer.decode(ids)).input_ids == ids


def test_a_load_is_fixed_by_its_seed() -> None:
    jobs = mixed(500)
    assert jobs == mixed(500) != mixed(500, seed=1)
    assert {len(jobs), len({job.prompt_ids for job in jobs})} == {32}
    assert all(16 <= len(job.prompt_ids) <= 512 and 32 <= job.new_tokens <= 128 for job in jobs)
    assert all(0 < token < 500 for job in jobs for token in job.prompt_ids)


def test_groups_share_their_beginnings() -> None:
    jobs = grouped(500, groups=3, each=4, prompt=100, shared=0.9)
    assert len({job.prompt_ids[:90] for job in jobs}) == 3
    assert len({job.prompt_ids for job in jobs}) == 12 and {len(job.prompt_ids) for job in jobs} == {100}


def test_adapters_are_spread_evenly() -> None:
    jobs = spread(mixed(500, 6), ["a", "b", "c"])
    assert [job.adapter for job in jobs] == ["a", "b", "c"] * 2
    assert [job.prompt_ids for job in jobs] == [job.prompt_ids for job in mixed(500, 6)]


def test_gaps_and_steps() -> None:
    served = Served("x", 2.0, 2, 5, 6, ((0.5, 1.0, 1.25), (0.5, 0.75, 2.0)), steps=(0.5, 0.75, 1.0, 2.0))
    assert served.rate == 3.0 and served.waits() == 0.5 and served.longest_step() == 1.0
    assert sorted(served.gaps().seconds) == [0.25, 0.25, 0.5, 1.25]
    assert served.gaps([0]).mean == 0.375 and served.gaps([1]).max == 1.25


def test_the_engine_serves_a_load(folder: Path) -> None:
    engine = EngineUnderTest(folder, EngineSettings(max_context=256))
    jobs = [Job((1, 2, 3), 5), Job(tuple(range(1, 40)), 2)]
    served = engine.serve(jobs, late=[(2, Job((7, 8), 3))])
    assert (served.requests, served.prompt_tokens, served.new_tokens) == (3, 44, 10)
    assert [len(each) for each in served.times] == [5, 2, 3]
    assert served.times[2][0] > served.times[0][1]  # it came after two steps
    assert 2 <= served.experts <= 8


def test_loads_in_turns_are_those_alone(folder: Path) -> None:
    engine = EngineUnderTest(folder)
    jobs = mixed(300, 3, (4, 30), (2, 9))
    for served in engine.serve_in_turns([jobs, jobs]):
        assert [len(each) for each in served.times] == [job.new_tokens for job in jobs]
        assert len(served.steps) == len(engine.serve(jobs).steps)
        assert served.seconds == served.steps[-1]


def test_transformers_batching_serves_a_load(folder: Path) -> None:
    batching = ContinuousBatching(folder)
    jobs = mixed(300, 3, (4, 30), (2, 9))
    served = batching.serve(jobs)
    batching.close()
    assert [len(each) for each in served.times] == [job.new_tokens for job in jobs]
    assert not batching.manager.is_running()


def test_a_server_that_ends_at_once_is_told(folder: Path) -> None:
    with pytest.raises(MoesaicError, match="nobody ended with exit code 3 before it was ready"):
        Server("nobody", [sys.executable, "-c", "raise SystemExit(3)"], folder, "m", {})


@pytest.mark.slow
@pytest.mark.parametrize("make", ["moesaic_serve", "transformers_serve"])
def test_a_server_serves_a_load(folder: Path, make: str) -> None:
    jobs = mixed(300, 3, (4, 30), (2, 9))
    server: Server = getattr(throughput, make)(folder)
    served = server.serve(jobs)
    server.close()
    assert (served.requests, served.new_tokens) == (3, sum(job.new_tokens for job in jobs))
    assert server.process.returncode is not None


def test_vllm_is_absent_where_its_python_is(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv(vllm.PYTHON_VARIABLE, str(folder / "python"))
    assert "cannot be run: No such file" in str(vllm.missing())
    monkeypatch.setenv(vllm.PYTHON_VARIABLE, sys.executable)
    assert str(vllm.missing()).endswith("has no vllm")
    monkeypatch.delenv(vllm.PYTHON_VARIABLE)
    part = throughput.run_vllm(folder, ignore)
    assert not part.verdicts and "vLLM did not take part: vllm is not installed" in part.lines[0]


def test_the_adapters_part(folder: Path) -> None:
    part = mixtures.run_adapters(folder, ignore)
    assert [each.what for each in part.verdicts] == [
        "time between tokens / base only",
        "memory / base + adapters",
        "growth of resident memory / adapters",
    ]
    assert part.figures["adapter_bytes"] == 3 * 2 * mixtures.TUNED * 3 * 32 * 16 * 2  # adapters, layers, up gate down
    assert part.rows[1][0] == "adapters" and part.figures["more_experts"] > -1
    again = mixtures.run_adapters(folder, ignore)
    assert again.figures["adapter_bytes"] == part.figures["adapter_bytes"]


def test_the_decode_part(folder: Path) -> None:
    part = decode.run_decode(folder, ignore)
    (verdict,) = part.verdicts
    assert verdict.target == 0.9 and verdict.measured == part.figures["loop"] / part.figures["moesaic engine"]


def test_the_prefixes_part(folder: Path) -> None:
    part = prefixes.run_prefixes(folder, ignore)
    assert [row[0] for row in part.rows] == ["yes", "no"]
    # 6 prompts of 80 and 2 new tokens; four of them find 4 pages of 16 of their 72 common tokens.
    assert [row[3] for row in part.rows] == [str(6 * 82 - 4 * 64), str(6 * 82)]


def test_the_stall_part(folder: Path) -> None:
    part = arrivals.run_stall(folder, ignore)
    waits = [each for each in part.verdicts if "longest step" in each.what]
    assert len(part.rows) == 4 and len(waits) == 2 and all(each.passed for each in waits)


def test_parts_are_kept_beside_each_other(tmp_path: Path) -> None:
    parts = {
        name: Part(f"the {name}", ("a", "b"), [("1", "2")], [Verdict("g", "w", "x", 2.0, value)], ["a line"])
        for name, value in (("one", 1.0), ("two", 3.0))
    }
    for name, part in parts.items():
        add(name, part, machine(), read(tmp_path / "serving.json"), tmp_path / "serving.json")
    told = read(tmp_path / "serving.json")
    assert list(told) == ["one", "two"] and json.dumps(told)
    page = section(told)
    assert page.startswith("1 of 2 targets reached.") and "misses by 50%" in page
    assert f"moesaic {moesaic.__version__}" in page and "| 1 | 2 |" in page and "A line." in page
