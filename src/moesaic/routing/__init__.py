"""WHO: token features to a :class:`Routing` (expert ids, weights, scores), its capacity and its balancing.

T tokens · D model width · E experts · K slots per token. A router is one file here that registers itself; the import
below is its one registration.
"""

from __future__ import annotations

from moesaic.routing import given, sigmoid_topk, softmax_topk  # noqa: F401  (each registers its router)
from moesaic.routing.balancing import BALANCERS, Balancer, acts_after_step, balance_loss, check_balancing
from moesaic.routing.capacity import expert_capacity, limit_capacity
from moesaic.routing.context import RoutePath, RoutingContext
from moesaic.routing.router import ROUTERS, Router, create_router
from moesaic.routing.routing import Routing

__all__ = [
    "BALANCERS",
    "ROUTERS",
    "Balancer",
    "RoutePath",
    "Router",
    "Routing",
    "RoutingContext",
    "acts_after_step",
    "available",
    "balance_loss",
    "check_balancing",
    "create_router",
    "expert_capacity",
    "limit_capacity",
]


def available() -> list[str]:
    """Names of the routers that ``MoEConfig(router=NAME)`` accepts."""
    return ROUTERS.names()
