"""WHO: token features to a :class:`Routing` (expert ids, weights, scores), its capacity and its balancing.

T tokens · D model width · E experts · K slots per token. A router is one file here that registers itself; the import
below is its one registration.
"""

from __future__ import annotations

from moesaic.routing import (  # noqa: F401  (each registers its router)
    budget,
    cosine,
    expert_choice,
    expert_skipping,
    gating_residual,
    given,
    hash,
    locality,
    noisy_topk,
    null_experts,
    recurrent,
    relu,
    sigmoid_topk,
    softmax_topk,
    top_p,
    tsallis,
    unit_topk,
)
from moesaic.routing.balancing import BALANCERS, Balancer, balance_loss, check_balancing
from moesaic.routing.capacity import expert_capacity, limit_capacity
from moesaic.routing.context import RoutePath, RoutingContext
from moesaic.routing.layer_balancing import LayerBalancing, counting
from moesaic.routing.locality import chunk_sparsity, token_sparsity
from moesaic.routing.router import ROUTERS, Router, create_router
from moesaic.routing.routing import Routing

__all__ = [
    "BALANCERS",
    "ROUTERS",
    "Balancer",
    "LayerBalancing",
    "RoutePath",
    "Router",
    "Routing",
    "RoutingContext",
    "available",
    "balance_loss",
    "check_balancing",
    "chunk_sparsity",
    "counting",
    "create_router",
    "expert_capacity",
    "limit_capacity",
    "token_sparsity",
]


def available() -> list[str]:
    """Names of the routers that ``MoEConfig(router=NAME)`` accepts."""
    return ROUTERS.names()
