"""vLLM's engine in a process of its own: ``python vllm_worker.py FOLDER``, for another Python as well.

Says ``{"ready": version}``, and then answers each line of standard input, a JSON list of ``[prompt ids, new tokens]``,
with a line of JSON: the seconds that all of them took together, and how many tokens were made.

Imports nothing of moesaic: the Python that has vLLM need not have it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

KV_GIB = "2"
CONTEXT = 1024
SEQUENCES = 64


def main() -> None:
    """Answer until standard input ends."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", KV_GIB)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    # This file's folder has modules of the names of others.
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    vllm = importlib.import_module("vllm")

    model = vllm.LLM(
        sys.argv[1],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=SEQUENCES,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    run(vllm, model, [[list(range(1, 17)), 2]])
    print(json.dumps({"ready": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        new = run(vllm, model, json.loads(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "new": new}), file=answers, flush=True)


def run(vllm: Any, model: Any, jobs: list[Any]) -> int:
    """How many tokens were made."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in jobs]
    params = [vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in jobs]
    return sum(len(each.outputs[0].token_ids) for each in model.generate(prompts, params, use_tqdm=False))


if __name__ == "__main__":
    main()
