"""What the serving benchmarks run: an OLMoE-shaped model with random weights and the demo model, as folders."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoeConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from moesaic.bench.generation import random_olmoe
from moesaic.errors import UsageError
from moesaic.folders import cache_folder
from moesaic.hf import MoesaicConfig

END_OF_TEXT = "<|endoftext|>"
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def olmoe_folder(layers: int = 4, seed: int = 0, parent: Path | None = None, **settings: Any) -> Path:
    """The folder of an OLMoE-shaped model in bf16 with random weights; made once, 3.6 GB with 4 layers.

    Args:
        layers: of OLMoE's 16; every other size is OLMoE's own (D 2048, 16 heads, E 64, K 8, F 1024, vocab 50304) unless
            ``settings`` of ``OlmoeConfig`` change it.
        parent: where it is kept; None: in moesaic's cache folder.
    """
    # transformers' default width of an expert is 2048; OLMoE's own is 1024.
    settings = {"intermediate_size": 1024, "num_hidden_layers": layers, "eos_token_id": None, **settings}
    config = OlmoeConfig(**settings)
    sizes = (config.hidden_size, config.num_experts, config.intermediate_size, config.vocab_size)
    told = "-".join(str(each) for each in (layers, *sizes, seed))
    folder = (parent or cache_folder() / "bench") / f"olmoe-{told}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model: Any = random_olmoe(config, seed)
        model.save_pretrained(beside)
        words_tokenizer(config.vocab_size).save_pretrained(beside)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def words_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for every id, so that a prompt sent as text has exactly the tokens that it was made of."""
    words = {END_OF_TEXT: 0} | {_word(i): i for i in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _word(index: int) -> str:
    letters = ""
    while index:
        index, letter = divmod(index - 1, len(_ALPHABET))
        letters = _ALPHABET[letter] + letters
    return letters


def load(folder: Path, implementation: str = "moesaic") -> Any:
    """A causal language model from a folder, in the dtype that it was saved in, for inference.

    Raises:
        UsageError: where the folder is not there.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: there is no model (config.json is missing)")
    config = AutoConfig.from_pretrained(folder)
    # Models of our own always run on our experts.
    chosen = {} if config.model_type == MoesaicConfig.model_type else {"experts_implementation": implementation}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **chosen)
    return model.eval()


def vocab_size(folder: Path) -> int:
    """Of the model in a folder."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer
