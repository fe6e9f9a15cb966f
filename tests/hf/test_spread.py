"""What people do with a parallelized model as with any other: it works, or one line says what would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.hf.parallel_models import build, mine, tokens
from tests.parallel import harness
from torch import nn
from transformers import AutoModelForCausalLM

import moesaic
from moesaic import MoE, MoEConfig
from moesaic.errors import MoesaicError


def layer() -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig(d_model=8, d_ff=6, num_experts=4))


def optimizer_before() -> None:
    made, other = layer(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    moesaic.parallelize(made)
    torch.optim.SGD([*made.parameters(), *other.parameters()], lr=0.1).step()  # of nobody's concern
    optimizer.step()


def a_part() -> None:
    moesaic.parallelize(build("olmoe", 4)).model(mine(tokens(2)))


def other_values() -> None:
    made = layer()
    with torch.no_grad():
        made.router.weight.add_(dist.get_rank())
    moesaic.parallelize(made)


def unwritable() -> None:
    moesaic.parallelize(build("olmoe", 4)).save_pretrained("/dev/null/model")


CASES: dict[str, Callable[[], object]] = {
    "optimizer": optimizer_before,
    "part": a_part,
    "values": other_values,
    "strategy as mesh": lambda: moesaic.parallelize(layer(), "tokens"),  # type: ignore[arg-type]
    "number as mesh": lambda: moesaic.parallelize(layer(), 2),  # type: ignore[arg-type]
    "overlap": lambda: moesaic.parallelize(layer(), overlap="2"),  # type: ignore[arg-type]
    "no name": lambda: moesaic.parallelize(layer(), strategy=2),  # type: ignore[arg-type]
    "ddp": lambda: moesaic.parallelize(nn.parallel.DistributedDataParallel(layer())),
    "path": lambda: moesaic.parallelize("olmoe/"),  # type: ignore[type-var]
    "unwritable": unwritable,
}


def said(name: str) -> str:
    try:
        CASES[name]()
    except MoesaicError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("optimizer", "ConfigError: SGD was made before moesaic.parallelize: of its 3 parameters"),
        ("part", "UsageError: model.embed_tokens was called while its parameters are spread"),
        ("values", "differs from rank 0 in router.weight (other values: set the same seed"),
        ("strategy as mesh", "did you mean strategy='tokens'?"),
        ("number as mesh", "ConfigError: mesh is 2: it must be a torch.distributed.device_mesh.DeviceMesh"),
        ("overlap", "ConfigError: overlap is '2': it must be a whole number, at least 1"),
        ("no name", "ConfigError: unknown strategy 2"),
        ("ddp", "ConfigError: the model is wrapped in DistributedDataParallel"),
        ("path", "ConfigError: parallelize takes a model, got 'olmoe/'"),
        ("unwritable", "UsageError: "),
    ],
)
def test_refusals(case: str, message: str) -> None:
    for text in harness.pool(2).run(said, case):
        assert message in text and "\n" not in text


@pytest.mark.parametrize(("kind", "num_experts", "ranks"), [("olmoe", 4, 2), ("gpt_oss", 2, 4), ("qwen3_moe", 4, 2)])
def test_save_pretrained_writes_the_whole_model(kind: str, num_experts: int, ranks: int, tmp_path: Path) -> None:
    harness.pool(ranks).run(saved, kind, num_experts, tmp_path / "model")
    model, batch = build(kind, num_experts), tokens(2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, model(batch).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def saved(kind: str, num_experts: int, folder: Path) -> None:
    model = moesaic.parallelize(build(kind, num_experts))
    with torch.no_grad():
        model(mine(tokens(4)))
    model.save_pretrained(folder)
    assert folder.is_dir()
    model.save_pretrained(folder)  # over the old one


@pytest.mark.parametrize(("kind", "num_experts", "ranks"), [("gpt_oss", 5, 3), ("gpt_oss", 2, 4), ("qwen3_moe", 4, 2)])
def test_plain_weights_are_loaded(kind: str, num_experts: int, ranks: int) -> None:
    for errors in harness.pool(ranks).run(loaded, kind, num_experts):
        assert max(errors) < 1e-5


def loaded(kind: str, num_experts: int) -> list[float]:
    """Before the first step, and after one, with the optimizer that there is."""
    model, other, batch = build(kind, num_experts), build(kind, num_experts), tokens(2 * dist.get_world_size())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    moesaic.parallelize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.no_grad():
        expected, errors = mine(other(batch).logits), []
    for _ in range(2):
        told: Any = model.load_state_dict(other.state_dict())
        assert not told.missing_keys and not told.unexpected_keys
        output = model(mine(batch), labels=mine(batch))
        errors.append(float((output.logits - expected).abs().max()))
        output.loss.backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**other.state_dict(), "lm_head.weight": torch.zeros(1, 1)})
    return errors


def test_a_part_can_be_copied() -> None:
    assert harness.pool(2).run(copied) == [True] * 2


def copied() -> bool:
    """FSDP allows no copies of what it wraps; of the rest there are."""
    model = moesaic.parallelize(build("olmoe", 4))
    head = copy.deepcopy(model.lm_head)
    return torch.equal(head.weight.full_tensor(), model.lm_head.weight.full_tensor())


def test_explain_names_the_layers_that_are_there() -> None:
    assert harness.pool(2).run(explained) == [(1, 0, "model.layers.0.mlp.experts, model.layers.1.mlp.experts")] * 2


def explained() -> tuple[int, int, str]:
    """Lines that a model adds, those that are left of it when it is gone, and the layers in the newest line."""
    before = len(moesaic.parallel.explain())
    model = moesaic.parallelize(build("olmoe", 4))
    model(mine(tokens(2)))
    told = [str(each) for each in moesaic.parallel.explain()]
    assert all("\n" not in line for line in told)
    del model
    return len(told) - before, len(moesaic.parallel.explain()) - before, told[-1].split(" | ")[2]
