"""A warm start for distillation: what the experts say is fitted, layer by layer, to what the dense model has there.

T tokens · D model width · F hidden width of an expert · E experts · X hidden neurons of all experts, shared ones last ·
B passages · S their length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import CheckpointError, DataError
from moesaic.experts import ExpertBank
from moesaic.layer import MoE
from moesaic.routing import RoutePath

_TOKENS_AT_ONCE = 2048
RIDGE = 0.01
CLOSE = 0.01
"""An error from which on there is nothing to fit: in bfloat16 rounding alone makes up to half of it (SmolLM2-135M as
copies of its feed-forwards, which are the same function), and with many whole copies a fit takes long."""


@dataclass(frozen=True)
class Refit:
    """How far the layers' output is from the dense model's, as a share of its square: ``before`` and ``after``."""

    before: float
    after: float


@torch.no_grad()
def refit(
    student: Any,
    teacher: Any,
    ids_BS: Tensor,
    *,
    ridge: float = RIDGE,
    say: Callable[[int], None] | None = None,
) -> dict[int, Refit]:
    """Fit the down projections of each MoE layer of ``student`` by least squares; its routers stay as they are.

    The layers are gone through in order, each on what the layers before it, already fitted, hand it. The target is what
    brings the residual stream back to the teacher's after the same layer; so a layer also mends what those before it
    could not. Tokens count in inverse proportion to the mean square of the teacher's stream. The ridge draws the
    weights to what they were, not to 0 (output reconstruction on the pruned model's own inputs, as pruning by layers
    does it: SparseGPT, section 3.1; here for experts that a router switches).

    Under autocast the models run in its precision; what is fitted is float32.

    Layers that are no plain mixture (dense ones, experts with biases, of several sizes or kinds, several iterations)
    are passed over, and so are those whose error is below :data:`CLOSE` already, as copies of the feed-forward's is.

    Args:
        student: a :class:`moesaic.MoesaicForCausalLM`. teacher: transformers' dense model that it was made of.
        ids_BS: ``[B, S]`` int64, text.
        ridge: relative to the mean square of the hidden neurons.
        say: called with the number of each layer before its turn; what it raises goes through.

    Returns:
        What was reached, by layer.

    Raises:
        DataError: for too few tokens: fewer than a layer has hidden neurons that a token uses.
        CheckpointError: where a layer of one of them gives values that are not finite.
    """
    used = tokens_needed(student)
    if ids_BS.numel() < used:
        raise DataError(
            f"the warm start has {ids_BS.numel()} tokens: a layer has {used} hidden neurons to fit, so at least {used} "
            "are needed"
        )
    was_training = student.training
    student.eval()
    streams = _Streams(student, teacher, ids_BS)
    reached = {}
    for number, layer in enumerate(student.model.layers):
        if say is not None:
            say(number)
        found = streams.advance(number)
        if _is_plain(layer.mlp):
            with torch.autocast(ids_BS.device.type, enabled=False):  # a Gram matrix squares the condition
                reached[number] = _fit(layer.mlp, streams, found, ridge)
    student.train(was_training)
    return reached


def tokens_needed(student: Any) -> int:
    """The fewest tokens that :func:`refit` takes: the most hidden neurons that a token uses in one layer; 0 where there
    is nothing to fit."""
    return max((_used(layer.mlp) for layer in student.model.layers if _is_plain(layer.mlp)), default=0)


@dataclass
class _Found:
    """One layer's mixture on all tokens: what entered it, the routes' weights ``[T, E]``, what it said."""

    inputs_TD: Tensor
    weights_TE: Tensor
    said_TD: Tensor


class _Streams:
    """The residual streams of student and teacher, ``[B, S, D]``, between two layers."""

    def __init__(self, student: Any, teacher: Any, ids_BS: Tensor) -> None:
        self._models = student.model, teacher.model
        self.student_BSD = student.model.embed_tokens(ids_BS).float()
        self.teacher_BSD = teacher.model.embed_tokens(ids_BS)
        self._at_once = max(1, _TOKENS_AT_ONCE // ids_BS.shape[1])
        self._paths = [RoutePath(ids) for ids in ids_BS.split(self._at_once)]
        places_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        self._positions_1S = places_S.unsqueeze(0)
        self._mask_SS = _window(places_S, student.config.sliding_window)

    def advance(self, number: int) -> _Found:
        """Take both through the layer of that index."""
        student, teacher = (model.layers[number] for model in self._models)
        inputs: list[Tensor] = []
        weights: list[Tensor] = []
        said: list[Tensor] = []

        def note(mlp: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs.append(args[0].flatten(0, 1).float())
            said.append(output.flatten(0, 1).float())
            if isinstance(mlp, MoE) and mlp.last_routing is not None:
                routing = mlp.last_routing
                full_TE = torch.zeros(len(said[-1]), mlp.config.num_choices + 1, device=output.device)
                full_TE.scatter_add_(1, routing.expert_ids, routing.weights.float())
                weights.append(full_TE[:, :-1])  # the last one is the null slots'

        hook = student.mlp.register_forward_hook(note)
        try:
            for place, path in enumerate(self._paths):
                rows = slice(place * self._at_once, (place + 1) * self._at_once)
                self.student_BSD[rows] = self._through(0, student, self.student_BSD[rows], route_path=path).float()
                self.teacher_BSD[rows] = self._through(1, teacher, self.teacher_BSD[rows])
        finally:
            hook.remove()
        for whose, stream_BSD in (("student", self.student_BSD), ("teacher", self.teacher_BSD)):
            if not torch.isfinite(stream_BSD).all():
                raise CheckpointError(
                    f"what layer {number + 1} of the {whose} (model.layers.{number}) gives is not finite: weights "
                    "there or before are damaged"
                )
        return _Found(torch.cat(inputs), torch.cat(weights) if weights else torch.empty(0), torch.cat(said))

    def _through(self, which: int, layer: Any, hidden_BSD: Tensor, **more: Any) -> Tensor:
        positions = self._models[which].rotary_emb(hidden_BSD, self._positions_1S)
        found = layer(hidden_BSD, position_embeddings=positions, attention_mask=self._mask_SS, **more)
        after_BSD: Tensor = found[0] if isinstance(found, tuple) else found
        return after_BSD


def _window(places_S: Tensor, width: int | None) -> Tensor | None:
    """``[1, 1, S, S]`` boolean, where a token sees another one; None where that is all before it."""
    if width is None or len(places_S) <= width:
        return None
    back_SS = places_S[:, None] - places_S
    return ((back_SS >= 0) & (back_SS < width))[None, None]


def _fit(mlp: MoE, streams: _Streams, found: _Found, ridge: float) -> Refit:
    """Least squares for one mixture; the student's stream becomes what it is with the new weights."""
    student_TD, teacher_TD = streams.student_BSD.flatten(0, 1), streams.teacher_BSD.flatten(0, 1).float()
    target_TD = teacher_TD - (student_TD - found.said_TD)
    count_T1 = _count(teacher_TD)
    total = (target_TD.square() * count_T1).sum().clamp(min=1e-12)
    before = (((target_TD - found.said_TD).square() * count_T1).sum() / total).item()
    if before < CLOSE:
        return Refit(before, before)
    down_XD = _down(mlp)
    gram_XX = torch.zeros(len(down_XD), len(down_XD))
    missing_XD = torch.zeros_like(down_XD)
    parts = range(0, len(target_TD), _TOKENS_AT_ONCE)
    for rows in (slice(start, start + _TOKENS_AT_ONCE) for start in parts):
        hidden_TX = _hidden(mlp, found.inputs_TD[rows], found.weights_TE[rows])
        counted_XT = (hidden_TX * count_T1[rows]).T
        gram_XX += counted_XT @ hidden_TX
        missing_XD += counted_XT @ (target_TD[rows] - hidden_TX @ down_XD)
    gram_XX.diagonal().add_(ridge * gram_XX.diagonal().mean().clamp(min=1e-12))
    down_XD = down_XD + torch.linalg.solve(gram_XX, missing_XD)
    _set_down(mlp, down_XD)
    now_TD = torch.cat(
        [
            _hidden(mlp, found.inputs_TD[start : start + _TOKENS_AT_ONCE], weights_TE) @ down_XD
            for start, weights_TE in zip(parts, found.weights_TE.split(_TOKENS_AT_ONCE), strict=True)
        ]
    )
    after = ((target_TD - now_TD).square() * count_T1).sum() / total
    streams.student_BSD += (now_TD - found.said_TD).view_as(streams.student_BSD)
    return Refit(before, after.item())


def _count(stream_TD: Tensor) -> Tensor:
    """``[T, 1]``: how much each token counts."""
    return 1 / stream_TD.square().mean(dim=1, keepdim=True).clamp(min=1e-6)


def _is_plain(mlp: Any) -> bool:
    """Whether the output is linear in down projections that this file knows."""
    return (
        isinstance(mlp, MoE)
        and isinstance(mlp.experts, ExpertBank)
        and mlp.zero_computation is None
        and mlp.descend is None
        and mlp.config.iterations == 1
        and not mlp.config.bias
        and (mlp.shared is None or mlp.shared.gate is None)
    )


def _used(mlp: MoE) -> int:
    shared = 0 if mlp.shared is None else mlp.shared.down.in_features
    return mlp.config.top_k * int(mlp.experts.d_ff) + shared


def _hidden(mlp: MoE, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
    """``[T, X]`` float32: the hidden neurons, 0 in experts that a token does not use."""
    bank = mlp.experts
    own_TEF = bank.activation.apply((x_TD @ bank.up.flatten(0, 1).T.to(x_TD.dtype)).unflatten(1, bank.up.shape[:2]))
    hidden_TX: Tensor = (own_TEF.float() * weights_TE.unsqueeze(2)).flatten(1)
    if mlp.shared is None:
        return hidden_TX
    return torch.cat([hidden_TX, mlp.shared.activation.apply(mlp.shared.up(x_TD)).float()], dim=1)


def _down(mlp: MoE) -> Tensor:
    """``[X, D]`` float32."""
    rows = [mlp.experts.down.transpose(1, 2).flatten(0, 1)]
    if mlp.shared is not None:
        rows.append(mlp.shared.down.weight.T)
    return torch.cat(rows).float()


def _set_down(mlp: MoE, down_XD: Tensor) -> None:
    bank = mlp.experts
    routed = bank.num_experts * bank.d_ff
    bank.down.copy_(down_XD[:routed].view(bank.num_experts, bank.d_ff, -1).transpose(1, 2))
    if mlp.shared is not None:
        mlp.shared.down.weight.copy_(down_XD[routed:].T)
