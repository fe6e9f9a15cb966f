"""The experts implementation: every combination of the interface's flags, and what is refused by name."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.reference import relative_error
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.activations import ACT2FN
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import moesaic
from moesaic.errors import UnsupportedError
from moesaic.hf import is_experts_module
from moesaic.hf.experts import weights_of

E, D, F = 5, 8, 6
# All that the installed transformers knows: the norm is not in 5.17.
FLAGS = [name for name in inspect.signature(use_experts_implementation).parameters if name.startswith(("has_", "is_"))]
# xIELU has parameters of its own, in bfloat16 whatever the model's precision; no experts class can hold it.
ACTIVATIONS = sorted(set(ACT2FN) - {"xielu"})


def experts_class(**flags: bool) -> type[nn.Module]:
    """A class of the interface with the given flags; where gate and up are interleaved, it parts them itself."""

    class SyntheticExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = E, ACT2FN[config.hidden_act]
            up, width = ("gate_up_proj", 2 * F) if flags.get("has_gate", True) else ("up_proj", F)
            swap = flags.get("is_transposed", False)
            setattr(self, up, nn.Parameter(torch.randn(E, D, width) if swap else torch.randn(E, width, D)))
            self.down_proj = nn.Parameter(torch.randn(E, F, D) if swap else torch.randn(E, D, F))
            if flags.get("has_bias", False):
                setattr(self, f"{up}_bias", nn.Parameter(torch.randn(E, width)))
                self.down_proj_bias = nn.Parameter(torch.randn(E, D))
            if flags.get("has_post_expert_norm", False):
                self.post_expert_norm = nn.LayerNorm(D)
                nn.init.normal_(self.post_expert_norm.weight)

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            raise AssertionError("no test runs eager")

    if not flags.get("is_concatenated", True):

        def _apply_gate(self: nn.Module, gate_up: Tensor) -> Tensor:
            return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]

        SyntheticExperts._apply_gate = _apply_gate
    decorated: type[nn.Module] = use_experts_implementation(**flags)(SyntheticExperts)
    return decorated


def config_of(implementation: str = "moesaic", hidden_act: str = "silu") -> SimpleNamespace:
    return SimpleNamespace(_experts_implementation=implementation, hidden_act=hidden_act)


def run(module: nn.Module, implementation: str, ids: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    module.config._experts_implementation = implementation
    module.zero_grad()
    x, weights = torch.randn(len(ids), D, requires_grad=True), torch.rand(ids.shape, requires_grad=True)
    y = module(x, ids, weights)
    (y * torch.randn_like(y)).sum().backward()
    return [y, x.grad, weights.grad, *[p.grad for p in module.parameters()]]


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("flags", list(itertools.product([True, False], repeat=len(FLAGS))), ids=str)
def test_every_combination_of_flags(flags: tuple[bool, ...], backend: str) -> None:
    """Against transformers' own ``batched_mm``, which multiplies each slot by a copy of its expert's weights."""
    torch.manual_seed(0)
    module = experts_class(**dict(zip(FLAGS, flags, strict=True)))(config_of())
    ids = torch.randint(0, E, (7, 3))
    with moesaic.use_backend(backend):
        for got, wanted in zip(run(module, "moesaic", ids), run(module, "batched_mm", ids), strict=True):
            assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_transformers(activation: str, gated: bool) -> None:
    torch.manual_seed(0)
    module = experts_class(has_gate=gated)(config_of(hidden_act=activation)).eval()
    ids = torch.randint(0, E, (7, 3))
    for got, wanted in zip(run(module, "moesaic", ids), run(module, "batched_mm", ids), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "gated", "name"),
    [
        ("silu", True, "swiglu"),
        ("gelu", True, "geglu"),
        ("gelu_pytorch_tanh", True, "geglu_tanh"),
        ("relu", False, "relu"),
        ("gelu", False, "gelu"),
        ("gelu_pytorch_tanh", False, "gelu_tanh"),
        ("relu2", False, "custom"),
        ("relu2", True, "custom"),
        ("silu", False, "custom"),
    ],
)
def test_known_activations_are_named_so_that_a_kernel_may_fuse_them(activation: str, gated: bool, name: str) -> None:
    weights = weights_of(experts_class(has_gate=gated)(config_of(hidden_act=activation)))
    assert (weights.activation.name, weights.activation.gated) == (name, gated)


def test_a_gate_of_its_own_is_never_taken_for_a_known_one() -> None:
    cls = experts_class()
    cls._apply_gate = lambda self, gate_up: gate_up.chunk(2, dim=-1)[1]
    assert weights_of(cls(config_of())).activation.name == "custom"
    module = experts_class()(config_of())
    module._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[1]
    assert weights_of(module).activation.name == "custom"


def test_nothing_is_copied() -> None:
    module = experts_class(has_bias=True)(config_of())
    weights = weights_of(module)
    assert weights.up is module.gate_up_proj
    assert weights.down_bias is module.down_proj_bias


def test_no_token_and_no_expert() -> None:
    module = experts_class(has_bias=True)(config_of())
    assert list(module(torch.empty(0, D), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)).shape) == [0, D]
    y = module(torch.randn(3, D), torch.full((3, 2), E), torch.full((3, 2), float("nan")))
    assert (y == 0).all()


def test_expert_parallel_ranks_add_up() -> None:
    """What transformers' expert parallelism does: each rank has some experts, and slots of others are sentinels."""
    torch.manual_seed(0)
    whole, ids = experts_class(has_bias=True)(config_of()), torch.randint(0, E, (9, 3))
    wanted = run(whole, "moesaic", ids)
    total = [torch.zeros_like(tensor) for tensor in wanted[:3]]
    for first, last in ((0, 2), (2, E)):
        rank = experts_class(has_bias=True)(config_of())
        rank.num_experts, rank._is_expert_parallel = last - first, True
        for name, parameter in whole.named_parameters():
            setattr(rank, name, nn.Parameter(parameter.detach()[first:last]))
        off_rank = (ids < first) | (ids >= last)
        got = run(rank, "moesaic", (ids - first).masked_fill(off_rank, rank.num_experts))
        total = [a + b for a, b in zip(total, got[:3], strict=True)]
        for mine, all_of_them in zip(got[3:], wanted[3:], strict=True):
            torch.testing.assert_close(mine, all_of_them[first:last])
    for got, expected in zip(total, wanted[:3], strict=True):
        torch.testing.assert_close(got, expected)


def test_it_is_registered_in_both_interfaces() -> None:
    assert "moesaic" in ALL_EXPERTS_FUNCTIONS
    assert "moesaic" in ALL_FP8_EXPERTS_FUNCTIONS
    assert is_experts_module(experts_class()(config_of()))
    assert not is_experts_module(nn.Linear(2, 2))


class TestRefusals:
    def message(self, module: nn.Module) -> str:
        """What the module's forward says; it always names the module's class."""
        with pytest.raises(UnsupportedError) as caught:
            module(torch.randn(3, D), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
        start = f"experts_implementation='moesaic' cannot run {type(module).__name__}: "
        assert str(caught.value).startswith(start)
        return str(caught.value).removeprefix(start)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8], ids=str)
    @pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
    def test_storage(self, name: str, dtype: torch.dtype) -> None:
        module = experts_class()(config_of())
        stored = getattr(module, name).detach().to(dtype)
        setattr(module, name, nn.Parameter(stored, requires_grad=False))
        assert self.message(module) == f"{name} is stored as {dtype}; float32, bfloat16 and float16 are supported"

    def test_a_tensor_that_is_more_than_a_tensor(self) -> None:
        module = experts_class()(config_of())
        module.down_proj = nn.Parameter(TwoTensor(torch.randn(E, D, F), torch.randn(E, D, F)))
        assert self.message(module) == "down_proj is a TwoTensor (quantized or distributed storage)"

    def test_no_tensor(self) -> None:
        module = experts_class()(config_of())
        del module.gate_up_proj
        module.gate_up_proj = nn.ModuleList([nn.Linear(D, 2 * F) for _ in range(E)])
        assert self.message(module) == "it has no tensor 'gate_up_proj' (quantized or custom storage)"

    def test_biases_that_are_not_there(self) -> None:
        module = experts_class()(config_of())
        module.has_bias = True
        assert self.message(module) == "it has no tensor 'gate_up_proj_bias' (quantized or custom storage)"

    @pytest.mark.parametrize("flag", ["has_gate", "has_bias", "is_transposed", "is_concatenated"])
    def test_flags_that_are_not_there(self, flag: str) -> None:
        module = experts_class()(config_of())
        delattr(module, flag)
        assert self.message(module) == f"it has no '{flag}', so it does not follow the experts interface that we know"
        assert not is_experts_module(module)

    def test_interleaved_without_a_gate_of_its_own(self) -> None:
        module = experts_class()(config_of())
        module.is_concatenated = False
        assert self.message(module) == "gate and up are interleaved, but it has no _apply_gate of its own to part them"

    def test_a_norm_that_is_not_there(self) -> None:
        module = experts_class()(config_of())
        module.has_post_expert_norm = True
        assert self.message(module) == "it has no callable 'post_expert_norm'"

    def test_an_activation_that_is_not_there(self) -> None:
        module = experts_class(has_gate=False)(config_of())
        del module.act_fn
        assert self.message(module) == "it has no callable 'act_fn'"

    def test_transformers_own_float8_experts(self) -> None:
        cls = use_experts_implementation(experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)(FP8Experts)
        config = SimpleNamespace(
            _experts_implementation="moesaic",
            hidden_act="silu",
            num_experts=E,
            num_local_experts=E,
            hidden_size=D,
            moe_intermediate_size=F,
            intermediate_size=F,
        )
        module = cls(config=config, block_size=(4, 4), activation_scheme="dynamic")
        assert "stored as torch.float8_e4m3fn" in self.message(module)
