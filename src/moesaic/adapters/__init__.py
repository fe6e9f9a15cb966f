"""Fine-tuned variants of a model: whole experts or low-rank parts, trained, saved, merged and served.

A fine-tuning method is one file here that registers itself; the import below is its one registration.
"""

from __future__ import annotations

from moesaic.adapters import esft, full, lora_method  # noqa: F401  (each registers its method)
from moesaic.adapters.folder import AdapterLayer, Base, ExpertAdapter, adapter_folder, read_adapter, write_adapter
from moesaic.adapters.merging import LoadedAdapter, load, merge
from moesaic.adapters.methods import available
from moesaic.adapters.pool import AdapterPool, PoolMemory, Prepared
from moesaic.adapters.scoring import choose_experts, score_experts

__all__ = [
    "AdapterLayer",
    "AdapterPool",
    "Base",
    "ExpertAdapter",
    "LoadedAdapter",
    "PoolMemory",
    "Prepared",
    "adapter_folder",
    "available",
    "choose_experts",
    "load",
    "merge",
    "read_adapter",
    "score_experts",
    "write_adapter",
]
