"""Models that are moved, spread over ranks, or balanced by somebody's own program, and another way to route."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.hf import parallel_models
from tests.hf.test_reroute import build, logits, ours
from tests.parallel import harness
from tests.parity.test_models import tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import moesaic
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.layer import moe_layers
from moesaic.routing import BALANCERS, Balancer, Routing

GATE = "model.layers.0.mlp.gate"


def places(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*module.parameters(), *module.buffers()]}


def width(gate: nn.Module) -> int:
    return int(gate.get_parameter("weight").shape[1])


@pytest.mark.parametrize("router", ["sigmoid_topk", "top_p"])
def test_a_gate_may_be_moved_there_and_back(router: str) -> None:
    """What reroutes a gate of transformers is no part of the model, and follows it all the same."""
    model = build("deepseek_v3")
    gate = next(module for name, module in model.named_modules() if name.endswith(".gate"))
    x, state = torch.randn(3, width(gate)), {name: tensor.clone() for name, tensor in gate.state_dict().items()}
    with moesaic.reroute(model, router):
        wanted = gate(x)
        gate.to("meta")
        assert {part.device.type for part in gate(x.to("meta"))} == {"meta"}
        gate.to_empty(device="cpu").load_state_dict(state)
        for got, expected in zip(gate(x), wanted, strict=True):
            assert torch.equal(got, expected)


def test_token_ids_are_brought_to_the_gate() -> None:
    """The layers of a model may lie on several devices: here one of them is alone on another."""
    model = build()
    gate = model.get_submodule(GATE)
    with moesaic.reroute(model, "hash"):
        logits(model)  # with 20 token ids, on the CPU
        gate.to("meta")
        assert {part.device.type for part in gate(torch.empty(20, width(gate), device="meta"))} == {"meta"}


@pytest.mark.parametrize("router", ["sigmoid_topk", "hash", "expert_skipping"])
def test_ours_may_be_moved_and_goes_back_there(router: str) -> None:
    model: Any = ours(router="sigmoid_topk", balancing={"bias_update": 1e-3, "z_loss": 0.1})
    before = [layer.router for layer in moe_layers(model)]
    with moesaic.reroute(model, router):
        model.to("meta")
    assert [layer.router for layer in moe_layers(model)] == before
    assert places(model) == {"meta"}
    assert model(tokens().to("meta")).logits.is_meta


def test_parameters_that_came_meanwhile_stay() -> None:
    model, other = ours(), ours(initializer_range=0.5)
    nn.init.normal_(moe_layers(other)[0].router.weight)
    with moesaic.reroute(model, "sigmoid_topk"):
        model.load_state_dict(other.state_dict(), strict=False, assign=True)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("named", [False, True], ids=["positional", "by its name"])
@pytest.mark.parametrize("make", [ours, build], ids=["ours", "transformers"])
def test_vectors_follow_a_model_that_is_moved(make: Callable[[], Any], named: bool) -> None:
    model = make()
    name = "model.layers.0.mlp." + ("router" if make is ours else "gate")
    with moesaic.Rewirer(model) as rewirer:
        rewirer.optimize(tokens()[:1])
        gate = model.get_submodule(name).to("meta")
        with torch.inference_mode():
            x = torch.empty(3, width(gate), device="meta")
            first = list(inspect.signature(type(gate).forward).parameters)[1]
            _ = gate(**{first: x}) if named else gate(x)
        assert rewirer.vectors[name].is_meta
        assert not rewirer.vectors[name].is_inference()


def refused_over_ranks(kind: str, wrapper: str) -> list[str]:
    model: Any = parallel_models.build(kind, 4).eval()
    if wrapper == "FSDP1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif wrapper == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        moesaic.parallelize(model)
    said = []
    for act in (
        lambda: moesaic.reroute(model, "sigmoid_topk"),
        lambda: moesaic.reroute(model, top_k=1),
        lambda: moesaic.Rewirer(model),
    ):
        with pytest.raises(UnsupportedError) as error:
            act()
        said.append(str(error.value))
    model(parallel_models.tokens(2))
    return said


@pytest.mark.parametrize("wrapper", ["parallelize", "FSDP1", "FSDP2"])
@pytest.mark.parametrize(("kind", "ranks"), [("moesaic", 2), ("qwen3_moe", 2), ("moesaic", 1)])
def test_what_is_wrapped_for_ranks_is_refused(kind: str, ranks: int, wrapper: str) -> None:
    for said in harness.pool(ranks).run(refused_over_ranks, kind, wrapper):
        what = ["rerouted", "rerouted", "rewired"]
        assert said == [f"a model that is wrapped by moesaic.parallelize or FSDP cannot be {each}" for each in what]


def spread_while_rerouted(kind: str, router: str | None) -> tuple[str, bool]:
    model, batch = parallel_models.build(kind, 4).eval(), parallel_models.tokens(2)
    before = model(batch).logits.detach()
    handle = moesaic.reroute(model, router, top_k=1)
    during = model(batch).logits.detach()
    moesaic.parallelize(model)
    torch.testing.assert_close(model(batch).logits.detach(), during, rtol=1e-4, atol=1e-5)
    try:
        handle.remove()
    except UnsupportedError as error:
        torch.testing.assert_close(model(batch).logits.detach(), during, rtol=1e-4, atol=1e-5)
        return str(error), False
    return "", torch.allclose(model(batch).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "router"),
    [("moesaic", "sigmoid_topk"), ("moesaic", None), ("qwen3_moe", "sigmoid_topk"), ("qwen3_moe", None)],
)
def test_what_is_spread_while_rerouted(kind: str, router: str | None) -> None:
    for said, back in harness.pool(2).run(spread_while_rerouted, kind, router):
        assert back == (router is None or kind != "moesaic")
        assert ("call remove() of what reroute() returned before moesaic.parallelize" in said) == (not back)


def rerouted_by_rank_0() -> tuple[dict[str, Any], int]:
    """Its balancing while it is rerouted, and what the ranks' next collective, whatever comes of it, adds up to."""
    model: Any = ours(router="sigmoid_topk", balancing={"global_load_balancing": 0.1, "bias_update": 1e-3})
    during: dict[str, Any] = {}
    if dist.get_rank() == 0:
        with moesaic.reroute(model, "softmax_topk"):
            during = dict(model.config.balancing)
    total = torch.ones(8, dtype=torch.int64)
    dist.all_reduce(total)
    return during, int(total[0])


def test_one_rank_alone_may_reroute() -> None:
    answers = harness.pool(2).run(rerouted_by_rank_0)
    assert answers == [({"global_load_balancing": 0.1}, 2), ({}, 2)]


@pytest.mark.parametrize("make", [ours, build], ids=["ours", "transformers"])
def test_routes_decided_ahead_are_no_way_to_choose(make: Callable[[], Any]) -> None:
    with pytest.raises(UnsupportedError, match="cannot be rerouted by 'given': it decides nothing, but takes routes"):
        moesaic.reroute(make(), "given")


@pytest.fixture
def of_logits() -> Iterator[str]:
    class OfLogits(Balancer):
        def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
            return routing.logits.square().mean()  # type: ignore[union-attr]

    BALANCERS.register("of_logits")(OfLogits)
    yield "of_logits"
    del BALANCERS._parts["of_logits"]


def test_a_balancer_that_fails_is_named(of_logits: str) -> None:
    model = ours(balancing={of_logits: 0.1})
    before = logits(model)
    message = r"the balancer 'of_logits' fails on what Hash decides \(AttributeError: .*\): .* must raise a ConfigError"
    with pytest.raises(UnsupportedError, match=message):
        moesaic.reroute(model, "hash")
    with moesaic.reroute(model, "sigmoid_topk"):
        assert model.config.balancing == {of_logits: 0.1}
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("make", [ours, build], ids=["ours", "transformers"])
class TestRewirer:
    def test_with_generate_of_the_model(self, make: Callable[[], Any]) -> None:
        """The text is the one that the shifted model predicts token by token."""
        model, ids = make(), tokens()[:1]
        settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        plain = model.generate(ids, **settings)
        with moesaic.Rewirer(model, moesaic.Rewiring(steps=3, learning_rate=1.0, layers=1.0)) as rewirer:
            rewirer.optimize(ids)
            written = model.generate(ids, **settings)
            with torch.no_grad():
                predicted = model(written).logits[0, 9:-1].argmax(dim=-1)
        assert torch.equal(written[0, 10:], predicted)
        assert not torch.equal(written, plain)
        assert torch.equal(model.generate(ids, **settings), plain)

    def test_entered_again_goes_on(self, make: Callable[[], Any]) -> None:
        model, ids, settings = make(), tokens()[:1], moesaic.Rewiring(steps=2, layers=1.0)
        with moesaic.Rewirer(model, settings) as whole:
            whole.optimize(ids)
            whole.optimize(ids)
        with moesaic.Rewirer(model, settings) as halves:
            halves.optimize(ids)
        with halves:
            halves.optimize(ids)
        assert all(torch.equal(halves.vectors[name], vector) for name, vector in whole.vectors.items())

    def test_what_it_refuses(self, make: Callable[[], Any]) -> None:
        rewirer = moesaic.Rewirer(make())
        with pytest.raises(ConfigError, match=r"optimize\(\) works inside the Rewirer's with block"):
            rewirer.optimize(tokens()[:1])
        with rewirer:
            for ids in (tokens(), tokens()[0], tokens()[:0]):
                with pytest.raises(
                    ConfigError, match=r"the token ids are \[.*\]: routing adapts to one text at a time"
                ):
                    rewirer.optimize(ids)
            with pytest.raises(ConfigError, match="entered already"):
                rewirer.__enter__()
            rewirer.optimize(tokens()[:1])
        with pytest.raises(ConfigError, match="inside the Rewirer's with block"):
            rewirer.optimize(tokens()[:1])
