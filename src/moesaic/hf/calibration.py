"""Which inputs of the experts matter: their second moments over a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moesaic.dispatch import Dispatch
from moesaic.errors import ConfigError
from moesaic.experts import ExpertBank, ExpertWeights
from moesaic.experts.storage import ExpertStorage
from moesaic.hf.experts import weights_of

# An expert that few tokens reach is judged by what all experts of its layer see: as if so many more rows, with the
# layer's mean, had come to it.
_PRIOR_ROWS = 16.0


@torch.no_grad()
def importance_of(
    model: nn.Module, stores: Mapping[str, ExpertStorage], batches: Iterable[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean squares of what goes into each expert's up (``[E, D]``) and down (``[E, F]``), by the names of ``stores``.

    llama.cpp's importance matrix, per expert; the diagonal of the Hessian of GPTQ: Accurate Post-Training Quantization
    for Generative Pre-trained Transformers, section 3.

    Args:
        batches: token ids ``[B, S]``, given to the model one by one.

    Raises:
        ConfigError: where the model takes no token ids, or there are none.
    """
    moments = {name: _Moments() for name in stores}
    hooks = [store.register_forward_pre_hook(_watch(moments[name])) for name, store in stores.items()]
    was_training = model.training
    model.eval()
    try:
        for number, ids in enumerate(batches):
            if not isinstance(model, PreTrainedModel) or ids.ndim != 2 or ids.dtype.is_floating_point:
                raise ConfigError(
                    f"calibration is for a language model and takes token ids [B, S]: batch {number} is "
                    f"{ids.dtype} of shape {list(ids.shape)}, for {type(model).__name__}"
                )
            model(input_ids=ids.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    if not all(each.rows is not None for each in moments.values()):
        raise ConfigError("calibration has no token ids, or no token came to some layer's experts")
    return {name: each.importance() for name, each in moments.items()}


class _Moments:
    """Sums over the rows of each expert of one layer."""

    rows: Tensor | None = None
    up_ED: Tensor
    down_EF: Tensor

    def add(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> None:
        if self.rows is None:
            self.rows = x_TD.new_zeros(weights.num_experts, dtype=torch.float32)
            self.up_ED = self.rows.new_zeros(weights.num_experts, weights.d_model)
            self.down_EF = self.rows.new_zeros(weights.num_experts, weights.d_ff)
        x_ND, start = dispatch.gather(x_TD), 0
        for expert, end in enumerate(dispatch.offsets.tolist()):
            if end > start:
                bias = None if weights.up_bias is None else weights.up_bias[expert]
                h_NF = weights.activation.apply(F.linear(x_ND[start:end], weights.up_GD(expert, x_TD.dtype), bias))
                self.rows[expert] += end - start
                self.up_ED[expert] += x_ND[start:end].float().square().sum(dim=0)
                self.down_EF[expert] += h_NF.float().square().sum(dim=0)
                start = end

    def importance(self) -> tuple[Tensor, Tensor]:
        assert self.rows is not None
        rows_E1 = self.rows.unsqueeze(1)
        up, down = (
            (sums + _PRIOR_ROWS * sums.sum(dim=0) / rows_E1.sum().clamp(min=1)) / (rows_E1 + _PRIOR_ROWS)
            for sums in (self.up_ED, self.down_EF)
        )
        return up, down


def _watch(moments: _Moments) -> Any:
    def before(store: ExpertStorage, inputs: tuple[Any, ...]) -> None:
        if isinstance(store, ExpertBank):
            x_TD, dispatch = inputs
            moments.add(x_TD, dispatch, store.weights())
        else:
            hidden_states, ids_TK, weights_TK = inputs
            weights = weights_of(store)
            moments.add(hidden_states, Dispatch.from_slots(ids_TK.long(), weights_TK, weights.num_experts), weights)

    return before
