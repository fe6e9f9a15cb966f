"""The balancing loss over the batch against loops in float64; what counts, what does not; balancers of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moesaic import MoE, MoEConfig, update_balancing
from moesaic.routing import BALANCERS, Balancer, Router, Routing, counting
from moesaic.routing.balancing import GlobalLoadBalancing

WIDTH = 8


def layer_of(**settings: Any) -> MoE:
    torch.manual_seed(0)
    config = {"num_experts": 5, "top_k": 2, "balancing": {"global_load_balancing": 1.0}, **settings}
    layer = MoE(MoEConfig(d_model=WIDTH, d_ff=8, **config))
    with torch.no_grad():
        layer.router.weight.mul_(25)
    return layer


def reference(weight_ED: Tensor, x_TD: Tensor, counts: list[int], sigmoid: bool, routed: list[bool]) -> Tensor:
    """The loss of some tokens by the paper, f being ``counts`` over their sum."""
    mean = [torch.zeros((), dtype=torch.float64) for _ in counts]
    for token, counted in zip(x_TD, routed, strict=True):
        logits = torch.stack([(row * token).sum() for row in weight_ED])
        scores = logits.sigmoid() if sigmoid else logits.exp() / logits.exp().sum()
        for e in range(len(counts)):
            if counted:
                mean[e] = mean[e] + scores[e] / scores.sum() / max(1, sum(routed))
    loss = torch.zeros((), dtype=torch.float64)
    for e, count in enumerate(counts):
        loss = loss + len(counts) * count / max(1, sum(counts)) * mean[e]
    return loss


def chosen(routing: Routing | None) -> list[int]:
    """Slots of each expert, in a loop."""
    assert routing is not None
    counts = [0] * routing.num_experts
    for row in routing.expert_ids.tolist():
        for e in row:
            if e < len(counts):
                counts[e] += 1
    return counts


CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"router": "sigmoid_topk"},
    "one expert": {"num_experts": 1, "top_k": 1},
    "k = E": {"top_k": 5},
    "capacity": {"capacity_factor": -0.5},
}


@pytest.mark.parametrize("exact", [False, True], ids=["running", "exact"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_papers(case: str, exact: bool) -> None:
    layer = layer_of(**CASES[case])
    parts = [torch.randn(tokens, WIDTH) + shift for tokens, shift in ((7, 0.0), (1, 1.0), (0, 0.0), (12, -1.0))]
    parts.append(torch.ones(4, WIDTH))  # all alike
    masks = [torch.arange(len(x)) % 4 != 2 for x in parts]
    free = layer_of(**{**CASES[case], "capacity_factor": 0.0})  # what is asked for, whatever is granted
    for _ in range(2):  # a second step begins anew
        asked = []
        for x, mask in zip(parts, masks, strict=True):
            free(x, token_mask=mask)
            asked.append(chosen(free.last_routing))
        if exact:
            with counting(layer):
                for x, mask in zip(parts, masks, strict=True):
                    layer(x, token_mask=mask)
                    assert not layer.aux_loss.requires_grad
        so_far = [0] * layer.config.num_experts
        for number, (x, mask) in enumerate(zip(parts, masks, strict=True)):
            so_far = [sum(pair) for pair in zip(so_far, asked[number], strict=True)]
            f = [sum(column) for column in zip(*asked, strict=True)] if exact else so_far
            x = x.requires_grad_()
            layer(x, token_mask=mask)
            got = torch.autograd.grad(layer.aux_loss, [layer.router.weight, x])
            weight, double = (
                layer.router.weight.detach().double().requires_grad_(),
                x.detach().double().requires_grad_(),
            )
            wanted = reference(weight, double, f, layer.config.router == "sigmoid_topk", mask.tolist())
            assert layer.aux_loss.item() == pytest.approx(wanted.item(), rel=1e-6)
            if len(x):
                for one, other in zip(got, torch.autograd.grad(wanted, [weight, double]), strict=True):
                    torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-7)
        update_balancing(layer)
        assert not layer.slot_counts.any()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_one_backward_with_recomputed_activations(order: tuple[int, int]) -> None:
    """What a forward knew stays what it knew, though the second one has counted by the time it is done again."""
    parts = [torch.randn(7, WIDTH), torch.randn(12, WIDTH) + 1.0]

    def gradient(recomputed: bool) -> tuple[Tensor, list[float]]:
        layer = layer_of(router_options={"normalize": True})

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            return layer(x * 1.5) * 2.0, layer.aux_loss

        outputs = [checkpoint(run, x, use_reentrant=False) if recomputed else run(x) for x in parts]
        counts = layer.slot_counts.clone()
        total = sum((outputs[i][1] * (i + 1) for i in order), torch.zeros(()))
        (total + 1e-3 * sum((y.square().sum() for y, _ in outputs), torch.zeros(()))).backward()
        assert torch.equal(layer.slot_counts, counts)
        assert layer.router.weight.grad is not None
        return layer.router.weight.grad, [loss.item() for _, loss in outputs]

    (kept, losses), (recomputed, again) = gradient(False), gradient(True)
    assert losses == again
    torch.testing.assert_close(recomputed, kept, rtol=1e-6, atol=1e-7)


def test_counting_ahead_is_exact_for_reentrant_checkpointing_too() -> None:
    """Such a region has no graph before it is done again, and so nothing that could be kept."""
    parts = [torch.randn(7, WIDTH), torch.randn(12, WIDTH) + 1.0]

    def gradient(recomputed: bool, ahead: bool) -> Tensor:
        layer = layer_of()

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            return layer(x), layer.aux_loss

        if ahead:
            with counting(layer):
                for x in parts:
                    layer(x)
        inputs = [x.clone().requires_grad_() for x in parts]
        outputs = [checkpoint(run, x, use_reentrant=True) if recomputed else run(x) for x in inputs]
        (outputs[0][1] + 2 * outputs[1][1]).backward()
        assert layer.router.weight.grad is not None
        return layer.router.weight.grad

    torch.testing.assert_close(gradient(True, True), gradient(False, True), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(gradient(True, False), gradient(False, False), rtol=1e-3)  # as the documentation says


def test_with_bfloat16_features() -> None:
    layer = layer_of().bfloat16()
    x = torch.randn(40, WIDTH).bfloat16()
    layer(x)
    routing = layer.last_routing
    wanted = reference(layer.router.weight.double(), x.double(), chosen(routing), False, [True] * 40)
    assert layer.aux_loss.dtype == torch.float32
    assert layer.aux_loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_evaluation_neither_counts_nor_is_told() -> None:
    layer, plain = layer_of(), layer_of(balancing={"load_balancing": 1.0})
    layer(torch.ones(30, WIDTH))
    before = layer.slot_counts.clone()
    x = torch.randn(9, WIDTH)
    layer.eval()(x), plain.eval()(x)
    assert layer.aux_loss == plain.aux_loss
    assert torch.equal(layer.slot_counts, before)


def test_counting_that_fails_leaves_nothing() -> None:
    layer, fresh, x = layer_of(), layer_of(), torch.randn(9, WIDTH)

    def fail() -> None:
        with counting(layer):
            layer(torch.ones(30, WIDTH))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert layer(x).requires_grad
    fresh(x)
    assert layer.aux_loss == fresh.aux_loss


def test_counting_again_begins_anew() -> None:
    layer, x = layer_of(), torch.randn(9, WIDTH)
    for _ in range(2):
        with counting(layer):
            layer(x)
    assert int(layer.slot_counts.sum()) == 18


def test_counting_draws_no_random_numbers_and_gives_no_gradients() -> None:
    layer = layer_of()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with counting(layer):
        assert not layer(torch.rand(5, WIDTH)).requires_grad
    assert torch.equal(torch.rand(4), wanted)


def test_counting_leaves_the_counts_of_others_as_they_are() -> None:
    layers = nn.ModuleList(
        layer_of(router="sigmoid_topk", balancing=balancing)
        for balancing in ({"global_load_balancing": 1.0}, {"bias_update": 0.1, "load_balancing": 1.0})
    )
    x = torch.randn(9, WIDTH)
    for layer in layers:
        layer(x)
    first, second = (layer.balancers[0] for layer in layers)  # type: ignore[operator,union-attr]
    before, losses = second.slot_counts.clone(), second.losses
    with counting(layers):
        for layer in layers:
            layer(torch.randn(5, WIDTH))
    assert int(first.slot_counts.sum()) == 10 and torch.equal(second.slot_counts, before) and second.losses is losses
    for layer in layers:
        layer(x)
    assert int(first.slot_counts.sum()) == 10 and torch.equal(second.slot_counts, 2 * before)


def test_it_goes_together_with_all_others() -> None:
    balancing = {"global_load_balancing": 0.5, "load_balancing": 0.25, "z_loss": 0.125, "bias_update": 0.01}
    layer = layer_of(router="sigmoid_topk", balancing=balancing)
    for x in (torch.randn(9, WIDTH), torch.randn(5, WIDTH)):
        layer(x)
    losses = layer.balancers[0].losses
    assert losses.keys() == {"global_load_balancing", "load_balancing", "z_loss"}
    assert losses["global_load_balancing"] != losses["load_balancing"]
    total = sum(balancing[name] * loss.item() for name, loss in losses.items())
    assert layer.aux_loss.item() == pytest.approx(total, rel=1e-6)
    counts = layer.slot_counts.tolist()
    update_balancing(layer)
    mean = sum(counts) / len(counts)
    wanted = [0.01 * ((count < mean) - (count > mean)) for count in counts]
    assert layer.router.get_buffer("selection_bias").tolist() == pytest.approx(wanted)


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a value."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(function), "the host would wait for the device"
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    varying = {"coefficient": 0.1, "final": 0.0, "steps": 5, "schedule": "cosine", "warmup": 2}
    layer = layer_of(router="sigmoid_topk", balancing={"global_load_balancing": varying, "bias_update": varying})
    part = layer.balancers[0]
    routing = layer.router(torch.randn(9, WIDTH))
    with Waits():
        part.loss(routing).backward()
        with torch.no_grad():
            part.after_step(layer.router)
    with pytest.raises(AssertionError, match="would wait"), Waits():
        part.step.item()


def test_compiled() -> None:
    varying = {"coefficient": 0.1, "final": 0.0, "steps": 5}
    settings = {"router": "sigmoid_topk", "balancing": {"global_load_balancing": varying, "bias_update": 0.1}}
    layer, plain = layer_of(**settings), layer_of(**settings)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for x in (torch.randn(9, WIDTH), torch.randn(9, WIDTH)):
            compiled(x), plain(x)
            assert layer.aux_loss.item() == pytest.approx(plain.aux_loss.item(), rel=1e-6)
        update_balancing(layer), update_balancing(plain)
    assert int(layer.balancers[0].step) == 2
    torch.testing.assert_close(layer.router.get_buffer("selection_bias"), plain.router.get_buffer("selection_bias"))


@pytest.fixture
def own() -> Iterator[None]:
    """Two balancers of somebody's own."""

    @BALANCERS.register("static")
    class Static(Balancer):
        @staticmethod
        def loss(routing: Routing, counts_E: Tensor) -> Tensor:  # type: ignore[override]
            return counts_E.max() * routing.scores.mean()

        @staticmethod
        def update(router: Router, counts_E: Tensor, coefficient: float) -> None:  # type: ignore[override]
            router.weight.fill_(coefficient)

    @BALANCERS.register("squared")
    class Squared(Balancer):
        over_batch = True

        def __init__(self, *, power: int = 2) -> None:
            self.power = power

        def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
            # counts_E is kept for the backward.
            return (counts_E * routing.scores.mean(dim=0)).pow(self.power).sum()

    yield
    del BALANCERS._parts["static"], BALANCERS._parts["squared"]


@pytest.mark.usefixtures("own")
def test_balancers_of_ones_own() -> None:
    layer = layer_of(balancing={"static": 0.25, "squared": {"coefficient": 2.0, "power": 3}})
    first, second = torch.randn(4, WIDTH), torch.randn(6, WIDTH)
    layer(first)
    loss, early = layer.aux_loss, chosen(layer.last_routing)
    layer(second)
    routing = layer.last_routing
    assert routing is not None
    counts = torch.tensor([sum(pair) for pair in zip(early, chosen(routing), strict=True)])
    static = 0.25 * max(chosen(routing)) * routing.scores.mean()
    wanted = static + 2.0 * (counts * routing.scores.mean(dim=0)).pow(3).sum()
    assert layer.aux_loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    (loss + layer.aux_loss).backward()
    update_balancing(layer)
    assert (layer.router.weight == 0.25).all()


def test_it_is_registered_with_its_counts() -> None:
    assert BALANCERS.get("global_load_balancing") is GlobalLoadBalancing
    assert GlobalLoadBalancing.over_batch
