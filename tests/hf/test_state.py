"""Checkpoints of sharded models: written by any number of ranks, loaded by any other, training goes on the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.hf.parallel_models import F, build, mine, tokens
from tests.parallel import harness
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import moesaic
from moesaic.errors import CheckpointError
from moesaic.hf.state import to_checkpoint

STEPS, HALF, SEQUENCES = 10, 5, 24


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": {"state": moments["state"]}}


def train(
    kind: str,
    num_experts: int,
    steps: range,
    source: Path | None = None,
    target: Path | None = None,
    plain: bool = False,
) -> list[float]:
    """Losses of some steps of AdamW on this rank's share of the batches, from one checkpoint to another one."""
    model = build(kind, num_experts)
    if dist.is_initialized():
        moesaic.parallelize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if source is not None:
        load(to_checkpoint(state_of(model, optimizer), model, stored=source), checkpoint_id=source)
    losses = []
    for step in steps:
        batch = mine(tokens(SEQUENCES, seed=step))
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss.detach()))
    if target is not None:
        state = state_of(model, optimizer)
        save(state if plain else to_checkpoint(state, model), checkpoint_id=target)
    return losses


def mean_over_ranks(loss: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss = loss / dist.get_world_size()
    return float(loss)


def run(ranks: int, *arguments: Any, **options: Any) -> list[float]:
    """On so many ranks; one is an ordinary process, without a process group."""
    if ranks == 1:
        return train(*arguments, **options)
    assert not options
    first, *others = harness.pool(ranks).run(train, *arguments)
    assert all(other == first for other in others)
    return first


@pytest.fixture(scope="module")
def uninterrupted() -> dict[tuple[str, int], list[float]]:
    cases = [("moesaic", 5), ("moesaic", 2), ("gpt_oss", 2)]
    return {case: train(*case, range(STEPS)) for case in cases}


# 5 experts: whole ones on 3 and 4 ranks, unevenly many. 2 experts: sliced, in slices of different widths.
CASES = [
    (4, 1, "moesaic", 5),
    (1, 4, "moesaic", 2),
    (4, 3, "gpt_oss", 2),
    *(
        pytest.param(before, after, "moesaic", experts, marks=pytest.mark.slow)
        for before, after, experts in ((4, 1, 2), (1, 4, 5), (4, 3, 5), (4, 3, 2), (3, 8, 5), (3, 8, 2))
    ),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
class TestResharding:
    @pytest.mark.parametrize(("before", "after", "kind", "num_experts"), CASES)
    def test_training_goes_on_the_same(
        self,
        before: int,
        after: int,
        kind: str,
        num_experts: int,
        uninterrupted: dict[tuple[str, int], list[float]],
        tmp_path: Path,
    ) -> None:
        folder = tmp_path / "checkpoint"
        losses = run(before, kind, num_experts, range(HALF), None, folder)
        losses += run(after, kind, num_experts, range(HALF, STEPS), folder)
        assert losses == pytest.approx(uninterrupted[kind, num_experts], abs=1e-5)
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize(
        ("kind", "shapes"),
        [
            ("moesaic", {"experts.up": (2, 2, F, 16)}),
            ("gpt_oss", {"experts.gate_up_proj": (2, 16, F, 2), "experts.gate_up_proj_bias": (2, F, 2)}),
        ],
    )
    def test_gate_and_up_have_an_axis_of_their_own(
        self, kind: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path
    ) -> None:
        for ranks in (1, 2, 4):
            folder = tmp_path / str(ranks)
            run(ranks, kind, 2, range(0), None, folder)
            entries = FileSystemReader(folder).read_metadata().state_dict_metadata
            for parameter, shape in shapes.items():
                name = f"model.layers.0.mlp.{parameter}"
                for entry in (f"model.{name}", f"optimizer.state.{name}.exp_avg"):
                    assert tuple(entries[entry].size) == shape

    def test_older_checkpoints(self, uninterrupted: dict[tuple[str, int], list[float]], tmp_path: Path) -> None:
        folder = tmp_path / "checkpoint"
        losses = train("moesaic", 2, range(HALF), target=folder, plain=True)
        for ranks in (1, 2):
            rest = run(ranks, "moesaic", 2, range(HALF, STEPS), folder)
            assert losses + rest == pytest.approx(uninterrupted["moesaic", 2], abs=1e-5)
        told = harness.pool(4).run(refused, 2, folder)
        assert all("older form" in text and "at most 2 ranks" in text for text in told)


def refused(num_experts: int, folder: Path) -> str:
    try:
        train("moesaic", num_experts, range(0), folder)
    except CheckpointError as error:
        return str(error)
    return ""


def test_what_is_saved_shares_the_models_memory() -> None:
    model = build("moesaic", 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens(1)).logits.sum().backward()
    optimizer.step()
    stored = to_checkpoint(state_of(model, optimizer), model)
    name = "model.layers.1.mlp.experts.up"
    assert stored["model"][name].data_ptr() == model.get_parameter(name).data_ptr()
    moment = optimizer.state[model.get_parameter(name)]["exp_avg"]
    assert stored["optimizer"]["state"][name]["exp_avg"].data_ptr() == moment.data_ptr()
    assert stored["optimizer"]["state"][name]["step"].shape == ()
    assert stored["model"]["lm_head.weight"].shape == (64, 16)
