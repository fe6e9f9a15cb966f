"""A layer against a slow function from its paper's formulas: what it returns, its loss, and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tests import reference
from torch import Tensor

import moesaic
from moesaic import MoE, MoEConfig

Formulas = Callable[[Tensor, Mapping[str, Tensor], MoEConfig], tuple[Tensor, Tensor]]
"""Of tokens [T, D], the layer's parameters and buffers by their names, and its settings: the output and the loss."""


def layer_of(sizes: Mapping[str, Any], **changes: Any) -> MoE:
    """In float64, with routers that decide clearly and biases that are not 0."""
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for router in layer.routers:
            router.weight.normal_()
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return layer.double()


def settings_of(config: MoEConfig) -> reference.Settings:
    return reference.Settings(**{name: getattr(config, name) for name in reference.Settings.__dataclass_fields__})


def routed(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    settings: reference.Settings,
    answer: Callable[[Tensor, list[int], list[Tensor]], Tensor],
) -> tuple[Tensor, Tensor]:
    """``answer`` of each token, its experts and their weights; and the loss."""
    rows, ids, scores, logits = [], [], [], []
    for token in x:
        own_logits = [(token * row).sum() for row in parameters["router.weight"]]
        taken, weights, own_scores, margin = reference.choose(own_logits, parameters, settings)
        assert margin > 1e-6
        rows.append(answer(token, taken, weights))
        ids.append(taken)
        scores.append(own_scores)
        logits.append(own_logits)
    aux = x.new_zeros(())
    for name, coefficient in settings.balancing.items():
        aux = aux + coefficient * reference.LOSSES[name](ids, scores, logits, settings.num_experts)
    return torch.stack(rows), aux


def check_against(formulas: Formulas, layer: MoE, tokens: int = 9) -> None:
    """The layer's router is float32 in every precision, which bounds the agreement."""
    width = layer.config.d_model
    x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(tokens, width, dtype=torch.float64)
    y = layer(x)
    ((y * upstream).sum() + layer.aux_loss).backward()
    values = {name: value.detach().clone().double() for name, value in layer.state_dict().items()}
    learned = {name: values[name].requires_grad_() for name, _ in layer.named_parameters()}
    again = x.detach().clone().requires_grad_()
    wanted, aux = formulas(again, values, layer.config)
    ((wanted * upstream).sum() + aux).backward()
    assert reference.relative_error(y, wanted) < 1e-5
    torch.testing.assert_close(layer.aux_loss.detach().double(), aux.detach(), rtol=1e-5, atol=1e-9)
    assert x.grad is not None and again.grad is not None
    assert reference.relative_error(x.grad, again.grad) < 1e-5
    for name, parameter in layer.named_parameters():
        expected = learned[name].grad
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
            assert (parameter.grad - expected).abs().max() < 1e-5, name


def check_the_backends_agree(layer: MoE, tokens: int = 16) -> None:
    layer, x = layer.float(), torch.randn(tokens, layer.config.d_model)
    answers = []
    for backend in ("loop", "grouped"):
        with moesaic.use_backend(backend):
            answers.append(layer(x))
    torch.testing.assert_close(*answers)
