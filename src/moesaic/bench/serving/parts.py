"""The parts of the benchmark, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moesaic.bench.part import Part
from moesaic.bench.serving.arrivals import run_stall
from moesaic.bench.serving.decode import run_decode
from moesaic.bench.serving.mixtures import run_adapters
from moesaic.bench.serving.prefixes import run_prefixes
from moesaic.bench.serving.throughput import run_batching, run_demo, run_servers, run_vllm

Run = Callable[[Path, Callable[[str], None]], Part]

DEMO = "demo"
"""The part that runs the demo model; all others run the OLMoE-shaped one."""

PARTS: dict[str, Run] = {
    "batching": run_batching,
    "servers": run_servers,
    "vllm": run_vllm,
    DEMO: run_demo,
    "adapters": run_adapters,
    "decode": run_decode,
    "prefixes": run_prefixes,
    "stall": run_stall,
}
