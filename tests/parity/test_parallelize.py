"""Whole models of transformers, tiny, over three ranks: the same logits and gradients as in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel import harness
from tests.parallel.conftest import pools  # noqa: F401  (ends the processes)
from tests.parity.test_models import INSTALLED, MODELS, config_of
from tests.reference import relative_error
from transformers import AutoModelForCausalLM

import moesaic


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind.removesuffix("_text") in INSTALLED])
def test_same_as_one_process(kind: str) -> None:
    for errors in harness.pool(3).run(compare, kind):
        assert max(errors.values()) < 1e-5, errors


def compare(kind: str) -> dict[str, float]:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of(kind), experts_implementation="moesaic").eval()
    for module in model.modules():
        if moesaic.hf.is_experts_module(module):
            for parameter in module.parameters():  # so wide that nothing of it is lost in the rest of the model
                torch.nn.init.normal_(parameter, std=0.2)
    alone, ranks = copy.deepcopy(model), dist.get_world_size()
    batch = torch.randint(3, 128, (2 * ranks, 9), generator=torch.Generator().manual_seed(1))
    mine = batch.chunk(ranks)[dist.get_rank()]
    expected = alone(batch, labels=batch)
    expected.loss.backward()
    moesaic.parallelize(model)
    output = model(mine, labels=mine)
    output.loss.backward()
    wanted = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.grad is not None}
    size = torch.nn.utils.get_total_norm(list(wanted.values()))
    errors = {"logits": relative_error(output.logits, expected.logits.chunk(ranks)[dist.get_rank()])}
    for name, parameter in model.named_parameters():
        if name in wanted:  # some gradients are so small beside the others that they are rounding, mostly
            gradient = parameter.grad.full_tensor().reshape(wanted[name].shape)
            errors[name] = float((gradient - wanted[name]).norm() / max(wanted[name].norm(), 1e-3 * size))
    return errors
