"""A small model and its adapters, good ones and broken ones: random weights, tokens are bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, PreTrainedTokenizerFast

from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.folder import TENSORS, AdapterLayer, Base, write_adapter
from moesaic.bench.generation import random_olmoe

CONTEXT = 1024
_END = "<end>"
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_model(folder: Path, *, layers: int = 4, experts: int = 32, width: int = 128, seed: int = 0) -> Any:
    """Save an OLMoE-shaped model in bf16 with a chat template, which works on any machine in milliseconds a step."""
    config = OlmoeConfig(
        vocab_size=264,
        hidden_size=width,
        intermediate_size=width // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=None,
    )
    model: Any = random_olmoe(config, seed)
    model.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return model


def make_adapters(model: Any, folder: Path, names: list[str], tuned: int = 4) -> None:
    """Adapters of ``tuned`` experts a layer, each with experts of its own choice, changed at random."""
    base = Base(fingerprint(model), model.config.model_type, folder.name)
    for seed, name in enumerate(names):
        _make_adapter(model, base, folder / name, tuned, seed)


def make_broken_adapters(model: Any, folder: Path, good: str) -> list[str]:
    """Paths that a server with ``folder`` as its folder of adapters must refuse."""
    shutil.copytree(folder / good, folder / "truncated")
    tensors = folder / "truncated" / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-100])
    stranger = Base("v1:" + 32 * "0", model.config.model_type, "another base")
    _make_adapter(model, stranger, folder / "stranger", 1, 0)
    (folder / "empty").mkdir()
    return ["truncated", "stranger", "empty", "nothing-there", "..", "../..", "/etc", "good\x00bad", "x" * 5000]


def _make_adapter(model: Any, base: Base, folder: Path, tuned: int, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    layers, tensors = {}, {}
    for number, layer in enumerate(model.model.layers):
        path, module = f"model.layers.{number}.mlp.experts", layer.mlp.experts
        chosen = torch.randperm(module.gate_up_proj.shape[0], generator=dice)[:tuned].sort().values
        scores = [1 / (tuned + 1)] * tuned
        layers[path] = AdapterLayer(chosen.tolist(), scores, module.gate_up_proj.shape[0])
        rows = {name: getattr(module, name).detach()[chosen] for name in ("gate_up_proj", "down_proj")}
        tensors[path] = {name: _changed(value, dice) for name, value in rows.items()}
    write_adapter(folder, base, layers, tensors)


def _changed(rows: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    noise = torch.randn(rows.shape, generator=dice) * rows.float().std()
    return (rows.float() + noise).to(rows.dtype)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: token for token, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, chat_template=_TEMPLATE)
