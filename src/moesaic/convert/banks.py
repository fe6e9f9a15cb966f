"""What a layer of experts consists of on disk: two fused matrices of whole feed-forwards, and a fresh router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moesaic.convert.dense import DenseModel
from moesaic.convert.meter import watch
from moesaic.convert.seeds import generator
from moesaic.convert.source import TensorSource
from moesaic.convert.writing import Output
from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.hf.configuration import MoesaicConfig
from moesaic.routing import Router, Routing, RoutingContext, create_router

Fill = Callable[[int, Tensor], None]
"""Writes the expert of that number into its part of the bank: ``[2F, D]`` (the gate first), or ``[D, F]``."""


@dataclass(frozen=True)
class FreshRouters:
    """Routers that know nothing yet, one a layer.

    Args:
        router: a name of ``moesaic.routing.available()``; ``options`` are its own. The weights of a token's experts
            must sum to 1: only then do experts that agree give what one of them would.
        num_experts: E. top_k: K.
        std: of the normal distribution that the gates are drawn from.

    Raises:
        ConfigError: for a router, or options of it, that do not exist, whose weights do not sum to 1, or that shares
            parts between layers.
    """

    router: str
    options: Mapping[str, Any]
    num_experts: int
    top_k: int
    std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        router = self._build(16, 0)
        if type(router).follow is not Router.follow:
            raise ConfigError(f"the router {self.router!r} shares parts between layers: a fresh one here stands alone")
        if not _sums_to_one(router.eval(), self.num_experts):
            raise ConfigError(
                f"the weights of the router {self.router!r} do not sum to 1 over a token's experts: experts that agree "
                "would not give what one of them gives; allowed is 'softmax_topk', or another whose weights do"
            )

    def outputs(self, layer: int, d_model: int, dtype: torch.dtype) -> list[Output]:
        """The tensors of the layer's router; gates in ``dtype``, buffers as the router keeps them."""
        with torch.device("meta"):
            router = create_router(self.router, d_model, self.num_experts, self.top_k, **self.options)
        outputs = []
        for name, tensor in router.state_dict().items():
            kept = dtype if name in dict(router.named_parameters()) else tensor.dtype

            def make(name: str = name, kept: torch.dtype = kept) -> Tensor:
                made: Tensor = self.build(layer, d_model).state_dict()[name].to(kept)
                return made

            outputs.append(Output(f"model.layers.{layer}.mlp.router.{name}", tuple(tensor.shape), kept, make))
        return outputs

    def build(self, layer: int, d_model: int) -> Router:
        """The layer's router in float32, the same one whenever it is asked for."""
        return self._build(d_model, layer)

    def _build(self, d_model: int, layer: int) -> Router:
        seed = generator(self.seed, "router", layer).initial_seed()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = create_router(self.router, d_model, self.num_experts, self.top_k, **self.options)
            router.reset_parameters(self.std)
        return router


@dataclass(frozen=True)
class Experts:
    """How the experts of a converted model are routed, as its configuration names it.

    Args:
        balancing: what keeps the fresh routers even once they are trained, as :class:`moesaic.MoEConfig` takes it.
    """

    routers: FreshRouters
    balancing: Mapping[str, Any] = field(default_factory=dict)

    def config(self, dense: DenseModel) -> MoesaicConfig:
        """The configuration of ``dense`` with experts as wide as its feed-forward.

        Raises:
            ConfigError: for settings that do not go together.
        """
        return dense.moe_config(
            num_experts=self.routers.num_experts,
            num_experts_per_tok=self.routers.top_k,
            moe_intermediate_size=dense.d_ff,
            router=self.routers.router,
            router_options=dict(self.routers.options),
            balancing=dict(self.balancing),
        )


def bank_outputs(dense: DenseModel, layer: int, num_experts: int, fill_up: Fill, fill_down: Fill) -> list[Output]:
    """``experts.up`` ``[E, 2F, D]`` and ``experts.down`` ``[E, D, F]`` of a layer, filled an expert at a time.

    Args:
        fill_up, fill_down: called with each expert's number and its part of the matrix, in the dtype of ``dense``.
    """
    prefix = f"model.layers.{layer}.mlp.experts"
    up, down = (2 * dense.d_ff, dense.d_model), (dense.d_model, dense.d_ff)
    return [
        _bank(f"{prefix}.up", (num_experts, *up), dense.dtype, fill_up),
        _bank(f"{prefix}.down", (num_experts, *down), dense.dtype, fill_down),
    ]


def _bank(name: str, shape: tuple[int, int, int], dtype: torch.dtype, fill: Fill) -> Output:
    def make() -> Tensor:
        bank = watch(torch.empty(shape, dtype=dtype))
        for expert in range(shape[0]):
            fill(expert, bank[expert])
        return bank

    return Output(name, shape, dtype, make)


def sound(source: TensorSource, name: str, rows: slice | None = None) -> Tensor:
    """A tensor of a model, or some rows of it, as it is.

    Raises:
        CheckpointError: where a value is not finite, or the tensor cannot be read.
    """
    tensor = source.read(name, rows)
    ends = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())  # without a copy of the tensor
    if not (torch.isfinite(ends.min) and torch.isfinite(ends.max)):
        raise CheckpointError(f"{str(source.path)!r} is damaged: {name} holds values that are not finite")
    return tensor


def copied(dense: DenseModel, name: str) -> Output:
    """A tensor of the dense model as it is."""
    source = dense.source
    return Output(name, source.shape(name), source.dtype(name), lambda: sound(source, name))


def ask(router: Router, x_TD: Tensor) -> Routing:
    """The routes of tokens with these features, and nothing else that is known of them."""
    routing: Routing = router(x_TD, None, RoutingContext()) if router.reads_context else router(x_TD)
    return routing


def _sums_to_one(router: Router, num_experts: int) -> bool:
    """Whether the weights of every token's experts sum to 1, by trying it on random features."""
    x_TD = torch.randn(64, router.d_model, generator=generator("features"))
    try:
        with torch.no_grad():
            routing = ask(router, x_TD)
    except MoesaicError:  # it decides by more than features
        return False
    weights_TK = torch.where(routing.expert_ids < num_experts, routing.weights.float(), 0.0)
    return bool(torch.allclose(weights_TK.sum(dim=1), torch.ones(64), atol=1e-5))
