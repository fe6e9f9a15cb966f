"""A model made ready for inference: :func:`freeze`."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.experts import ExpertBank, ExpertWeights
from moesaic.experts.native.memory import inputs_last, use_huge_pages
from moesaic.few_tokens import few_tokens_of
from moesaic.hf.experts import weights_of
from moesaic.hf.linears import is_wrapped, use_native_linears
from moesaic.hf.quantized import expert_modules
from moesaic.layer import moe_layers

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model) -> Model:
    """Prepare a model for inference, in place: no gradients for its experts, their weights in memory as reading wants
    them, linear layers on the native kernels (:func:`moesaic.hf.use_native_linears`), and for a few tokens router and
    experts of our layers in one native call (:mod:`moesaic.few_tokens`).

    On a CPU, weights that a model stores transposed (``[E, in, out]``) get the memory order of those that it does not,
    under an unchanged shape; and on Linux the memory of all experts moves to huge pages. Values, shapes, ``state_dict``
    and ``save_pretrained`` stay what they are, but such a tensor is not contiguous any more:
    ``safetensors.torch.save_file`` wants ``tensor.contiguous()``. Memory beyond the model's own is that of one expert.
    A ``state_dict`` taken before is no longer valid where weights were stored transposed: it shares their old memory.
    Call it when the weights are where they stay: moving or converting them makes new memory.

    Args:
        model: an :class:`moesaic.ExpertBank`, a :class:`moesaic.MoE`, or any module that holds some; or a MoE model of
            transformers.

    Returns:
        ``model`` itself.

    Raises:
        ConfigError: for a model without experts, or one that is in an :class:`moesaic.adapters.AdapterPool`.
        UnsupportedError: for a variant of transformers' experts that we do not know.
    """
    modules = expert_modules(model)
    if not modules:
        raise ConfigError(f"{type(model).__name__} has no experts to freeze")
    if any(module.__dict__.get("slots") is not None for module in modules.values()):
        raise ConfigError("the experts are in an AdapterPool already: freeze the model before, or close the pool first")
    # All of them first: a variant that we do not know is refused before anything has been changed.
    found = [module.weights() if isinstance(module, ExpertBank) else weights_of(module) for module in modules.values()]
    # Only the experts: PyTorch multiplies by a linear layer's weight in a slower way where that needs no gradient and
    # the features are a slice (measured: twice the time for a vocabulary's).
    for module, weights in zip(modules.values(), found, strict=True):
        module.requires_grad_(False)
        _lay_out(weights)
    use_native_linears(model)
    for layer in moe_layers(model):
        layer.few_tokens = None if is_wrapped(layer.router) else few_tokens_of(layer)
    return model


def _lay_out(weights: ExpertWeights) -> None:
    for matrix in (weights.up, weights.down):
        if matrix.device.type != "cpu":
            continue
        use_huge_pages(matrix)
        if weights.transposed and matrix.is_contiguous():
            _replace(matrix, inputs_last(matrix.detach()))


def _replace(parameter: Tensor, matrix: Tensor) -> None:
    with torch.no_grad():
        parameter.data = matrix
