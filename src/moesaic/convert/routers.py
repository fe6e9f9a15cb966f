"""The first routers of a split model: which experts give most of the dense layer's output, told from the token.

T tokens · D model width · F hidden neurons · E experts · K slots per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.convert.activations import FeedForward, check_finite
from moesaic.convert.clustering import Ints, assign

_RIDGE = 1e-2
_JUDGED = 2048


@dataclass(frozen=True)
class Gate:
    """``weight`` ``[E, D]`` and ``bias`` ``[E]``, float32: of the logits of a ``unit_topk`` router."""

    weight: Tensor
    bias: Tensor

    def logits(self, x_TD: Tensor) -> Tensor:
        """``[T, E]`` float32."""
        return F.linear(x_TD.float(), self.weight, self.bias)


def contributions(layer: FeedForward, members_EX: Tensor) -> Tensor:
    """``[T, E]`` float32: the norm of each expert's output, as a share of the mean over a token's experts.

    Args:
        members_EX: ``[E, F/E]`` int64, the hidden neurons of each expert.
    """
    norms = []
    for rows in layer.chunks():
        hidden_TF = layer.hidden(rows)
        norms.append(torch.stack([_output(layer, hidden_TF, own).norm(dim=1) for own in members_EX], dim=1))
    norms_TE = torch.cat(norms)
    check_finite(norms_TE, layer.layer, "the square of an expert's output", norms_TE.dtype)
    return norms_TE / norms_TE.mean(dim=1, keepdim=True).clamp(min=1e-20)


class GateFit:
    """Linear gates by least squares on one set of features ``x_TD`` (``[T, D]``).

    MoEfication: Transformer Feed-forward Layers are Mixtures of Experts trains a network to tell how much an expert's
    neurons are active; this is a linear one, in one step.
    """

    def __init__(self, x_TD: Tensor) -> None:
        self._x_TD = x_TD.to(torch.float64, copy=True)
        self._mean_D = self._x_TD.mean(dim=0)
        self._x_TD -= self._mean_D
        gram_DD = self._x_TD.T @ self._x_TD
        gram_DD /= len(x_TD)
        gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean().clamp(min=1e-12))
        self._factor_DD = torch.linalg.cholesky(gram_DD)

    def gate(self, wanted_TE: Tensor, top_k: int) -> Gate:
        """The gate whose logits are nearest to 1 for the ``top_k`` experts of a token with the largest ``wanted_TE``,
        and to 0 for the others, with a ridge of a hundredth of the features' mean square. The logits are then moved and
        scaled to mean 0 and deviation 1 over all tokens and experts."""
        y_TE = largest(wanted_TE, top_k).double()
        mean_E = y_TE.mean(dim=0)
        covariance_DE = self._x_TD.T @ (y_TE - mean_E) / len(y_TE)
        weight_DE = torch.cholesky_solve(covariance_DE, self._factor_DD)
        logits_TE = self._x_TD @ weight_DE + mean_E
        deviation = logits_TE.std().clamp(min=1e-12)
        bias_E = (mean_E - self._mean_D @ weight_DE - logits_TE.mean()) / deviation
        return Gate((weight_DE.T / deviation).float().contiguous(), bias_E.float())


def explained(layer: FeedForward, shared_X: Tensor, members_EX: Tensor, choice_TE: Tensor, top_k: int) -> float:
    """Share of the square of a token's dense output that is there with the ``top_k`` experts of the largest
    ``choice_TE`` and the shared one, the mean over at most 2,048 tokens: 1 is all of it, 0 as much as no feed-forward
    at all has."""
    step = -(-len(layer.inputs) // _JUDGED)
    rows = slice(None, None, step)
    hidden_TF = layer.hidden(rows)
    whole_TD = F.linear(hidden_TF, layer.down.float())
    is_chosen_TE = largest(choice_TE[rows], top_k)
    kept_TF = torch.zeros_like(hidden_TF)
    kept_TF[:, shared_X] = hidden_TF[:, shared_X]
    kept_TF[:, members_EX.flatten()] = hidden_TF[:, members_EX.flatten()] * is_chosen_TE.repeat_interleave(
        members_EX.shape[1], dim=1
    )
    error_T = (whole_TD - F.linear(kept_TF, layer.down.float())).square().sum(dim=1)
    whole_T = whole_TD.square().sum(dim=1)
    check_finite(whole_T, layer.layer, "the square of the feed-forward's output", whole_T.dtype)
    return float(1 - (error_T / whole_T.clamp(min=1e-20)).mean())


def align(target_TE: Tensor, common_TE: Tensor) -> Ints:
    """``[E]``: which of this layer's experts takes the place of each of the experts of the layers before, so that they
    are wanted by the same tokens (largest sum of correlations)."""
    correlation_EE = standardized(common_TE).T @ standardized(target_TE) / len(target_TE)
    return assign(-correlation_EE.double().numpy(), [1] * correlation_EE.shape[1])


def largest(wanted_TE: Tensor, top_k: int) -> Tensor:
    """``[T, E]`` float32: 1 for the ``top_k`` largest of each row, else 0."""
    return torch.zeros(wanted_TE.shape).scatter_(1, wanted_TE.topk(top_k, dim=1).indices, 1.0)


def standardized(target_TE: Tensor) -> Tensor:
    """Each column with mean 0 and deviation 1."""
    centered_TE = target_TE - target_TE.mean(dim=0)
    return centered_TE / centered_TE.std(dim=0).clamp(min=1e-12)


def _output(layer: FeedForward, hidden_TF: Tensor, own: Tensor) -> Tensor:
    return F.linear(hidden_TF[:, own], layer.down[:, own].float())
