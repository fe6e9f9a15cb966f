"""Many requests, one model: the engine, and the server around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesaic.serve.request import (
    EngineSettings,
    EngineStats,
    Output,
    Request,
    SamplingParams,
    TokenLogprob,
    UnknownAdapterError,
)

if TYPE_CHECKING:
    from moesaic.serve.engine import Engine

__all__ = [
    "Engine",
    "EngineSettings",
    "EngineStats",
    "Output",
    "Request",
    "SamplingParams",
    "TokenLogprob",
    "UnknownAdapterError",
]


def __getattr__(name: str) -> Any:
    # With it come torch and transformers, and the command line reads settings before it needs these.
    if name == "Engine":
        from moesaic.serve.engine import Engine

        return Engine
    raise AttributeError(f"module 'moesaic.serve' has no attribute {name!r}")
