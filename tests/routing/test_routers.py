"""What a router promises, whatever it is called: shapes, null slots, per-call top_k, options, errors."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic
from moesaic.errors import ConfigError
from moesaic.routing import ROUTERS, Router, Routing, create_router

ALL = [
    ("softmax_topk", {}),
    ("softmax_topk", {"normalize": False}),
    ("sigmoid_topk", {}),
    ("sigmoid_topk", {"num_groups": 4, "top_groups": 2, "scale": 2.5}),
]


def spread(name: str, num_experts: int = 8, top_k: int = 3, **options: Any) -> Router:
    torch.manual_seed(0)
    router = create_router(name, 16, num_experts, top_k, **options)
    router.reset_parameters(0.5)
    return router


def test_every_registered_router_is_tested_here_or_in_its_own_file() -> None:
    own = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert set(moesaic.routing.available()) == set(ROUTERS.names())
    assert set(ROUTERS.names()) - {name for name, _ in ALL} - own == set()


OURS = {name: kind for name in ROUTERS.names() if (kind := ROUTERS.get(name)).__module__.startswith("moesaic.")}


def test_one_router_a_file_of_at_most_150_lines() -> None:
    files = {name: Path(str(inspect.getsourcefile(kind))) for name, kind in OURS.items()}
    assert len(set(files.values())) == len(files)
    assert {name: lines for name in files if (lines := len(files[name].read_text().splitlines())) > 150} == {}


def test_nobody_asks_which_router_it_is() -> None:
    """No comparison with a router's name, none with its class outside of its own file. (A balancer's ``check`` may say
    whose loss it is.)"""
    names = "|".join(OURS)
    by_name = re.compile(rf"router\W*(==|!=|\bin\b)\W+({names})[\"']|[\"']({names})[\"'] *(==|!=) *\w*router")
    for path in Path(moesaic.__file__).parent.rglob("*.py"):
        own = [name for name, kind in OURS.items() if kind.__module__.endswith(f".{path.stem}")]
        others = [kind.__name__ for name, kind in OURS.items() if name not in own]
        by_kind = re.compile(rf"isinstance\([^()]*\b({'|'.join(others)})\b")
        text = path.read_text()
        assert not by_name.search(text) and not by_kind.search(text), path


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_shapes_and_dtypes(name: str, options: dict[str, Any], tokens: int) -> None:
    routing = spread(name, **options)(torch.randn(tokens, 16))
    assert (routing.expert_ids.dtype, routing.weights.dtype) == (torch.int64, torch.float32)
    assert list(routing.expert_ids.shape) == list(routing.weights.shape) == [tokens, 3]
    assert list(routing.scores.shape) == list(routing.logits.shape) == [tokens, 8]
    assert (routing.num_experts, routing.top_k) == (8, 3)
    assert ((routing.expert_ids >= 0) & (routing.expert_ids < 8)).all()


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_a_token_never_takes_an_expert_twice(name: str, options: dict[str, Any]) -> None:
    routing = spread(name, **options)(torch.randn(50, 16), top_k=4)
    assert all(len(set(row)) == 4 for row in routing.expert_ids.tolist())


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_first_choice_first(name: str, options: dict[str, Any]) -> None:
    """Capacity serves first choices first, so the slots are in the order of preference."""
    routing = spread(name, **options)(torch.randn(50, 16))
    assert (routing.weights.diff(dim=1) <= 0).all()  # there is no selection bias, so weights follow preference


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_top_k_of_one_call(name: str, options: dict[str, Any]) -> None:
    router, x = spread(name, **options), torch.randn(5, 16)
    assert router(x, 1).top_k == 1
    assert router(x, 4).top_k == 4
    assert router(x).top_k == 3
    assert torch.equal(router(x, 1).expert_ids, router(x).expert_ids[:, :1])


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
@pytest.mark.parametrize("top_k", [0, -1, 9])
def test_top_k_out_of_range(name: str, top_k: int) -> None:
    message = f"top_k is {top_k}: it must be at least 1 and at most num_experts = 8"
    with pytest.raises(ConfigError, match=message):
        create_router(name, 16, 8, top_k)
    with pytest.raises(ConfigError, match=message):
        spread(name)(torch.randn(2, 16), top_k=top_k)


def test_normalized_weights_sum_to_one_and_to_the_scale() -> None:
    x = torch.randn(20, 16)
    for name, scale in (("softmax_topk", 1.0), ("sigmoid_topk", 1.0), ("sigmoid_topk", 2.5)):
        options = {} if name == "softmax_topk" else {"scale": scale}
        torch.testing.assert_close(spread(name, **options)(x).weights.sum(dim=1), torch.full((20,), scale))


def test_weights_without_normalization_are_the_scores() -> None:
    x = torch.randn(20, 16)
    for name in ("softmax_topk", "sigmoid_topk"):
        routing = spread(name, normalize=False)(x)
        assert torch.equal(routing.weights, routing.scores.gather(1, routing.expert_ids))


def test_the_gate_is_float32_in_any_precision() -> None:
    """A bfloat16 gate would let near-ties between experts fall otherwise than in float32."""
    x = torch.randn(200, 16).bfloat16()
    for name, options in ALL:
        router = spread(name, **options).bfloat16()
        routing = router(x)
        wide = router.float()(x.float())
        assert routing.logits.dtype == routing.weights.dtype == torch.float32
        assert torch.equal(routing.logits, wide.logits)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(x).logits, wide.logits)


class TestSelectionBias:
    def test_selects_but_does_not_weigh(self) -> None:
        router, x = spread("sigmoid_topk", normalize=False), torch.randn(40, 16)
        before = router(x)
        router.selection_bias[5] = 10.0
        after = router(x)
        assert (after.expert_ids[:, 0] == 5).all()
        assert torch.equal(after.scores, before.scores)
        assert torch.equal(after.weights, after.scores.gather(1, after.expert_ids))

    def test_is_saved_and_gets_no_gradient(self) -> None:
        router = spread("sigmoid_topk")
        assert list(router.state_dict()) == ["weight", "selection_bias"]
        assert [name for name, _ in router.named_parameters()] == ["weight"]

    def test_can_be_built_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            router = create_router("sigmoid_topk", 4, 6, 2)
        router = router.to_empty(device="cpu")
        router.reset_parameters()
        assert router.get_buffer("selection_bias").tolist() == [0.0] * 6
        assert router.bfloat16().get_buffer("selection_bias").dtype == torch.float32

    @pytest.mark.parametrize(
        ("options", "groups"), [({}, 1), ({"num_groups": 3}, 3), ({"num_groups": 3, "top_groups": 3}, 1)]
    )
    def test_says_which_groups_are_closed(self, options: dict[str, int], groups: int) -> None:
        assert ROUTERS.get("sigmoid_topk").choice_groups(options) == groups
        assert ROUTERS.get("softmax_topk").choice_groups({}) == 1

    def test_excluded_groups_stay_excluded_where_every_score_is_negative(self) -> None:
        router = spread("sigmoid_topk", num_groups=4, top_groups=1, top_k=2)
        router.selection_bias.fill_(-5.0)  # a score set to 0 would beat all of them
        groups = router(torch.randn(50, 16)).expert_ids // 2
        assert (groups[:, 0] == groups[:, 1]).all()


class TestGroups:
    def test_only_the_best_groups_are_chosen_from(self) -> None:
        routing = spread("sigmoid_topk", num_groups=4, top_groups=2)(torch.randn(100, 16))
        assert all(len({e // 2 for e in row}) <= 2 for row in routing.expert_ids.tolist())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_groups": 3}, "num_groups is 3: it must divide num_experts = 8"),
            ({"num_groups": 0}, "num_groups is 0: it must divide"),
            ({"num_groups": 4, "top_groups": 5}, "top_groups is 5: it must be at least 1 and at most num_groups = 4"),
            ({"num_groups": 4, "top_groups": 0}, "top_groups is 0"),
            ({"num_groups": 4, "top_groups": 1}, "top_k is 3, but top_groups = 1 leave 2 experts"),
        ],
    )
    def test_settings_that_do_not_go_together(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            create_router("sigmoid_topk", 16, 8, 3, **options)

    def test_top_k_of_one_call_reaches_no_further(self) -> None:
        router = spread("sigmoid_topk", num_groups=4, top_groups=2)
        with pytest.raises(ConfigError, match="top_k is 5, but top_groups = 2 leave 4 experts"):
            router(torch.randn(2, 16), top_k=5)


def test_unknown_names_come_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown router 'softmax_tpk': did you mean 'softmax_topk'\? allowed: "):
        create_router("softmax_tpk", 4, 4, 1)
    with pytest.raises(
        ConfigError, match=r"router 'sigmoid_topk' has no option 'num_group': did you mean 'num_groups'"
    ):
        create_router("sigmoid_topk", 4, 4, 1, num_group=2)
    with pytest.raises(ConfigError, match=r"router 'softmax_topk' has no option 'zzz': allowed: normalize"):
        create_router("softmax_topk", 4, 4, 1, zzz=2)


class TestRouting:
    def routing(self) -> Routing:
        scores = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], requires_grad=True)
        ids = torch.tensor([[0, 1], [2, 3], [3, 3]])  # 3 is null
        return Routing(ids, torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.0, 0.0]]) * scores.sum(), scores, scores.log())

    def test_counts_leave_out_null_slots(self) -> None:
        assert self.routing().counts().tolist() == [1, 1, 1]

    def test_without_makes_slots_null(self) -> None:
        routing = self.routing().without(torch.tensor([[True], [False], [False]]))
        assert routing.expert_ids.tolist() == [[3, 3], [2, 3], [3, 3]]
        assert routing.weights[0].tolist() == [0, 0]
        assert routing.counts().tolist() == [0, 0, 1]

    def test_detach_cuts_the_graph(self) -> None:
        routing = self.routing()
        cut = routing.detach()
        assert routing.weights.requires_grad
        assert not any(t.requires_grad for t in (cut.weights, cut.scores, cut.logits))
        assert torch.equal(cut.weights, routing.weights)

    def test_detach_without_logits(self) -> None:
        routing = self.routing()
        routing.logits = None
        assert routing.detach().logits is None
