"""Which experts a task uses: relevance scores, and the fewest experts that reach a threshold.

Source: Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning for Sparse Architectural Large Language Models,
sections on expert relevance scores (average gate score, token selection ratio) and on expert selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.dispatch import Dispatch
from moesaic.errors import ConfigError, DataError, UsageError
from moesaic.experts import ExpertBank
from moesaic.experts.unequal import UnequalExperts
from moesaic.hf.quantized import expert_modules
from moesaic.train.precision import autocast

Score = Literal["gate", "token"]


@torch.no_grad()
def score_experts(
    model: PreTrainedModel, batches: Iterable[Tensor], score: Score = "gate", precision: str = "fp32"
) -> dict[str, list[float]]:
    """How much each expert of each layer is used by a sample of a task's data.

    ``"gate"``: the mean over the tokens of the weight that the router gives the expert, 0 for tokens that do not take
    it. ``"token"``: the share of the tokens' slots that go to it. Both are divided by their sum over the layer's
    experts, so that a router whose weights do not add up to 1 changes nothing. Null slots, and slots that lost their
    expert to a capacity limit, count for nobody.

    The model runs as it is in inference, without gradients, and is left in the mode in which it came.

    Args:
        model: ours, or any of transformers whose experts take part in its experts interface.
        batches: token ids ``[B, S]`` int64, at least one.
        precision: ``"fp32"`` (as the weights are) or ``"bf16"`` (autocast).

    Returns:
        By the path of each experts module: one number per expert, 0 to 1, which add up to 1 over a layer: over the
        modules of which it has several, where its experts are of unequal size (:func:`of_layers`).

    Raises:
        UsageError: where the model has no experts.
        ConfigError: for another score or precision. DataError: where there are no tokens.
    """
    if score not in ("gate", "token"):
        raise ConfigError(f"score is {score!r}: it must be one of gate, token")
    modules = expert_modules(model)
    if not modules:
        raise UsageError(f"{type(model).__name__} has no experts to score: it is a dense model")
    sums: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(_watch(name, sums, score), with_kwargs=True)
        for name, module in modules.items()
    ]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with autocast(device, precision):
            for ids in batches:
                model.base_model(input_ids=ids.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    scores: dict[str, list[float]] = {}
    for layer, names in of_layers(model, modules).items():
        total = sum(float(sums[name].sum()) for name in names if name in sums)
        if not total > 0:
            raise DataError(f"no token of the data came to the experts of {layer}: they cannot be scored")
        scores |= {name: (sums[name] / total).tolist() for name in names}
    return scores


def of_layers(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """By the path of a layer's experts those of its experts modules, in order: one, or one for each run of experts of
    one size (:class:`moesaic.experts.unequal.UnequalExperts`)."""
    layers: dict[str, list[str]] = {}
    for name in names:
        whole = name.rpartition(".banks.")[0]
        is_part = bool(whole) and isinstance(model.get_submodule(whole), UnequalExperts)
        layers.setdefault(whole if is_part else name, []).append(name)
    return layers


def choose_experts(scores: Sequence[float], threshold: float) -> list[int]:
    """The ids, ascending, of the fewest experts whose scores add up to at least ``threshold``.

    They are taken in descending order of score, the lower id first among equals. An expert that was never used is not
    taken, whatever the threshold.

    Args:
        scores: of the experts of one layer, which add up to 1.
        threshold: above 0, at most 1; 1 takes every expert that was used.

    Raises:
        ConfigError: for a threshold out of range.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"the threshold is {threshold}: it must be above 0 and at most 1")
    chosen: list[int] = []
    reached = 0.0
    for expert in sorted(range(len(scores)), key=lambda expert: -scores[expert]):
        # For a threshold of 1 the last used expert would hang on how the sum was rounded.
        if (reached >= threshold and threshold < 1) or scores[expert] <= 0:
            break
        chosen.append(expert)
        reached += scores[expert]
    return sorted(chosen)


def _watch(name: str, sums: dict[str, Tensor], score: Score) -> Any:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dispatch = dispatch_of(module, args, kwargs)
        used_E = _gates(dispatch) if score == "gate" else _slots(dispatch)
        sums[name] = sums[name] + used_E if name in sums else used_E

    return before


def _gates(dispatch: Dispatch) -> Tensor:
    """``[E]`` float64: the sum of the weights of each expert's slots."""
    flat = torch.cat([dispatch.weights.double().reshape(-1), dispatch.weights.new_zeros(1, dtype=torch.float64)])
    # One place more takes the rows that belong to nobody.
    sums = flat.new_zeros(dispatch.num_experts + 1)
    sums.index_add_(0, dispatch.expert_of_row(), flat[dispatch.permutation])
    return sums[:-1].cpu()


def _slots(dispatch: Dispatch) -> Tensor:
    """``[E]`` float64: the number of each expert's slots; not of its rows, some of which may be padding."""
    real = dispatch.permutation < dispatch.num_tokens * dispatch.top_k
    counts = torch.bincount(dispatch.expert_of_row()[real], minlength=dispatch.num_experts + 1)
    return counts[: dispatch.num_experts].double().cpu()


def dispatch_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dispatch:
    """Which tokens go to which expert, from what an experts module is called with."""
    if isinstance(module, ExpertBank):
        return args[1] if len(args) > 1 else kwargs["dispatch"]  # type: ignore[no-any-return]
    given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
    experts = num_experts(module)
    return Dispatch.from_slots(given["top_k_index"].long(), given["top_k_weights"], experts)


def num_experts(module: nn.Module) -> int:
    """The experts whose weights a module holds: the first dimension of each of its own parameters or buffers."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return int(own[0].shape[0])
