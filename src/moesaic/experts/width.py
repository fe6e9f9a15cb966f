"""The projections that lead to a narrower width before the experts, and back behind them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WidthProjection(nn.Linear):
    """A linear map between two widths, without bias, that begins with orthonormal rows or columns.

    Two such maps stand in series with the experts (BigMac: A Communication-Efficient Mixture-of-Experts Model
    Structure for Fast Training and Inference). Drawn like the other weights, with a small standard deviation, each
    would shrink what passes through it; orthonormal ones keep lengths, as far as the narrower width can hold them.
    How the paper's begin is not known to us.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self) -> None:
        """Orthonormal rows, or columns where there are more rows; drawn in float32 whatever the weight's dtype.

        Of a weight that is spread over ranks (a ``DTensor``) each gets its part of what the mesh's first rank drew: all
        of them must call this together.
        """
        drawn = torch.empty(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        with torch.no_grad():
            self.weight.copy_(_spread_like(self.weight, nn.init.orthogonal_(drawn)))


def _spread_like(weight: Tensor, drawn: Tensor) -> Tensor:
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return drawn
    from torch.distributed.tensor import distribute_tensor  # only where its import has been paid for

    return distribute_tensor(drawn, mesh, weight.placements)  # type: ignore[attr-defined]
