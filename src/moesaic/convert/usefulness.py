"""What each expert of a mixture does for a text: how often it is taken, with what weight, and how large its output is.

T tokens · D model width · E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.convert.streaming import StreamedModel, hooks
from moesaic.dispatch import Dispatch
from moesaic.errors import CheckpointError, UnsupportedError
from moesaic.experts import ExpertBank
from moesaic.hf.experts import weights_of
from moesaic.hf.placement import MoEBlock
from moesaic.inspect.likeness import expert_output

SAMPLE = 256
"""Tokens of each batch, evenly spread, whose outputs of all experts are looked at."""


class Use:
    """Sums over the tokens of one MoE layer; all ``[E]`` float64 but for ``outputs_ED``.

    ``counts_E``: tokens that take the expert. ``saliency_E``: the sum of routing weight x length of the expert's
    output. ``outputs_ED``: the sum of the expert's outputs over ``sampled`` tokens, which are the same for all experts.
    """

    def __init__(self, num_experts: int) -> None:
        self.sampled = 0
        self.counts_E, self.saliency_E = (torch.zeros(num_experts, dtype=torch.float64) for _ in range(2))
        self.outputs_ED: Tensor | None = None

    @property
    def reap_E(self) -> Tensor:
        """Mean of gate x ‖output‖ over the tokens that take the expert; 0 where none does.

        REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression, equation 9 (the text of the paper was read
        in excerpts, and the authors' code). The gate is the routing weight that the layer itself applies.
        """
        return self.saliency_E / self.counts_E.clamp(min=1)

    @property
    def mean_output_ED(self) -> Tensor:
        """Mean output of each expert over the sampled tokens, whoever takes them."""
        assert self.outputs_ED is not None
        return self.outputs_ED / max(1, self.sampled)


def measure_use(
    streamed: StreamedModel,
    blocks: Sequence[MoEBlock],
    batches: Iterable[Tensor],
    *,
    outputs: bool,
    say: Callable[[str], None] | None = None,
) -> dict[int, Use]:
    """Run ``batches`` (token ids ``[B, S]``) and sum up what the experts do, by the numbers of the decoder layers.

    Args:
        outputs: whether ``outputs_ED`` is wanted; it costs all experts' outputs for :data:`SAMPLE` tokens a batch.

    Raises:
        UnsupportedError: where a layer's experts cannot be watched.
        CheckpointError: where what they compute is not finite.
    """
    uses = {block.number: Use(block.num_experts) for block in blocks}
    modules = dict(streamed.model.named_modules())
    handles = []
    for name, block in streamed.experts_of(blocks).items():
        if not isinstance(modules[name], ExpertBank) and not hasattr(modules[name], "is_transposed"):
            raise UnsupportedError(
                f"{name} ({type(modules[name]).__name__}) cannot be watched: its experts stand apart"
            )
        handles.append(modules[name].register_forward_pre_hook(_watch(uses[block.number], outputs), with_kwargs=True))
    with hooks(handles):
        for number, ids_BS in enumerate(batches, 1):
            if say is not None:
                say(f"running text through the model (batch {number})")
            streamed.run(ids_BS)
            _check_finite(uses)
    return uses


def _check_finite(uses: Mapping[int, Use]) -> None:
    for number, use in uses.items():
        sums = [use.saliency_E, *([] if use.outputs_ED is None else [use.outputs_ED])]
        if not all(bool(values.isfinite().all()) for values in sums):
            raise CheckpointError(
                f"what the experts of layer {number} compute is not finite on the text: weights there or before are "
                "damaged, or too large for their dtype"
            )


def _watch(use: Use, outputs: bool) -> Any:
    def before(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(experts, ExpertBank):
            x_TD, dispatch = args
            weights = experts.weights()
        else:
            given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            x_TD, weights = given["hidden_states"], weights_of(experts)
            dispatch = Dispatch.from_slots(given["top_k_index"].long(), given["top_k_weights"], weights.num_experts)
        _add(use, x_TD, dispatch, weights)
        if outputs:
            _add_outputs(use, x_TD, weights)

    return before


def _add(use: Use, x_TD: Tensor, dispatch: Dispatch, weights: Any) -> None:
    slots, start = dispatch.permutation, 0
    gates_S = dispatch.weights.reshape(-1).double()
    for expert, end in enumerate(dispatch.offsets.tolist()):
        own = slots[start:end]
        own = own[own < len(gates_S)]  # rows that only fill a fixed capacity have a slot beyond the last one
        start = end
        if len(own):
            y_ND = expert_output(x_TD[own // dispatch.top_k], weights, expert)
            use.counts_E[expert] += len(own)
            use.saliency_E[expert] += (gates_S[own] * y_ND.float().norm(dim=-1).double()).sum()


def _add_outputs(use: Use, x_TD: Tensor, weights: Any) -> None:
    sample_SD = x_TD[:: max(1, len(x_TD) // SAMPLE)][:SAMPLE]
    sums = [expert_output(sample_SD, weights, e).double().sum(dim=0) for e in range(weights.num_experts)]
    use.outputs_ED = torch.stack(sums) + (0 if use.outputs_ED is None else use.outputs_ED)
    use.sampled += len(sample_SD)
