"""Every router that may generate text decides for a token alone, to the bit, whoever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.experts.native.problems import needs_library
from torch import Tensor

from moesaic.routing import ROUTERS, RoutingContext, create_router
from moesaic.serve.isolation import isolated

pytestmark = needs_library
NAMES = [name for name in ROUTERS.names() if ROUTERS.get(name).is_causal and name != "given"]
FIELDS = ("expert_ids", "weights", "scores", "logits", "carry")


def rows_of(router: Any, x_TD: Tensor, ids_T: Tensor, carried_TX: Tensor | None) -> dict[str, Tensor]:
    arguments = (None, RoutingContext(token_ids=ids_T, carried=carried_TX)) if router.reads_context else ()
    routing = router(x_TD, *arguments)
    return {field: value for field in FIELDS if (value := getattr(routing, field)) is not None}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [3, 65, 257])
def test_a_token_is_routed_alone(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    router = create_router(name, 48, 8, 4).eval()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, ids = torch.randn(tokens, 48), torch.randint(100, (tokens,))
    with torch.no_grad(), isolated():
        carried = rows_of(router, torch.randn(tokens, 48), ids, None).get("carry")
        together = rows_of(router, x, ids, carried)
        for t in range(0, tokens, 1 + tokens // 40):
            here = slice(t, t + 1)
            alone = rows_of(router, x[here], ids[here], None if carried is None else carried[here])
            assert all(torch.equal(together[field][here], value) for field, value in alone.items())
