"""What is measured of converted models, on tiny ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.convert.models import dense_folder

from moesaic.bench.conversion import (
    Converted,
    Quality,
    active_parameters,
    distance_with_all_on,
    feed_forwards,
    ffn_times,
    inputs,
    quality,
    quality_part,
    speed_part,
)
from moesaic.bench.timing import Times
from moesaic.convert import SplitSettings, UpcycleSettings, split, upcycle
from moesaic.errors import CheckpointError
from moesaic.hf.load import load_model

IDS = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, split in half, and upcycled; and text in two domains."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text").mkdir()
    for number in range(12):
        (folder / f"text/code{number}.txt").write_text(f"def f{number}(x): return x + {number}\n" * 9)
    dense_folder(folder / "dense")
    settings = SplitSettings(experts=6, data=(f"code={folder / 'text'}",), tokens=512, sequence_length=64)
    split(folder / "dense", folder / "split", settings)
    upcycle(folder / "dense", folder / "upcycled", UpcycleSettings(num_experts=4))
    return folder


def test_active_parameters_are_those_that_a_token_meets(folders: Path) -> None:
    dense = 2 * 3 * 32 * 48
    found = {name: active_parameters(load_model(folders / name)[0]) for name in ("dense", "split", "upcycled")}
    assert found == {"dense": dense, "split": dense // 2, "upcycled": 2 * dense}


def test_with_all_experts_on_nothing_differs(folders: Path) -> None:
    assert distance_with_all_on(folders / "split", folders / "dense", IDS) < 1e-5
    model = load_model(folders / "split")[0]
    assert {layer.router.top_k for layer in model.modules() if hasattr(layer, "router")} == {3}


def test_quality_is_measured_once(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = (f"code={folders / 'text'}",)
    words = (folders / "split", folders / "dense", tmp_path / "split.json")
    found = quality(*words, max_tokens=128, sources=sources)
    assert found.ratio == pytest.approx(
        found.perplexity["code"] / quality(folders / "dense", *words[1:2], tmp_path / "dense.json", max_tokens=128,
                                           sources=sources).perplexity["code"]
    )  # fmt: skip
    monkeypatch.setattr("moesaic.bench.conversion.evaluate_folder", lambda *_, **__: pytest.fail("measured again"))
    assert quality(*words, max_tokens=128, sources=sources) == found
    with pytest.raises(CheckpointError, match="there is no converted model"):
        quality(tmp_path, *words[1:], max_tokens=128)


def test_feed_forwards_are_timed_on_what_they_read(folders: Path) -> None:
    dense = load_model(folders / "dense")[0]
    read = inputs(dense, IDS)
    assert [tuple(x.shape) for x in read] == [(16, 32), (16, 32)]
    with torch.no_grad():
        hidden = dense.model(input_ids=IDS, output_hidden_states=True)
        last = (
            hidden.hidden_states[0]
            + dense.model.layers[0].self_attn(
                dense.model.layers[0].input_layernorm(hidden.hidden_states[0]),
                position_embeddings=dense.model.rotary_emb(hidden.hidden_states[0], torch.arange(16)[None]),
                attention_mask=None,
            )[0]
        )
    torch.testing.assert_close(read[0], dense.model.layers[0].post_attention_layernorm(last)[0], rtol=1e-4, atol=1e-4)
    assert len(feed_forwards(load_model(folders / "split")[0])) == 2
    times = ffn_times(folders / "dense", {"half": folders / "split"}, IDS, torch.float32, 0.01)
    assert set(times) == {"dense", "dense, our kernels", "half"}
    assert all(min(each.seconds) > 0 for each in times.values())


def test_the_tables_say_what_was_found() -> None:
    models = [Converted("dense", Path("d")), Converted("half", Path("h"), "40 min")]
    found = {
        "dense": Quality(100, 100, {"code": 8.0, "prose": 20.0}, {"code": 1.0}, {"code": 0.0}, 1.0),
        "half": Quality(50, 100, {"code": 9.0, "prose": 26.0}, {"code": 0.8}, {"code": 0.2}, math.sqrt(9 / 8 * 1.3)),
    }
    part = quality_part(models, found, 1000, "half")
    assert part.rows[0] == ("dense", "0.0 M (100%)", "", "8.00", "20.00", "1", "", "")
    assert part.rows[1] == ("half", "0.0 M (50%)", "40 min", "9.00", "26.00", "1.209", "80.0%", "0.200")
    assert [each.passed for each in part.verdicts] == [True]
    times = {"fp32": {"dense": Times((2e-3,)), "dense, our kernels": Times((1e-3,)), "half": Times((1e-3,))}}
    speed = speed_part(times, 10, "half")
    assert speed.rows == [("half", "fp32", "100", "2.00x as long (2.00 to 2.00)", "1.00x as long (1.00 to 1.00)")]
    assert [(each.measured, each.passed) for each in speed.verdicts] == [(2.0, True)]
