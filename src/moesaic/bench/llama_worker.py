"""llama.cpp in a process of its own: ``python llama_worker.py '{"num_experts": 64, ...}'``, for another Python as well.

Writes a model of one OLMoE layer with random weights, loads it, and then answers each line of standard input, a JSON
object ``{"tokens": n}``, with a line of JSON: seconds of one run, and with ``"check": true`` the error of its output.

Imports nothing of moesaic: the Python that has llama.cpp need not have it.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

VOCABULARY = 512
HEAD = 64
MOST_TOKENS = 2048
# Up to so many tokens each is a sequence of its own, as in decoding; more are one sequence, as in prefill.
SEQUENCES = 64
# The layer without its experts, nearly: what attention, router and the graph cost is measured on it and taken off.
NARROW = 32
BLOCK = 4_999_999
EPSILON = 1e-5


class Layer:
    """One OLMoE layer, written as a GGUF file and kept as arrays for the reference.

    The residual stream and what attention adds to it are so small that the output is nearly that of the experts.
    """

    def __init__(self, num_experts: int, top_k: int, d_model: int, d_ff: int) -> None:
        self.num_experts, self.top_k, self.d_model, self.d_ff = num_experts, top_k, d_model, d_ff
        self.random = np.random.default_rng(0)
        e, d, f = num_experts, d_model, d_ff
        self.embedding = self.random.standard_normal((VOCABULARY, d), np.float32) * np.float32(0.01)
        self.output = self.random.standard_normal((VOCABULARY, d), np.float32)
        self.router = self.random.standard_normal((e, d), np.float32) / np.float32(math.sqrt(d))
        self.gate, self.up, self.down = (self._experts(*size) for size in ((e, f, d), (e, f, d), (e, d, f)))

    def _experts(self, *size: int) -> NDArray[np.uint16]:
        count = math.prod(size)
        block = self.random.standard_normal(min(count, BLOCK), np.float32) / np.float32(math.sqrt(size[-1]))
        return np.resize(to_bf16(block), count).reshape(size)

    def write(self, path: Path) -> None:
        """The layer as a GGUF file."""
        writer, d = gguf.GGUFWriter(path, "olmoe"), self.d_model
        writer.add_block_count(1)
        writer.add_context_length(2 * MOST_TOKENS)
        writer.add_embedding_length(d)
        writer.add_feed_forward_length(self.d_ff)
        writer.add_head_count(d // HEAD)
        writer.add_head_count_kv(d // HEAD)
        writer.add_layer_norm_rms_eps(EPSILON)
        writer.add_expert_count(self.num_experts)
        writer.add_expert_used_count(self.top_k)
        writer.add_vocab_size(VOCABULARY)
        writer.add_tokenizer_model("no_vocab")
        for name, matrix in (("token_embd", self.embedding), ("output", self.output)):
            writer.add_tensor(f"{name}.weight", matrix)
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.attn_q_norm", "blk.0.attn_k_norm", "blk.0.ffn_norm"):
            writer.add_tensor(f"{name}.weight", np.ones(d, np.float32))
        attention = to_bf16(self.random.standard_normal((d, d), np.float32) / np.float32(100 * d))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add_bf16(writer, f"blk.0.{name}.weight", attention)
        writer.add_tensor("blk.0.ffn_gate_inp.weight", self.router)
        for name, experts in (("gate", self.gate), ("up", self.up), ("down", self.down)):
            add_bf16(writer, f"blk.0.ffn_{name}_exps.weight", experts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def logits(self, tokens: NDArray[np.int64]) -> Floats:
        """``[T, vocabulary]`` in float32, with what attention adds left out."""
        out_TD = self.embedding[tokens].copy()
        x_TD = normalized(out_TD)
        scores_TE = np.exp(x_TD @ self.router.T)
        scores_TE /= scores_TE.sum(-1, keepdims=True)
        for token, scores_E in enumerate(scores_TE):
            for expert in np.argsort(-scores_E)[: self.top_k]:
                gate_F, up_F = (from_bf16(matrix[expert]) @ x_TD[token] for matrix in (self.gate, self.up))
                h_F = gate_F / (1 + np.exp(-gate_F)) * up_F
                out_TD[token] += scores_E[expert] * (from_bf16(self.down[expert]) @ h_F)
        return np.asarray(normalized(out_TD) @ self.output.T, np.float32)


def to_bf16(x: Floats) -> NDArray[np.uint16]:
    """Rounded to the nearest, as bits."""
    return ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    """The numbers that the bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def normalized(x_TD: Floats) -> Floats:
    """RMS norm with weights of one."""
    return np.asarray(x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + EPSILON), np.float32)


def add_bf16(writer: Any, name: str, bits: NDArray[np.uint16]) -> None:
    """Add a tensor of bf16 bits."""
    writer.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)


class Model:
    """A layer, loaded into llama.cpp."""

    def __init__(self, layer: Layer, threads: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.gguf"
            layer.write(path)
            parameters = llama_cpp.llama_model_default_params()
            parameters.use_mmap = False  # as if loaded for good: the file is gone afterwards
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = 2 * MOST_TOKENS
        context.n_batch = context.n_ubatch = MOST_TOKENS
        context.n_seq_max = SEQUENCES
        context.kv_unified = True
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)

    def run(self, tokens: NDArray[np.int64]) -> float:
        """Seconds of one run over the tokens, the outputs of all of them wanted."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens.tolist()):
            own = len(tokens) <= SEQUENCES
            batch.token[index], batch.n_seq_id[index], batch.logits[index] = token, 1, 1
            batch.pos[index], batch.seq_id[index][0] = (0, index) if own else (index, 0)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return seconds

    def logits(self, count: int) -> Floats:
        """``[T, vocabulary]`` of the last run."""
        found = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (count, VOCABULARY)).copy()


def main() -> None:
    """Answer until standard input ends."""
    sizes = json.loads(sys.argv[1])
    threads = sizes.pop("threads")
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    layer = Layer(**sizes)
    full, narrow = Model(layer, threads), Model(Layer(**{**sizes, "d_ff": NARROW}), threads)
    random = np.random.default_rng(1)
    print(json.dumps({"ready": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens = random.integers(0, VOCABULARY, asked["tokens"])
        answer = {}
        if asked.get("check"):
            full.run(tokens)
            reference = layer.logits(tokens)
            answer["error"] = float(np.linalg.norm(full.logits(len(tokens)) - reference) / np.linalg.norm(reference))
        else:
            answer["layer"], answer["rest"] = full.run(tokens), narrow.run(tokens)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
