"""Projections to a narrower width that are drawn when they are spread over ranks already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel import harness
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moesaic import MoE, MoEConfig

D, NARROW = 12, 3


def drawn_in_parts(dtype: torch.dtype) -> list[Tensor]:
    """The usual way of FSDP2 to make a large model: nothing is anywhere whole before it is drawn."""
    with torch.device("meta"):
        config = MoEConfig(d_model=D, d_ff=20, num_experts=4, top_k=2, communication_width=NARROW)
        layer = MoE(config).to(dtype)
    fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    layer.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    whole = []
    for projection in (layer.descend, layer.ascend):
        assert projection is not None
        projection.reset_parameters()
        weight: Any = projection.weight
        assert isinstance(weight, DTensor)
        assert weight.to_local().shape[0] < weight.shape[0]
        whole.append(weight.full_tensor().detach().float())
    return whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_draw_their_parts_of_the_same_projections(dtype: torch.dtype) -> None:
    first, second = harness.pool(2).run(drawn_in_parts, dtype)
    error = 1e-6 if dtype == torch.float32 else 2e-2
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        product = one @ one.T if one.shape[0] == NARROW else one.T @ one
        torch.testing.assert_close(product, torch.eye(NARROW), atol=error, rtol=0)
