"""Model folders that the commands are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moesaic import MoesaicConfig, MoesaicForCausalLM
from moesaic.data import Document, train_tokenizer

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CODE = "def add(x, y):\n    return x + y\n" * 20
PROSE = "It was a bright cold day in April. " * 20


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model of each kind: ours, mixtral, dense."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Document("code", "a.py", CODE)], 290)
    ours = MoesaicConfig(**SIZES, head_dim=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    for name, model in {
        "ours": MoesaicForCausalLM(ours),
        "mixtral": MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
        "dense": LlamaForCausalLM(LlamaConfig(**SIZES)),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``--data`` options for two small domains in the current folder."""
    (tmp_path / "a.py").write_text(CODE)
    (tmp_path / "b.txt").write_text(PROSE)
    monkeypatch.chdir(tmp_path)
    return ["--data", "code=a.py", "-d", "prose=b.txt"]
