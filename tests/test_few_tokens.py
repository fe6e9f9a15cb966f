"""The short way of frozen layers for a few tokens: the same as the long one, and aside where it must be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.experts.native.problems import needs_library
from tests.hf.tiny import model_of, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrize

import moesaic
from moesaic import MoE, MoEConfig, autotune, few_tokens, use_backend
from moesaic.experts.row_invariance import row_invariant
from moesaic.layer import moe_layers
from moesaic.routing import RoutingContext
from moesaic.routing.softmax_topk import SoftmaxTopK

pytestmark = needs_library
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("softmax_topk", {}),
    ("softmax_topk", {"normalize": False}),
    ("sigmoid_topk", {"scale": 1.5}),
    ("unit_topk", {}),
]


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """Then every call of few tokens goes the short way."""
    with use_backend("native"), torch.no_grad():
        yield


def layer_of(dtype: torch.dtype = torch.float32, **changes: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{"d_model": 32, "d_ff": 24, "num_experts": 6, "top_k": 2, **changes}))
    layer.router.reset_parameters(0.5)
    with torch.no_grad():
        for name in ("bias", "scale", "selection_bias"):
            if isinstance(values := getattr(layer.router, name, None), Tensor):
                values.normal_()
    return layer.to(dtype).eval()


def frozen(layer: MoE) -> MoE:
    return moesaic.freeze(copy.deepcopy(layer))


def went_short(layer: MoE) -> bool:
    return layer.last_choice is not None and layer.last_choice.why == "routed"


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert (got - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("router", "options"), ROUTERS, ids=str)
def test_it_computes_what_the_long_way_does(router: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    balancing = {"load_balancing": 0.1, "z_loss": 0.1}
    layer = layer_of(dtype, router=router, router_options=options, balancing=balancing)
    short = frozen(layer)
    for shape in [(1, 32), (1, 1, 32), (16, 32), (2, 3, 32)]:
        x = torch.randn(shape).to(dtype)
        mask = torch.rand(shape[:-1]) < 0.7
        for token_mask in (None, mask):
            wanted, got = layer(x, token_mask=token_mask), short(x, token_mask=token_mask)
            assert went_short(short) and not went_short(layer)
            close(got, wanted, dtype)
            ours, theirs = short.last_routing, layer.last_routing
            assert ours is not None and theirs is not None
            assert torch.equal(ours.expert_ids, theirs.expert_ids)
            for name in ("weights", "scores", "logits"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)
            assert torch.equal(ours.token_mask, theirs.token_mask) and ours.sequence_length == theirs.sequence_length
            torch.testing.assert_close(short.aux_loss, layer.aux_loss, rtol=1e-4, atol=1e-5)
            assert torch.equal(short.experts.last_counts, layer.experts.last_counts)


@pytest.mark.parametrize("quantized", ["int8", "int4"])
def test_quantized_experts(quantized: str) -> None:
    layer = moesaic.quantize(layer_of(d_model=64, d_ff=64), quantized)
    short, x = frozen(layer), torch.randn(2, 64)
    close(short(x), layer(x))
    assert went_short(short)


def test_a_mask_that_is_a_column_of_a_wider_one() -> None:
    layer = layer_of()
    x, wide = torch.randn(3, 1, 32), torch.tensor([[True, False], [False, True], [True, True]])
    close(frozen(layer)(x, token_mask=wide[:, -1:]), layer(x, token_mask=wide[:, -1:]))


def test_only_frozen_layers_have_it() -> None:
    layer = layer_of()
    layer(torch.randn(1, 32))
    assert layer.few_tokens is None and not went_short(layer)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_shared_experts": 1},
        {"zero_computation_experts": {"zero": 1}},
        {"capacity_factor": 2.0},
        {"expert_d_ffs": (8, 8, 8, 8, 16, 16)},
        {"iterations": 2},
        {"communication_width": 16},
        {"router": "relu"},
        {"router": "sigmoid_topk", "router_options": {"num_groups": 3, "top_groups": 2}},
        {"router": "unit_topk", "router_options": {"straight_through": True}},
    ],
    ids=str,
)
def test_layers_with_more_than_a_router_and_experts_have_it_not(changes: dict[str, Any]) -> None:
    layer = layer_of(**changes)
    short, x = frozen(layer), torch.randn(2, 32)
    assert short.few_tokens is None
    close(short(x), layer(x))


@pytest.mark.parametrize("name", ["forward", "logits", "extra_repr"])
def test_a_derived_router_is_called(name: str) -> None:
    class Mine(SoftmaxTopK):
        pass

    setattr(Mine, name, lambda self, *args: getattr(SoftmaxTopK, name)(self, *args))
    short = layer_of()
    short.router.__class__ = Mine
    assert moesaic.freeze(short).few_tokens is None


def _hooked(which: str) -> Callable[[MoE], None]:
    return lambda layer: void(getattr(layer, which).register_forward_hook(lambda *_: None))


def void(_: object) -> None: ...


def _shifted(layer: MoE) -> None:
    layer.router.logit_shift = torch.tensor([0.0, 9, 0, 0, 9, 0])


def _other_router(layer: MoE) -> None:
    layer.router = copy.deepcopy(layer.router)
    layer.router.weight.mul_(-1)


def _wrapped_router(layer: MoE) -> None:
    before = layer.router.forward
    layer.router.forward = lambda *args: before(*args)  # type: ignore[method-assign]


def test_a_router_wrapped_before_is_called() -> None:
    layer = layer_of()
    before, x = layer.router.forward, torch.randn(2, 32)
    layer.router.forward = lambda *args: replace(routing := before(*args), weights=2 * routing.weights)  # type: ignore[method-assign]
    wanted = layer(x)
    close(moesaic.freeze(layer)(x), wanted)
    assert layer.few_tokens is None


def test_frozen_twice_it_keeps_its_short_way() -> None:
    short = moesaic.freeze(frozen(layer_of()))
    short(torch.randn(2, 32))
    assert went_short(short)


def _wide_router(layer: MoE) -> None:
    layer.router.double()


def _derived_router(layer: MoE) -> None:
    layer.router.__class__ = type("Mine", (type(layer.router),), {"slots": lambda self, top_k: 1})


@pytest.mark.parametrize(
    "change",
    [
        _hooked("router"),
        _hooked("experts"),
        _shifted,
        _other_router,
        _wrapped_router,
        _wide_router,
        _derived_router,
    ],
)
def test_it_steps_aside_for_what_has_changed(change: Callable[[MoE], None]) -> None:
    layer = layer_of()
    short, x = frozen(layer), torch.randn(2, 32)
    short(x)
    assert went_short(short)
    change(short)
    if change is not _wrapped_router:
        change(layer)
    close(short(x), layer(x))
    assert not went_short(short)


def test_it_steps_aside_for_the_call() -> None:
    layer = layer_of()
    short, x = frozen(layer), torch.randn(2, 32)

    def long(wanted: Tensor | None, got: Tensor, tolerance: float = 1e-5) -> None:
        assert not went_short(short)
        if wanted is not None:
            assert (got.float() - wanted.float()).norm() <= tolerance * wanted.float().norm()

    long(layer(x, top_k=1), short(x, top_k=1))
    long(layer(x, capacity_factor=0.5), short(x, capacity_factor=0.5))
    given = layer.decide(-x)
    long(layer(x, context=RoutingContext(given=given)), short(x, context=RoutingContext(given=given)))
    many = torch.randn(few_tokens.MOST_TOKENS + 1, 32)
    long(layer(many), short(many))
    long(layer(x[:0]), short(x[:0]))
    with use_backend("loop"):
        long(layer(x), short(x))
    with row_invariant():
        long(layer(x), short(x))
    with torch.autocast("cpu", torch.bfloat16):
        long(layer(x), short(x), 2e-2)
    with torch.enable_grad():
        long(layer(x), y := short(x.requires_grad_()))
        assert y.requires_grad
    x = x.detach()
    assert short(x) is not None and went_short(short)


def test_adapters_go_the_long_way() -> None:
    class Part:
        active, tokens = True, None

        def compute(self, x_TD: Tensor, dispatch: object, weights: object) -> Tensor:
            return 2 * x_TD

    short, x = frozen(layer_of()), torch.randn(2, 32)
    short.experts.low_rank = Part()
    assert torch.equal(short(x), 2 * x)


def test_weights_that_change_or_move() -> None:
    layer = layer_of()
    short, x = frozen(layer), torch.randn(2, 32)
    short(x)
    for each in (layer, short):
        each.experts.down.mul_(2)
        each.router.weight.mul_(-1)
    close(short(x), layer(x))
    for each in (layer, short):
        each.experts.up.data = each.experts.up.data.flip(0).clone()
    close(short(x), layer(x))
    for each in (layer, short):
        each.bfloat16()
    close(short(x.bfloat16()), layer(x.bfloat16()), torch.bfloat16)
    assert went_short(short)
    with pytest.raises(moesaic.MoesaicError, match=r"features are torch\.float32 but the expert weights are"):
        short(x)


def _activation(layer: MoE) -> None:
    layer.experts.activation = moesaic.experts.ACTIVATIONS.get("geglu")


def _fewer_neurons(layer: MoE) -> None:
    up, down = layer.experts.up, layer.experts.down
    up.data, down.data = up.data[:, :32], down.data[..., :16]


def _one_matrix_for_all(layer: MoE) -> None:
    layer.experts.down.data = layer.experts.down.data[:1].expand(6, -1, -1)


@pytest.mark.parametrize("change", [_activation, _fewer_neurons, _one_matrix_for_all])
def test_experts_that_change_in_place(change: Callable[[MoE], None]) -> None:
    layer = layer_of()
    short, x = frozen(layer), torch.randn(2, 32)
    before = short(x)
    for each in (layer, short):
        change(each)
    close(short(x), layer(x))
    assert went_short(short) and not torch.equal(short(x), before)


def test_parametrized_experts_go_the_long_way() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = layer_of()
    short, x = frozen(layer), torch.randn(2, 32)
    for each in (layer, short):
        parametrize.register_parametrization(each.experts, "up", Doubled())
    close(short(x), layer(x))
    for each in (layer, short):
        each.experts.parametrizations.up.original.mul_(3)
    close(short(x), layer(x))


def _wide_bias(layer: MoE) -> None:
    layer.router.bias.data = layer.router.bias.data.double()


def _spread_bias(layer: MoE) -> None:
    layer.router.bias.data = layer.router.bias.data.repeat_interleave(2)[::2]


def _spread_scale(layer: MoE) -> None:
    layer.router.scale.data = layer.router.scale.data[:1].expand(6)


def _wide_selection(layer: MoE) -> None:
    layer.router.selection_bias = layer.router.selection_bias.double()


def _spread_expert_bias(layer: MoE) -> None:
    wide = layer.experts.down_bias.data.repeat(1, 2)
    layer.experts.down_bias.data = wide[:, :32]


@pytest.mark.parametrize(
    ("router", "change"),
    [
        ("unit_topk", _wide_bias),
        ("unit_topk", _spread_bias),
        ("unit_topk", _spread_scale),
        ("sigmoid_topk", _wide_selection),
        ("softmax_topk", _spread_expert_bias),
    ],
)
def test_tensors_that_compiled_code_would_misread(router: str, change: Callable[[MoE], None]) -> None:
    layer = layer_of(router=router, bias=True)
    short, x = frozen(layer), torch.randn(2, 32)
    for _ in range(2):
        for each in (layer, short):
            change(each)
        close(short(x), layer(x))
        assert not went_short(short)
        for each in (layer, short):
            each.experts.down_bias.add_(1)


def test_what_the_long_way_refuses_is_refused() -> None:
    x = torch.randn(2, 32)

    def after(change: Callable[[MoE], object]) -> MoE:
        short = frozen(layer_of())
        short(x)
        change(short)
        return short

    with pytest.raises(moesaic.MoesaicError, match="3 experts"):
        after(lambda short: setattr(short.router.weight, "data", short.router.weight.data[:3]))(x)
    with pytest.raises(RuntimeError):
        after(lambda short: setattr(short.router, "top_k", 7))(x)


def test_a_router_without_values_is_not_read() -> None:
    short, x = frozen(layer_of()), torch.randn(2, 32)
    short(x)
    short.router.to("meta")
    short(x)  # what PyTorch makes of it
    assert not went_short(short)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_pytorchs_default_dtype_changes_nothing(default: torch.dtype) -> None:
    short, x = frozen(layer_of()), torch.randn(2, 32)
    wanted = short(x)
    torch.set_default_dtype(default)
    try:
        # The first call of a copy makes it ready.
        for each in (short, copy.deepcopy(short)):
            assert torch.equal(each(x), wanted) and went_short(each)
            routing = each.last_routing
            assert routing is not None and routing.weights.dtype == routing.scores.dtype == torch.float32
            torch.testing.assert_close(routing.weights.sum(1), torch.ones(2, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)


def test_many_experts_a_token_go_the_long_way() -> None:
    layer = layer_of(num_experts=128, top_k=128, d_ff=1)
    short, x = frozen(layer), torch.randn(1, 32)
    close(short(x), layer(x))
    assert not went_short(short)


def test_it_exports_for_any_number_of_tokens() -> None:
    plain, x = layer_of(), torch.randn(20, 32)
    many = ({0: torch.export.Dim.DYNAMIC},)
    for layer in (plain, frozen(plain)):
        program = torch.export.export(layer, (x,), dynamic_shapes=many, strict=False)
        close(program.module()(x[:3]), plain(x[:3]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_has_its_own(copied: Callable[[MoE], MoE]) -> None:
    short, x = frozen(layer_of()), torch.randn(2, 32)
    wanted = short(x)
    other = copied(short)
    short.experts.down.zero_()
    assert torch.equal(other(x), wanted) and went_short(other)
    assert not short(x).any()


def test_the_tuner_keeps_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_tokens, "TURN", 4)
    short, x = frozen(layer_of()), torch.randn(2, 32)

    def calls(count: int) -> str:
        return "".join("s" if short(x) is not None and went_short(short) else "l" for _ in range(count))

    chosen, why = "native", "measured"

    def tuned(x_TD: Tensor, dispatch: Any, weights: Any) -> tuple[Tensor, moesaic.experts.Choice]:
        y_TD = moesaic.experts.BACKENDS.get(chosen).run(x_TD, dispatch, weights)
        return y_TD, moesaic.experts.Choice(chosen, why)

    before = moesaic.experts.backend.tune_with(tuned)
    try:
        with use_backend("auto"):
            with autotune.use_tuning("on"):
                assert calls(9) == "lssslsssl"
                chosen = "loop"
                # Asked every call from the next turn on, as without a short way.
                assert calls(8) == "ssslllll"
                chosen = "native"
                assert calls(5) == "lsssl"
                # Not yet the best while it is only tried.
                why = "exploring"
                assert calls(6) == "ssslll"
                why = "measured"
            with autotune.use_tuning("off"):
                assert calls(6) == "l" * 6
            with autotune.record() as log:
                assert calls(6) == "l" * 6
            assert len(log) == 6
    finally:
        moesaic.experts.backend.tune_with(before)


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk", "unit_topk"])
def test_a_whole_model_generates_the_same(router: str) -> None:
    plain = model_of(router=router)
    model = moesaic.freeze(copy.deepcopy(plain))
    ids = tokens(2, 5)
    wanted = plain.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), wanted)
    assert all(map(went_short, moe_layers(model)))
