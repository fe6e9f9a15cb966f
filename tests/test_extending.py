"""The page about parts of one's own: its code is run as it stands there, and does what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic
from moesaic.errors import ConfigError
from moesaic.experts.kinds import EXPERT_KINDS
from moesaic.registry import Registry
from moesaic.routing import BALANCERS, ROUTERS, Router, Routing
from moesaic.train.recipe_file import load_recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
REGISTRIES: list[Registry[Any]] = [ROUTERS, BALANCERS, EXPERT_KINDS]


@pytest.fixture(scope="module")
def after_each_block() -> Iterator[list[dict[str, Any]]]:
    """The names that each block of the page left; what they registered is gone afterwards."""
    before = [dict(registry._parts) for registry in REGISTRIES]
    names: dict[str, Any] = {}
    left = []
    try:
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), names)
            left.append(dict(names))
        yield left
    finally:
        for registry, parts in zip(REGISTRIES, before, strict=True):
            registry._parts = parts


def test_each_part_takes_fifteen_lines_at_most() -> None:
    registering = [block for block in BLOCKS if ".register(" in block]
    assert len(registering) == 3
    for block in registering:
        lines = [line for line in block.splitlines() if line.strip()]
        assert len(lines) <= 15
        assert len(re.findall(r"^    def (?!__init__)", block, re.MULTILINE)) == 1


def test_the_router_takes_what_is_near_the_best(after_each_block: list[dict[str, Any]]) -> None:
    layer = after_each_block[1]["layer"]
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    x_TD = torch.randn(100, 64)
    y_TD = layer(x_TD)
    routing: Routing = layer.last_routing
    numbers = set()
    for token, x in enumerate(x_TD):
        p = (layer.router.weight.detach().double() @ x.double()).softmax(dim=0)
        expected = {e: float(p[e]) for e in p.argsort(descending=True)[:4].tolist() if p[e] >= 0.5 * p.max()}
        slots = zip(routing.expert_ids[token].tolist(), routing.weights[token].tolist(), strict=True)
        found = {e: w for e, w in slots if e < 8}
        assert found == pytest.approx(expected, abs=1e-5)
        numbers.add(len(found))
    assert len(numbers) > 2
    with moesaic.use_backend("loop"):
        torch.testing.assert_close(layer(x_TD), y_TD)
    assert after_each_block[1]["y"].shape == (2, 50, 64)


def test_the_expert_kind_takes_part(after_each_block: list[dict[str, Any]]) -> None:
    layer = after_each_block[3]["layer"]
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    x_TD = torch.randn(100, 64)
    layer(x_TD).square().mean().backward()
    routing = layer.last_routing
    assert routing.num_experts == 11
    own = [expert for expert in layer.zero_computation.experts if hasattr(expert, "factor")]
    assert len(own) == 2
    assert all(expert.factor.grad.abs().sum() > 0 for expert in own)
    with torch.no_grad():
        before = layer(x_TD)
        for expert in own:
            expert.factor.mul_(2)
        chosen = ((routing.expert_ids >= 8) & (routing.expert_ids < 10)).any(dim=1)
        changed = (layer(x_TD) - before).abs().amax(dim=1) > 1e-6
    assert 0 < chosen.sum() < 100
    assert torch.equal(changed, chosen)  # the columns of "scale" come before that of "zero"


def test_the_loss_counts(after_each_block: list[dict[str, Any]]) -> None:
    layer = after_each_block[5]["layer"].train()
    mask = torch.arange(50) < torch.tensor([[50], [20]])
    layer(torch.randn(2, 50, 64), token_mask=mask)
    routing = layer.last_routing
    scores = routing.scores[mask.flatten()]
    even = 8 * float((routing.counts() / routing.counts().sum() * scores.mean(dim=0)).sum())
    doubt = float(1 - scores.max(dim=1).values.mean())
    assert float(layer.aux_loss.detach()) == pytest.approx(0.01 * even + 0.05 * doubt, rel=1e-4)


@pytest.mark.usefixtures("after_each_block")
def test_the_z_loss_is_refused_when_the_configuration_is_made() -> None:
    with pytest.raises(ConfigError, match="'z_loss' needs a router that has logits; NearBest has none"):
        moesaic.MoEConfig(8, 8, 4, router="near_best", balancing={"z_loss": 0.1})


def test_the_page_names_all_that_a_router_says() -> None:
    said = {name for name, value in vars(Router).items() if isinstance(value, bool)}
    table = re.findall(r"^\| `(\w+)` \| (True|False) \|", PAGE.read_text(), re.MULTILINE)
    assert dict(table) == {name: str(vars(Router)[name]) for name in said}


@pytest.mark.usefixtures("after_each_block")
def test_a_recipe_and_a_saved_model_know_them(tmp_path: Path) -> None:
    words = ["router=near_best", "top_k=4", "model.balancing.doubt=0.1"]
    words += ["model.zero_computation_experts.scale=1"]
    assert load_recipe(None, words).model.router == "near_best"
    config = moesaic.MoesaicConfig(
        vocab_size=32,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=3,
        router="near_best",
        balancing={"doubt": 0.1},
        zero_computation_experts={"scale": 1},
    )
    model = moesaic.MoesaicForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    again = moesaic.MoesaicForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_command_of_the_page(tmp_path: Path) -> None:
    (command,) = re.findall(r"^python -c '(.*)'$", PAGE.read_text(), re.MULTILINE)
    (tmp_path / "mine.py").write_text("\n".join(block for block in BLOCKS if ".register(" in block))
    # One value out of range, so that it ends before it trains: the router itself is known by then.
    wrong = command.replace("top_k=4", "top_k=99")
    assert wrong != command
    ran = subprocess.run([sys.executable, "-c", wrong], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "top_k is 99" in ran.stderr
    assert "near_best" not in ran.stderr
