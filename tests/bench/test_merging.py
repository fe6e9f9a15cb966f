"""The miniature of merging: it runs through, says what it measured, and makes no model twice."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from moesaic.bench.merging import MERGES, Sizes, as_bytes, bits_per_byte, measure

ROOT = Path(__file__).resolve().parents[2]
SIZES = Sizes(
    d_model=16, d_ff=24, layers=1, steps=3, tune_steps=2, mix_steps=2, batch=4, length=16, held_out=20, most_bytes=500
)


def test_all_models_are_measured_and_made_once(tmp_path: Path) -> None:
    code, prose = as_bytes("def f(x): return x\n" * 40, 500), as_bytes("It is said that é. " * 40, 500)
    texts = {"code": (code, code), "prose": (prose, prose)}
    said: list[str] = []
    part = measure(tmp_path, texts, SIZES, said.append)
    assert len(part.rows) == 3 + len(MERGES) + 4 + 1 and {len(row) for row in part.rows} == {len(part.header)}
    assert said[:4] == ["base", "tuned-code", "tuned-prose", "both"] and len(said) == len(set(said))
    assert part.figures["base"] == pytest.approx(8, abs=1)  # of 256 bytes, almost untrained
    again: list[str] = []
    assert measure(tmp_path, texts, SIZES, again.append).rows == part.rows
    assert again == []


def test_bits_per_byte_is_the_mean_loss(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    text = as_bytes("the quick brown fox jumps over the lazy dog", 100)
    sizes = Sizes(length=16, held_out=3)
    bits = 0.0
    for start in (0, 13, 27):  # evenly spread
        with torch.no_grad():
            logits = model(text[None, start : start + 16]).logits[0].double().log_softmax(-1)
        for place in range(15):
            bits -= float(logits[place, text[start + place + 1]]) / torch.log(torch.tensor(2.0)).item() / 45
    assert bits_per_byte(tmp_path / "model", text, sizes) == pytest.approx(bits, rel=1e-5)


def test_the_table_goes_between_its_marks() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "merging.py"))
    text = f"before\n{script['BEGIN']}old\n{script['END']}after\n"
    assert script["page"](text, "new\n") == f"before\n{script['BEGIN']}\nnew\n\n{script['END']}after\n"
    assert script["page"]("nothing", "new") == "nothing"
