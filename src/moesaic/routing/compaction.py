"""Fewer slots a token, where a router has far more of them than tokens use: null slots are not even carried along.

T tokens · E experts · K slots per token.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from moesaic.eager import is_eager
from moesaic.routing.routing import Routing

_FEW = 1024
"""Slots: with fewer, looking for null ones takes as long as carrying them along."""


def compact(routing: Routing) -> Routing:
    """The same experts and weights for every token in fewer slots: as many as the token with most experts uses.

    A token's experts come first, in the order in which they stood, then its null slots. So a router with a slot for
    each expert (ReLU routing, expert choice) costs what its experts cost, and not E-wide sums of mostly nothing. It
    hangs on values, hence only on a CPU, where nothing waits for them, and not while anything compiles or traces;
    elsewhere, and where some token uses all slots, the routing comes back as it is. ``weights`` keep their graph.
    """
    ids_TK = routing.expert_ids
    num_tokens, top_k = ids_TK.shape
    if num_tokens * top_k < _FEW or top_k == 1 or ids_TK.device.type != "cpu" or not is_eager(ids_TK):
        return routing
    real = ids_TK.numpy() < routing.num_experts
    per_token = np.count_nonzero(real, axis=1)
    most = max(1, int(per_token.max()))
    if most == top_k:
        return routing
    token, slot = real.nonzero()
    place = np.arange(len(token)) - np.repeat(per_token.cumsum() - per_token, per_token)
    # Every token with room to fill has a null slot, for it has fewer experts than the most, which are fewer than K.
    order = np.repeat(real.argmin(axis=1)[:, None], most, axis=1)
    order[token, place] = slot
    order_TK = torch.from_numpy(order)
    return replace(routing, expert_ids=ids_TK.gather(1, order_TK), weights=routing.weights.gather(1, order_TK))
