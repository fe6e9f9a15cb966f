"""Ours under each backend and transformers' own implementations, on one experts module of transformers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moesaic.bench.shapes import Shape
from moesaic.bench.timing import timed
from moesaic.bench.workload import Bank, Call
from moesaic.experts import use_backend


class Contender(Protocol):
    """Computes the experts of one call; ``output`` for checking, ``seconds`` for timing."""

    def output(self, call: Call) -> Tensor:
        """``[T, D]``."""
        ...

    def seconds(self, call: Call) -> float:
        """How long one run took."""
        ...


class ModuleContender:
    """An experts module of transformers, called as a model calls it.

    Args:
        implementation: what ``experts_implementation`` says.
        backend: our backend, where the implementation is ``"moesaic"``.
    """

    def __init__(self, shape: Shape, banks: list[Bank], implementation: str, backend: str | None = None) -> None:
        self.modules = [experts_module(shape, bank, implementation) for bank in banks]
        self.backend = backend

    def output(self, call: Call) -> Tensor:
        """``[T, D]``."""
        if self.backend is None:
            return self._run(call)
        with use_backend(self.backend):
            return self._run(call)

    def seconds(self, call: Call) -> float:
        """One forward, without gradients; setting the backend is not part of it."""
        if self.backend is None:
            return timed(lambda: self._run(call))
        with use_backend(self.backend):
            return timed(lambda: self._run(call))

    @torch.inference_mode()
    def _run(self, call: Call) -> Tensor:
        out: Tensor = self.modules[call.bank](call.x, call.ids, call.weights)
        return out


def experts_module(shape: Shape, bank: Bank, implementation: str) -> nn.Module:
    """transformers' experts of OLMoE around the weights of ``bank``; no copy."""
    import moesaic.hf  # noqa: F401  (registers the implementation "moesaic")

    config = OlmoeConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: nn.Module = OlmoeExperts(config)
    module.gate_up_proj = nn.Parameter(bank.up, requires_grad=False)
    module.down_proj = nn.Parameter(bank.down, requires_grad=False)
    return module
