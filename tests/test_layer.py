"""The layer as a module: what it leaves behind, its errors, saving, copying, capacity, and determinism."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests import reference
from torch import Tensor

import moesaic
from moesaic import MoE, MoEConfig, update_balancing
from moesaic.errors import ConfigError
from moesaic.experts import ACTIVATIONS
from moesaic.layer import moe_layers
from moesaic.routing import RoutingContext, check_balancing, create_router
from moesaic.routing.sigmoid_topk import SigmoidTopK

BACKENDS = ["loop", "grouped"]
BALANCING = {"load_balancing": 0.1, "z_loss": 0.1}


def layer_of(**changes: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{"d_model": 16, "d_ff": 24, "num_experts": 4, "top_k": 2, **changes}))
    layer.router.reset_parameters(0.5)
    return layer


class TestWhatAForwardLeaves:
    def test_before_any_forward(self) -> None:
        layer = layer_of()
        assert layer.last_routing is None
        assert layer.aux_loss.item() == 0.0

    @pytest.mark.parametrize("balancing", [{}, BALANCING])
    @pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (16,), (0, 16), (2, 0, 16), (1, 2, 3, 16)])
    def test_shapes(self, shape: tuple[int, ...], balancing: dict[str, float]) -> None:
        layer, x = layer_of(balancing=balancing), torch.randn(shape)
        y = layer(x)
        tokens = x.numel() // 16
        assert y.shape == x.shape
        assert list(layer.last_routing.expert_ids.shape) == [tokens, 2]
        assert list(layer.last_routing.scores.shape) == [tokens, 4]
        assert (layer.aux_loss.shape, layer.aux_loss.dtype) == ((), torch.float32)
        assert (layer.aux_loss.item() > 0) == bool(balancing and tokens)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_the_output_has_the_inputs_dtype(self, dtype: torch.dtype) -> None:
        layer = layer_of(balancing=BALANCING).to(dtype)
        assert layer(torch.randn(3, 16, dtype=dtype)).dtype == dtype
        assert layer.aux_loss.dtype == torch.float32

    def test_a_non_contiguous_input(self) -> None:
        layer, x = layer_of(), torch.randn(16, 6, 2).transpose(0, 2)
        assert not x.is_contiguous()
        for backend in BACKENDS:
            with moesaic.use_backend(backend):
                torch.testing.assert_close(layer(x), layer(x.contiguous()))

    def test_all_three_names_of_the_public_surface(self) -> None:
        assert moesaic.MoE is MoE
        assert isinstance(layer_of()(torch.randn(2, 16)), Tensor)
        assert isinstance(moesaic.Dispatch, type)


class TestCapacity:
    def run(self, layer: MoE, x: Tensor, **call: Any) -> tuple[Tensor, int]:
        y = layer(x, **call)
        return y, int(layer.last_routing.dropped or 0)

    def test_enough_room_changes_nothing(self) -> None:
        layer, x = layer_of(bias=True), torch.randn(20, 16)
        plain, _ = self.run(layer, x)
        for factor in (4.0, -4.0):
            y, dropped = self.run(layer, x, capacity_factor=factor)
            assert dropped == 0
            torch.testing.assert_close(y, plain)

    @pytest.mark.parametrize("factor", [0.5, -0.5])
    def test_what_is_over_is_dropped_and_counted(self, factor: float) -> None:
        layer, x = layer_of(), torch.randn(20, 16)
        _, dropped = self.run(layer, x, capacity_factor=factor)
        null = int((layer.last_routing.expert_ids == 4).sum())
        assert dropped == null >= 20  # 40 slots, 4 experts of 5 rows
        assert (layer.last_routing.weights[layer.last_routing.expert_ids == 4] == 0).all()

    def test_both_signs_drop_alike(self) -> None:
        layer, x = layer_of(), torch.randn(20, 16)
        torch.testing.assert_close(layer(x, capacity_factor=0.7), layer(x, capacity_factor=-0.7))

    def test_only_of_that_call(self) -> None:
        layer, x = layer_of(capacity_factor=0.5), torch.randn(20, 16)
        assert self.run(layer, x)[1] > 0
        assert self.run(layer, x, capacity_factor=0)[1] == 0
        assert self.run(layer, x)[1] > 0

    def test_balancing_sees_what_was_asked_for(self) -> None:
        layer, x = layer_of(balancing=BALANCING), torch.randn(20, 16)
        layer(x)
        asked = layer.aux_loss.item()
        layer(x, capacity_factor=0.3)
        assert layer.aux_loss.item() == asked

    @pytest.mark.parametrize("factor", [float("nan"), float("inf")])
    def test_a_factor_that_is_no_number(self, factor: float) -> None:
        with pytest.raises(ConfigError, match=r"capacity_factor is (nan|inf): it must be finite"):
            layer_of(capacity_factor=factor)
        with pytest.raises(ConfigError, match=r"capacity_factor is (nan|inf): it must be finite"):
            layer_of()(torch.randn(2, 16), capacity_factor=factor)

    def test_an_enormous_factor_is_every_slot(self) -> None:
        layer, x = layer_of(), torch.randn(5, 16)
        torch.testing.assert_close(layer(x, capacity_factor=1e300), layer(x, capacity_factor=0.0))


class TestTokenMask:
    def test_masked_tokens_get_only_the_shared_experts(self) -> None:
        layer, x = layer_of(num_shared_experts=1), torch.randn(3, 4, 16)
        mask = torch.rand(3, 4) > 0.5
        y = layer(x, token_mask=mask)
        torch.testing.assert_close(y[~mask], layer.shared(x[~mask]))
        torch.testing.assert_close(y[mask], layer(x)[mask])
        assert layer.last_routing.expert_ids.shape == (12, 2)

    def test_masked_tokens_take_no_room(self) -> None:
        layer, x = layer_of(), torch.randn(8, 16)
        mask = torch.tensor([False] * 4 + [True] * 4)
        half = layer(x[4:], capacity_factor=1.0)
        torch.testing.assert_close(layer(x, capacity_factor=0.5, token_mask=mask)[4:], half)

    def test_no_token_at_all(self) -> None:
        layer, x = layer_of(balancing=BALANCING), torch.randn(4, 16, requires_grad=True)
        y = layer(x, token_mask=torch.zeros(4, dtype=torch.bool))
        assert (y == 0).all()
        assert layer.aux_loss.item() == 0.0
        (y.sum() + layer.aux_loss).backward()
        assert (x.grad == 0).all()

    def test_of_another_shape(self) -> None:
        with pytest.raises(ConfigError, match=r"token_mask has shape \[6\], but the tokens \[2, 3\]"):
            layer_of()(torch.randn(2, 3, 16), token_mask=torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [0.0, 4.0])
def test_a_nan_reaches_only_its_own_token(backend: str, factor: float) -> None:
    layer, x = layer_of(bias=True, capacity_factor=factor), torch.randn(12, 16)
    clean = layer(x)
    x[5, 3] = float("nan")
    with moesaic.use_backend(backend):
        y = layer(x)
    others = [t for t in range(12) if t != 5]
    assert y[5].isnan().all()
    torch.testing.assert_close(y[others], clean[others])


class TestBalancing:
    def test_slots_are_counted_while_training_and_forgotten_after_the_step(self) -> None:
        layer, x = layer_of(router="sigmoid_topk", balancing={"bias_update": 0.01}), torch.randn(10, 16)
        layer(x)
        layer(x)
        assert int(layer.slot_counts.sum()) == 40
        layer.eval()
        layer(x)
        assert int(layer.slot_counts.sum()) == 40
        layer.after_step()
        assert int(layer.slot_counts.sum()) == 0

    def test_the_bias_moves_by_the_papers_rule(self) -> None:
        layer = layer_of(router="sigmoid_topk", balancing={"bias_update": 0.01})
        layer(torch.randn(30, 16))
        counts = layer.last_routing.counts().tolist()
        update_balancing(torch.nn.Sequential(layer))
        wanted = reference.updated_bias([0.0] * 4, counts, 0.01)
        assert layer.router.get_buffer("selection_bias").tolist() == pytest.approx(wanted)

    def test_the_bias_evens_out_the_load(self) -> None:
        layer = layer_of(router="sigmoid_topk", num_experts=8, balancing={"bias_update": 0.02})
        x = torch.randn(400, 16) + 1.5  # a common direction: some experts are far more popular
        loads = []
        for _ in range(60):
            layer(x)
            load = layer.last_routing.counts().double()
            loads.append((load.max() / load.mean()).item())
            update_balancing(layer)
        assert loads[0] > 1.5
        assert loads[-1] < 1.15

    def test_a_loss_evens_out_the_load(self) -> None:
        layer = layer_of(num_experts=8, balancing={"load_balancing": 1.0})
        x = torch.randn(400, 16) + 1.5
        optimizer = torch.optim.Adam([layer.router.weight], lr=0.02)
        losses = []
        for _ in range(60):
            layer(x)
            losses.append(layer.aux_loss.item())
            optimizer.zero_grad()
            layer.aux_loss.backward()
            optimizer.step()
        assert losses[0] > 1.2
        assert losses[-1] < 1.03

    def test_moe_layers_are_found_in_order(self) -> None:
        layers = [layer_of() for _ in range(3)]
        model = torch.nn.Sequential(layers[0], torch.nn.Linear(16, 16), torch.nn.Sequential(layers[1], layers[2]))
        assert moe_layers(model) == layers

    @pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double])
    def test_the_bias_stays_float32(self, cast: Callable[[MoE], MoE]) -> None:
        layer = layer_of(router="sigmoid_topk", balancing={"bias_update": 0.001})
        layer.router.selection_bias.fill_(0.6)
        cast(layer)
        assert layer.router.weight.dtype != torch.float32
        layer.slot_counts.copy_(torch.tensor([1001, 1000, 999, 1000]))
        layer.after_step()
        wanted = torch.tensor([0.599, 0.6, 0.601, 0.6])
        torch.testing.assert_close(layer.router.selection_bias, wanted, atol=1e-6, rtol=0)

    def test_a_router_that_inherits_the_bias(self) -> None:
        class Mine(SigmoidTopK):
            pass

        check_balancing({"bias_update": 0.1}, Mine)

    def test_losses_alone_count_no_slots(self) -> None:
        layer = layer_of(balancing={"load_balancing": 0.1})
        layer(torch.randn(10, 16))
        assert int(layer.slot_counts.sum()) == 0

    def test_nothing_of_the_graph_is_kept_without_a_loss(self) -> None:
        layer, x = layer_of(), torch.randn(10, 16, requires_grad=True)
        layer(x)
        assert not any(value.requires_grad for value in vars(layer.last_routing).values() if value is not None)


class TestSavingAndCopying:
    @pytest.mark.parametrize("activation", ACTIVATIONS.names())
    def test_a_copy_after_a_forward(self, activation: str) -> None:
        layer = layer_of(balancing=BALANCING, num_shared_experts=1, activation=activation)
        x = torch.randn(5, 16)
        y = layer(x)
        twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), pickled_by_torch(layer)]
        for twin in twins:
            assert twin.last_routing is None
            assert twin.aux_loss.item() == 0.0
            assert torch.equal(twin(x), y)
        assert layer.last_routing is not None

    @pytest.mark.parametrize("router", moesaic.routing.available())
    def test_the_state_dict_goes_round(self, router: str) -> None:
        layer, x = layer_of(router=router, bias=True, num_shared_experts=1, shared_gate=True), torch.randn(5, 16)
        if router == "sigmoid_topk":
            layer.router.get_buffer("selection_bias").normal_()
        given = create_router("softmax_topk", 16, 4, 2)(x)
        context = RoutingContext(token_ids=torch.arange(5), given=given)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        assert not any("slot_counts" in name for name in state)
        twin = MoE(layer.config)
        twin.load_state_dict(state, strict=True)
        assert torch.equal(twin.eval()(x, context=context), layer.eval()(x, context=context))

    def test_moving_takes_the_buffers_along(self) -> None:
        layer = layer_of(router="sigmoid_topk").to("meta")
        assert layer.slot_counts.device.type == layer.router.get_buffer("selection_bias").device.type == "meta"

    def test_it_can_be_built_without_memory(self) -> None:
        with torch.device("meta"):
            layer = MoE(MoEConfig(d_model=1024, d_ff=4096, num_experts=512))
        assert layer.experts.up.device.type == "meta"


def pickled_by_torch(layer: MoE) -> MoE:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: MoE = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 1.0}, {"router": "sigmoid_topk"}], ids=str)
def test_two_runs_are_bit_equal(changes: dict[str, Any], backend: str) -> None:
    layer, x = (
        layer_of(d_model=64, d_ff=96, num_experts=8, balancing=BALANCING, bias=True, **changes),
        torch.randn(300, 64),
    )

    def run() -> list[Tensor]:
        layer.zero_grad()
        with moesaic.use_backend(backend):
            y = layer(x)
        (y.square().sum() + layer.aux_loss).backward()
        return [y, layer.aux_loss, *[p.grad.clone() for p in layer.parameters()]]

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, second = run(), run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"top_k": 5}, "top_k is 5: it must be at least 1 and at most num_experts = 4"),
            ({"top_k": 0}, "top_k is 0"),
            ({"num_experts": 0}, "num_experts is 0: it must be at least 1"),
            ({"d_model": -1}, "d_model is -1: it must be at least 1"),
            ({"d_ff": 0}, "d_ff is 0: it must be at least 1"),
            ({"num_shared_experts": -1}, "num_shared_experts is -1: it must be at least 0"),
            ({"shared_d_ff": 0}, "shared_d_ff is 0: it must be at least 1"),
            ({"router": "softmax"}, r"unknown router 'softmax': did you mean 'softmax_topk'\? allowed: "),
            (
                {"router_options": {"normalise": True}},
                "router 'softmax_topk' has no option 'normalise': did you mean 'normalize'",
            ),
            ({"balancing": {"zloss": 0.1}}, r"unknown balancer 'zloss': did you mean 'z_loss'\?"),
            ({"balancing": {"bias_update": 0.1}}, "'bias_update' needs a router with a selection_bias"),
            ({"top_k": 1.5}, "top_k is 1.5: it must be a whole number"),
            ({"d_ff": True}, "d_ff is True: it must be a whole number"),
            ({"capacity_factor": float("inf")}, "capacity_factor is inf: it must be finite"),
            ({"shared_gate": True}, "shared_gate needs shared experts"),
            ({"router_options": {"normalize": "no"}}, "option 'normalize' .* is 'no': it must be true or false"),
            (
                {"router": "sigmoid_topk", "router_options": {"num_groups": 2.0}},
                "option 'num_groups' .* is 2.0: it must be a whole number",
            ),
            (
                {"router": "sigmoid_topk", "router_options": {"scale": float("nan")}},
                "option 'scale' .* is nan: it must be a finite number",
            ),
            ({"activation": "swigl"}, r"unknown activation 'swigl': did you mean 'swiglu'\?"),
        ],
    )
    def test_settings(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            MoEConfig(**{"d_model": 16, "d_ff": 24, "num_experts": 4, **changes})

    def test_options_are_checked_before_any_weight_is_made(self) -> None:
        with pytest.raises(ConfigError, match="num_groups is 3: it must divide num_experts = 4"):
            MoEConfig(16, 24, 4, router="sigmoid_topk", router_options={"num_groups": 3})

    def test_calls(self) -> None:
        layer = layer_of()
        with pytest.raises(ConfigError, match=r"features of width d_model = 16, got \[2, 17\]"):
            layer(torch.randn(2, 17))
        with pytest.raises(ConfigError, match="top_k is 5"):
            layer(torch.randn(2, 16), top_k=5)
        with pytest.raises(ConfigError, match=r"features are torch.float64 but the expert weights are torch.float32"):
            layer(torch.randn(2, 16).double())
