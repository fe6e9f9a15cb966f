"""Models over ranks give what they give in one process; what cannot be spread is refused in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.hf.parallel_models import build, compare, largest_errors, mine, tokens
from tests.parallel import harness
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import moesaic
from moesaic import MoE, MoEConfig
from moesaic.errors import ConfigError, MoesaicError, UnsupportedError
from moesaic.hf.state import full_state_dict


class TestModels:
    @pytest.mark.parametrize(
        ("kind", "num_experts", "ranks"),
        [
            *((kind, 4, 2) for kind in ("moesaic", "olmoe", "mixtral", "qwen3_moe", "gpt_oss")),
            *((kind, 5, 3) for kind in ("moesaic", "qwen3_moe")),
            *((kind, 2, 4) for kind in ("moesaic", "gpt_oss")),
        ],
    )
    def test_logits_and_gradients(self, kind: str, num_experts: int, ranks: int) -> None:
        for errors in harness.pool(ranks).run(compare, kind, num_experts, {}):
            assert max(errors.values()) < 1e-5, errors

    @pytest.mark.parametrize("strategy", ["tokens", "weights", "hybrid"])
    def test_of_any_strategy(self, strategy: str) -> None:
        for errors in harness.pool(2).run(compare, "moesaic", 4, {"strategy": strategy, "overlap": 2}):
            assert max(errors.values()) < 1e-5, errors

    def test_gradients_of_recomputed_layers(self) -> None:
        for errors in harness.pool(2).run(recomputed):
            assert max(errors.values()) < 1e-5, errors

    def test_generate(self) -> None:
        assert harness.pool(2).run(generated) == [True, True]

    def test_tied_embeddings_stay_tied(self) -> None:
        assert harness.pool(2).run(tied) == [True, True]


def recomputed() -> dict[str, float]:
    model, batch = build("moesaic", 4).train(), tokens(4)
    alone = copy.deepcopy(model)
    alone(batch, labels=batch).loss.backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    moesaic.parallelize(model)
    model(mine(batch), labels=mine(batch)).loss.backward()
    return largest_errors(model, alone)


def generated() -> bool:
    model = build("moesaic", 4).eval()
    prompt = mine(tokens(4))
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False)
    moesaic.parallelize(model)
    return torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)


def tied() -> bool:
    model = moesaic.parallelize(build("qwen3_moe", 4))
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def layer(**settings: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig(**{"d_model": 8, "d_ff": 6, "num_experts": 4, **settings}))


def features(rows: int) -> Tensor:
    return torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(2))


class TestLayer:
    @pytest.mark.parametrize(("num_experts", "ranks"), [(4, 2), (3, 2), (2, 3), (2, 4)])
    def test_bare(self, num_experts: int, ranks: int) -> None:
        for errors in harness.pool(ranks).run(bare_layer, num_experts):
            assert max(errors.values()) < 1e-5, errors

    def test_a_module_that_holds_some(self) -> None:
        for errors in harness.pool(2).run(two_layers):
            assert max(errors.values()) < 1e-5, errors

    def test_balancing_sees_all_ranks(self) -> None:
        """The ranks' tokens differ, so that a fraction of one rank's tokens would be another."""
        for loss, expected, counts, wanted, bias, moved in harness.pool(2).run(balanced, 0.0):
            assert loss == pytest.approx(expected, rel=1e-5)
            assert counts == wanted and bias == moved

    def test_balancing_sees_what_was_asked_for(self) -> None:
        """With a capacity, which counts the tokens of each rank by itself, as before it dropped any."""
        for loss, expected, counts, wanted, bias, moved in harness.pool(2).run(balanced, -0.5):
            assert loss == pytest.approx(expected, rel=1e-5)
            assert counts == wanted and bias == moved

    def test_tells_what_it_did(self) -> None:
        told = harness.pool(2).run(told_by_layer)
        assert [backend is not None for backend, *_ in told] == [True, True]
        assert {strategy for _, _, strategy in told} == {"tokens"}
        assert all(counts == own for _, (counts, own), _ in told)

    def test_autocast(self) -> None:
        for error, dtype in harness.pool(2).run(under_autocast):
            assert dtype == torch.bfloat16
            assert error < 0.05

    def test_frozen_experts(self) -> None:
        for trained in harness.pool(2).run(frozen):
            assert trained == {"experts.up": False, "experts.down": False, "router.weight": True}

    @pytest.mark.parametrize("shape", [(4,), (2, 2)])
    def test_meshes(self, shape: tuple[int, ...]) -> None:
        assert harness.pool(4).run(on_mesh, shape) == [True] * 4

    def test_part_of_the_ranks(self) -> None:
        assert harness.pool(4).run(on_half) == [True] * 4


def bare_layer(num_experts: int) -> dict[str, float]:
    made = layer(num_experts=num_experts, bias=True, num_shared_experts=1, shared_gate=True)
    alone, x = copy.deepcopy(made), features(2 * dist.get_world_size())
    expected = alone(x)
    expected.square().mean().backward()
    moesaic.parallelize(made)
    y = made(mine(x))
    y += 0.0  # what FSDP hangs on the output must survive it
    y.square().mean().backward()
    return {**largest_errors(made, alone), "output": float((y - mine(expected)).abs().max())}


def two_layers() -> dict[str, float]:
    made = nn.Sequential(layer(), nn.Linear(8, 8), layer(num_experts=2, activation="relu"))
    alone, x = copy.deepcopy(made), features(4)
    alone(x).square().mean().backward()
    moesaic.parallelize(made)
    made(mine(x)).square().mean().backward()
    return largest_errors(made, alone)


def balanced(capacity: float) -> tuple[Any, ...]:
    settings: dict[str, Any] = {
        "router": "sigmoid_topk",
        "balancing": {"load_balancing": 0.5, "bias_update": 0.1},
        "capacity_factor": capacity,
    }
    made = layer(**settings)
    alone, x = copy.deepcopy(made), features(6)
    alone(x)
    moesaic.parallelize(made)
    made(mine(x))
    losses = [torch.zeros(()) for _ in range(2)]
    dist.all_gather(losses, made.aux_loss.detach())
    counts, wanted = made.slot_counts.tolist(), alone.slot_counts.tolist()
    for each in (made, alone):
        each.after_step()
    biases = [each.router.get_buffer("selection_bias").tolist() for each in (made, alone)]
    return float(torch.stack(losses).mean()), float(alone.aux_loss), counts, wanted, *biases


def told_by_layer() -> tuple[Any, ...]:
    made = moesaic.parallelize(layer(), strategy="tokens")
    made(mine(features(4)))
    routing = made.last_routing
    assert routing is not None and made.experts.last_counts is not None
    counts = made.experts.last_counts.tolist(), routing.counts().tolist()
    return made.last_choice and made.last_choice.backend, counts, made.last_decision.plan.strategy


def under_autocast() -> tuple[float, torch.dtype]:
    made, x = layer(), features(4)
    expected = mine(made(x))
    moesaic.parallelize(made)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(mine(x))
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in made.parameters() if parameter.grad is not None)
    return float((y - expected).abs().max() / expected.abs().max()), y.dtype


def frozen() -> dict[str, bool]:
    made = layer()
    made.experts.requires_grad_(False)
    moesaic.parallelize(made)
    made(mine(features(4))).sum().backward()
    return {name: parameter.grad is not None for name, parameter in made.named_parameters()}


def on_mesh(shape: tuple[int, ...]) -> bool:
    names = ("host", "local")[: len(shape)]
    made, x = layer(), features(8)
    expected = mine(made(x))
    moesaic.parallelize(made, init_device_mesh("cpu", shape, mesh_dim_names=names))
    return torch.allclose(made(mine(x)), expected, atol=1e-5)


def on_half() -> bool:
    """Two models side by side, each over two of the four ranks."""
    half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "ranks"))["ranks"]
    torch.manual_seed(0)
    made, x = layer(num_experts=1, top_k=1), features(2)
    expected = made(x).chunk(2)[half.get_local_rank()]
    moesaic.parallelize(made, half)
    assert all(isinstance(parameter, DTensor) for parameter in made.parameters())
    return torch.allclose(made(x.chunk(2)[half.get_local_rank()]), expected, atol=1e-5)


def refused(name: str) -> tuple[str, str]:
    """The error of a case, of which every rank must have the same."""
    try:
        CASES[name]()
    except MoesaicError as error:
        return type(error).__name__, str(error)
    return "none", ""


def other_weights() -> None:
    model = build("olmoe", 4)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.experts.down_proj")[2, 3, 4] += 1
    moesaic.parallelize(model)


def other_settings() -> None:
    moesaic.parallelize(layer(capacity_factor=0.5 * dist.get_rank()))


def other_arguments() -> None:
    moesaic.parallelize(layer(), overlap=1 + dist.get_rank())


def twice() -> None:
    moesaic.parallelize(moesaic.parallelize(layer()))


def quantized() -> None:
    moesaic.parallelize(moesaic.quantize(layer(d_ff=32, d_model=32), "int8"))


def not_in_order() -> None:
    moesaic.parallelize(layer(), DeviceMesh("cpu", [2, 0, 1]))


CASES: dict[str, Callable[[], object]] = {
    "other weights": other_weights,
    "other settings": other_settings,
    "other arguments": other_arguments,
    "twice": twice,
    "quantized": quantized,
    "not in order": not_in_order,
    "no experts": lambda: moesaic.parallelize(nn.Linear(2, 2)),
    "no weights": lambda: moesaic.parallelize(layer().to("meta")),
    "strategy": lambda: moesaic.parallelize(layer(), strategy="tokns"),
    "exchange": lambda: moesaic.parallelize(layer(), exchange="hierarchic"),
    "replicas": lambda: moesaic.parallelize(layer(num_experts=2), replicas=2),
}


class TestRefusals:
    @pytest.mark.parametrize(
        ("case", "kind", "message"),
        [
            ("other weights", "ConfigError", "rank 1 differs from rank 0 in model.layers.1.mlp.experts.down_proj"),
            ("other settings", "ConfigError", "rank 1 differs from rank 0 in the configuration of MoE"),
            ("other arguments", "ConfigError", "rank 1 differs from rank 0 in the arguments of parallelize"),
            ("twice", "ConfigError", " is spread over ranks already"),
            ("quantized", "UnsupportedError", "experts: experts stored as int8 codes"),
            ("not in order", "ConfigError", "ranks [2, 0, 1]: they must be in rising order"),
            ("no experts", "ConfigError", "Linear has no experts"),
            ("no weights", "ConfigError", "is on the meta device"),
            ("strategy", "ConfigError", "did you mean 'tokens'?"),
            ("exchange", "ConfigError", "did you mean 'hierarchical'?"),
            ("replicas", "ConfigError", "replicas is 2: it must divide 3, the slices of experts"),
        ],
    )
    def test_of_what(self, case: str, kind: str, message: str) -> None:
        for name, text in harness.pool(3).run(refused, case):
            assert name == kind
            assert message in text and "\n" not in text

    def test_without_a_process_group(self) -> None:
        with pytest.raises(ConfigError, match=r"torchrun --nproc-per-node"):
            moesaic.parallelize(layer())

    def test_low_rank_parts(self) -> None:
        assert harness.pool(2).run(adapted) == ["UnsupportedError"] * 2

    def test_what_needs_whole_experts(self) -> None:
        """After parallelize: a one-line refusal instead of a wrong result."""
        for kinds in harness.pool(2).run(used_otherwise):
            assert kinds == ["UnsupportedError", "ConfigError"]


class Part(nn.Module):
    """As an adapter leaves it there."""

    active = False


def adapted() -> str:
    made = layer()
    made.experts.low_rank = Part()  # type: ignore[assignment]
    try:
        moesaic.parallelize(made)
    except UnsupportedError as error:
        return type(error).__name__
    return "none"


def used_otherwise() -> list[str]:
    made = moesaic.parallelize(layer())
    kinds = []
    for use in (moesaic.freeze, lambda each: moesaic.quantize(each, "int8")):
        try:
            use(made)
        except MoesaicError as error:
            kinds.append(type(error).__name__)
    return kinds


def test_full_state_dict_is_the_whole_model() -> None:
    for ranks, experts in ((3, 4), (4, 2)):
        wanted = build("gpt_oss", experts).state_dict()
        first, *others = harness.pool(ranks).run(gathered, experts)
        assert others == [{}] * (ranks - 1)
        assert first.keys() == wanted.keys()
        assert all(torch.equal(first[name], tensor) and first[name].is_contiguous() for name, tensor in wanted.items())


def gathered(num_experts: int) -> dict[str, Tensor]:
    return full_state_dict(moesaic.parallelize(build("gpt_oss", num_experts)))
