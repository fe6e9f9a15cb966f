"""One recurrent cell that the routers of all layers share, over ranks: gradients, steps, generation, saving."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.parallel_models import SIZES, largest_errors, mine, tokens
from tests.parallel import harness
from torch.distributed.tensor import DTensor

import moesaic
from moesaic.hf.state import full_state_dict


def build(**settings: Any) -> moesaic.MoesaicForCausalLM:
    """Three layers, so that the cell is called again and again; the same weights in every process."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 3, "moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8}
    options = {"router": "recurrent", "router_options": {"state_width": 6}, "initializer_range": 0.2}
    return moesaic.MoesaicForCausalLM(moesaic.MoesaicConfig(**{**sizes, **options, **settings}))


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("iterations", [1, 2])
def test_gradients_of_recomputed_layers(ranks: int, iterations: int) -> None:
    for errors in harness.pool(ranks).run(recomputed, iterations):
        assert max(errors.values()) < 1e-5, errors


def recomputed(iterations: int) -> dict[str, float]:
    model, batch = build(iterations=iterations).train(), tokens(6)
    alone = copy.deepcopy(model)
    alone(batch, labels=batch).loss.backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    moesaic.parallelize(model)
    model(mine(batch), labels=mine(batch)).loss.backward()
    errors = largest_errors(model, alone)
    assert sum(".cell." in name for name in errors) == 4
    return errors


def test_steps_are_those_of_one_process() -> None:
    for error, kinds in harness.pool(2).run(stepped):
        assert error < 1e-5
        assert kinds == {DTensor}


def stepped() -> tuple[float, set[type]]:
    """The largest difference of a weight after steps with accumulation, and what the optimizer trains."""
    model = build().train()
    alone = copy.deepcopy(model)
    moesaic.parallelize(model)
    for each, share in ((model, mine), (alone, lambda batch: batch)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for step in range(3):
            for part in range(2):
                batch = share(tokens(4, seed=10 * step + part))
                each(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted = alone.state_dict()
    got = full_state_dict(model)
    assert not got or got.keys() == wanted.keys()
    errors = [float((got[name] - wanted[name]).abs().max()) for name in got]
    return max(errors, default=0.0), {parameter.data.__class__ for parameter in model.parameters()}


def test_generation_and_saving(tmp_path: Path) -> None:
    assert harness.pool(2).run(generated, str(tmp_path / "saved")) == [True, True]
    loaded = moesaic.MoesaicForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(tokens(2)).logits, build().eval()(tokens(2)).logits)


def generated(folder: str) -> bool:
    model = build().eval()
    prompt = mine(tokens(4))
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False)
    moesaic.parallelize(model)
    model.save_pretrained(folder)
    return torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)
