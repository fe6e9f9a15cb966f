"""A token's features, its routing weights and its expert ids as one row, so that one exchange moves all of them.

N rows · K slots per token · D model width · C columns of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.parallel.workload import Workload


def _columns(workload: Workload) -> tuple[int, int]:
    """Columns of a row, and how many of them weights and ids take; these stand first, where they are aligned."""
    return workload.row_bytes // workload.dtype.itemsize, workload.meta_bytes // workload.dtype.itemsize


def _words(workload: Workload) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of weights and ids."""
    return (torch.float64, torch.int64) if workload.dtype == torch.float64 else (torch.float32, torch.int32)


def pack(workload: Workload, x_ND: Tensor, weights_NK: Tensor, ids_NK: Tensor | None = None) -> Tensor:
    """``[N, C]``; gradients travel in the same form, without ids."""
    columns, meta = _columns(workload)
    weight_dtype, id_dtype = _words(workload)
    rows_NC = x_ND.new_empty(x_ND.shape[0], columns)
    rows_NC[:, meta : meta + x_ND.shape[1]] = x_ND
    rows_NC[:, :meta].view(weight_dtype)[:, : workload.top_k] = weights_NK
    if ids_NK is not None:
        rows_NC[:, :meta].view(id_dtype)[:, workload.top_k :] = ids_NK
    return rows_NC


def unpack(workload: Workload, rows_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[N, D]``, weights ``[N, K]`` and ids ``[N, K]`` int64."""
    _, meta = _columns(workload)
    weight_dtype, id_dtype = _words(workload)
    x_ND = rows_NC[:, meta : meta + workload.d_model].contiguous()
    weights_NK = rows_NC[:, :meta].view(weight_dtype)[:, : workload.top_k].contiguous()
    return x_ND, weights_NK, rows_NC[:, :meta].view(id_dtype)[:, workload.top_k :].long()
