"""moesaic runs mixture-of-experts models that adapt while they run.

``import moesaic`` registers the experts implementation ``"moesaic"`` and the model ``MoesaicForCausalLM`` with
transformers; the names below are the public surface, loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moesaic.after_import import after_import

if TYPE_CHECKING:
    from moesaic import adapters, autotune, experts, hf, parallel, routing, serve
    from moesaic.config import MoEConfig
    from moesaic.dispatch import Dispatch
    from moesaic.errors import MoesaicError
    from moesaic.experts import ExpertBank, use_backend
    from moesaic.hf import (
        MoesaicConfig,
        MoesaicForCausalLM,
        QuantizationConfig,
        Rewirer,
        Rewiring,
        freeze,
        quantize,
    )
    from moesaic.hf.parallelize import parallelize
    from moesaic.hf.reroute import reroute
    from moesaic.layer import MoE, update_balancing
    from moesaic.parallel.setting import use_strategy
    from moesaic.routing import Routing

# Where each public name lives; None for a subpackage.
_HOMES: dict[str, str | None] = {
    "Dispatch": "moesaic.dispatch",
    "ExpertBank": "moesaic.experts",
    "MoE": "moesaic.layer",
    "MoEConfig": "moesaic.config",
    "MoesaicConfig": "moesaic.hf",
    "MoesaicError": "moesaic.errors",
    "MoesaicForCausalLM": "moesaic.hf",
    "QuantizationConfig": "moesaic.hf",
    "Rewirer": "moesaic.hf",
    "Rewiring": "moesaic.hf",
    "Routing": "moesaic.routing",
    "adapters": None,
    "autotune": None,
    "experts": None,
    "freeze": "moesaic.hf",
    "hf": None,
    "parallel": None,
    "parallelize": "moesaic.hf.parallelize",
    "quantize": "moesaic.hf",
    "reroute": "moesaic.hf.reroute",
    "routing": None,
    "serve": None,
    "update_balancing": "moesaic.layer",
    "use_backend": "moesaic.experts",
    "use_strategy": "moesaic.parallel.setting",
}

__all__ = [
    "Dispatch",
    "ExpertBank",
    "MoE",
    "MoEConfig",
    "MoesaicConfig",
    "MoesaicError",
    "MoesaicForCausalLM",
    "QuantizationConfig",
    "Rewirer",
    "Rewiring",
    "Routing",
    "adapters",
    "autotune",
    "experts",
    "freeze",
    "hf",
    "parallel",
    "parallelize",
    "quantize",
    "reroute",
    "routing",
    "serve",
    "update_balancing",
    "use_backend",
    "use_strategy",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("moesaic")
    if name not in _HOMES:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    home = _HOMES[name]
    value = importlib.import_module(f"moesaic.{name}") if home is None else getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


after_import("transformers", lambda: importlib.import_module("moesaic.hf"))
