"""What quantized experts cost a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.train.quantized import quantize_folder
from moesaic.train.recipe import Recipe
from moesaic.train.recipe_file import override
from moesaic.train.run import train


@pytest.mark.slow
def test_perplexity_of_a_trained_model(tmp_path: Path) -> None:
    settings = [
        *["model.d_model=128", "model.num_layers=3", "model.num_heads=2", "model.num_kv_heads=1", "model.d_ff=128"],
        *["model.num_experts=8", "model.max_length=256", "model.init_std=0.06", "data.sequence_length=128"],
        *["train.steps=300", "train.batch_size=8", "train.learning_rate=0.005"],
    ]
    train(override(Recipe(name="small"), settings), tmp_path / "run")
    perplexities = {}
    for name, bound in (("int8", 0.005), ("int4", 0.03)):
        made = quantize_folder(tmp_path / "run", tmp_path / name, name, sources=["stdlib"])
        assert made.bytes_after < made.bytes_before
        rise = made.rise()
        assert set(rise) == {"code", "prose"}
        assert max(rise.values()) < bound, rise
        assert made.before is not None
        perplexities[name] = {domain: result.perplexity for domain, result in made.before.domains.items()}
    assert perplexities["int8"] == perplexities["int4"]
    # It has learned something: 4096 tokens, and far from all of them are as likely.
    assert max(perplexities["int8"].values()) < 500
