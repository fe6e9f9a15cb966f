"""Parameters of experts modules as DTensors: whose part is where, the gradients that reach them, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel import harness
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grad_norm_
from torch.testing._internal.distributed.fake_pg import FakeStore

from moesaic.errors import ConfigError, UnsupportedError
from moesaic.experts import ACTIVATIONS, Activation, ExpertBank, ExpertWeights
from moesaic.experts.quantized import QuantFormat
from moesaic.parallel.agreement import check_alike, fingerprints
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.sharding import (
    Sharding,
    check_shardable,
    clip_gradients,
    expert_form,
    expert_mesh,
    gradient_norm,
    local_tensors,
    shard_experts,
)

D, F = 5, 6
NAMES = {name: name for name in ("up", "down", "up_bias", "down_bias")}


def bank(num_experts: int, d_ff: int = F) -> ExpertBank:
    """Experts with every tensor there is; no two values alike."""
    made = ExpertBank(D, d_ff, num_experts, bias=True)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def shard(module: ExpertBank, ranks: DeviceMesh) -> ExpertLayout:
    layout = ExpertLayout(module.num_experts, module.d_ff, ranks.size())
    shard_experts(module, Sharding(expert_form(module.weights()), layout, NAMES, expert_mesh(ranks, layout)))
    return layout


def weights(*, gated: bool = True, transposed: bool = False, activation: Activation | None = None) -> ExpertWeights:
    width = 2 * F if gated else F
    up, down = torch.randn(3, width, D), torch.randn(3, D, F)
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    named = ACTIVATIONS.get("swiglu" if gated else "relu")
    return ExpertWeights(up, down, activation or named, torch.randn(3, width), torch.randn(3, D), transposed=transposed)


class TestForm:
    @pytest.mark.parametrize(
        ("options", "interleaved", "shapes", "axes"),
        [
            ({}, False, {"up": (2, F, D), "up_bias": (2, F), "down": (D, F)}, {"up": 1, "up_bias": 1, "down": 1}),
            ({}, True, {"up": (F, 2, D), "up_bias": (F, 2), "down": (D, F)}, {"up": 0, "up_bias": 0, "down": 1}),
            (
                {"transposed": True},
                False,
                {"up": (D, 2, F), "up_bias": (2, F), "down": (F, D)},
                {"up": 2, "up_bias": 1, "down": 0},
            ),
            (
                {"transposed": True},
                True,
                {"up": (D, F, 2), "up_bias": (F, 2), "down": (F, D)},
                {"up": 1, "up_bias": 0, "down": 0},
            ),
            ({"gated": False}, False, {"up": (F, D), "up_bias": (F,), "down": (D, F)}, {"up": 0, "up_bias": 0}),
            ({"gated": False, "transposed": True}, False, {"up": (D, F), "down": (F, D)}, {"up": 1, "down": 0}),
        ],
    )
    def test_shapes_and_axes(
        self, options: dict[str, Any], interleaved: bool, shapes: dict[str, Any], axes: dict[str, int]
    ) -> None:
        form = expert_form(weights(**options), interleaved=interleaved)
        fields = {field.name: field for field in form.fields}
        assert {name: fields[name].shape for name in shapes} == shapes
        assert {name: fields[name].axis for name in axes} == axes
        assert (fields["down_bias"].shape, fields["down_bias"].axis, form.d_model) == ((D,), 0, D)

    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_a_backend_gets_the_same_memory_back(self, transposed: bool, interleaved: bool) -> None:
        given = weights(transposed=transposed)
        form = expert_form(given, interleaved=interleaved)
        tensors = given.tensors()
        back = form.weights({field.name: field.canonical(tensors[field.name]) for field in form.fields})
        assert all(
            tensor.shape == tensors[name].shape and tensor.data_ptr() == tensors[name].data_ptr()
            for name, tensor in back.tensors().items()
        )
        assert (back.d_model, back.d_ff, back.transposed) == (D, F, transposed)


@contextmanager
def pretended(rank: int, size: int) -> Iterator[DeviceMesh]:
    """One rank of a group whose others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        dist.destroy_process_group()


class TestOwnership:
    @pytest.mark.parametrize("size", range(1, 9))
    @pytest.mark.parametrize("num_experts", [2, 8, 12, 16])
    def test_every_element_has_one_owner(self, num_experts: int, size: int) -> None:
        whole = bank(num_experts)
        form = expert_form(whole.weights())
        covered = {field.name: torch.zeros(num_experts * field.elements()) for field in form.fields}
        for rank in range(size):
            module = bank(num_experts)
            module.load_state_dict(whole.state_dict())
            with pretended(rank, size) as ranks:
                layout = shard(module, ranks)
                own = local_tensors(module)
                experts, hidden = layout.experts_of(rank), layout.hidden_of(rank)
                assert own["down"].shape == (len(experts), D, len(hidden))
                assert own["up"].shape == (len(experts), 2, len(hidden), D)
                parameter = module.get_parameter("up")
                assert parameter.shape == ((num_experts, 2, F, D) if layout.slices > 1 else (num_experts, 2 * F, D))
                mesh = module.__dict__["sharding"].mesh
                for field in form.fields:
                    parameter = module.get_parameter(field.name)
                    given = whole.get_parameter(field.name).detach()
                    assert torch.equal(own[field.name].flatten(), torch_part(given, parameter, mesh).flatten())
                    counts = covered[field.name]
                    counts[torch_part(torch.arange(given.numel()), parameter, mesh).flatten()] += 1
        assert all(bool((count == 1).all()) for count in covered.values())

    def test_nothing_of_the_whole_stays(self) -> None:
        module = bank(8)
        with pretended(1, 4) as ranks:
            shard(module, ranks)
            for parameter in module.parameters():
                assert isinstance(parameter, DTensor)
                local = parameter.to_local()
                assert local.untyped_storage().nbytes() == local.numel() * local.itemsize == parameter.numel()

    def test_frozen_experts_stay_frozen(self) -> None:
        module = bank(4)
        module.up.requires_grad_(False)
        with pretended(0, 2) as ranks:
            shard(module, ranks)
            assert [parameter.requires_grad for parameter in module.parameters()] == [False, True, True, True]

    def test_a_sharded_bank_has_no_weights_for_a_backend(self) -> None:
        module = bank(4)
        module.parallel = object()
        with pytest.raises(UnsupportedError, match="sharded over ranks"):
            module.weights()
        with pytest.raises(ConfigError, match="sharded over ranks"):
            module.quantize(QuantFormat.named("int8"))


def torch_part(whole: Tensor, parameter: Tensor, mesh: DeviceMesh) -> Tensor:
    """The part of ``whole`` that a DTensor's placements give its rank: by that, not by our layout, checkpoints go.

    By hand: PyTorch takes equal meshes for the same one, and with it the place of the rank that was pretended first.
    """
    assert isinstance(parameter, DTensor)
    part, coordinate = whole.view(parameter.shape), mesh.get_coordinate()
    assert coordinate is not None and mesh == parameter.device_mesh
    for size, place, placement in zip(mesh.shape, coordinate, parameter.placements, strict=True):
        assert type(placement) is Shard  # others cannot be cut anew
        chunks = part.chunk(size, placement.dim)
        part = chunks[place] if place < len(chunks) else part.narrow(placement.dim, 0, 0)
    return part


def trained(num_experts: int, d_ff: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[bool], Tensor, Tensor]:
    """What every rank gets by a loss of its own: whole gradients, wanted ones, and the norms."""
    torch.manual_seed(3)
    module, plain = bank(num_experts, d_ff), nn.Linear(4, 4)
    alone = {name: parameter.detach().clone().requires_grad_() for name, parameter in module.named_parameters()}
    shard(module, init_device_mesh("cpu", (dist.get_world_size(),)))
    # Of a square, in which each element counts by its own value.
    for tensor in local_tensors(module).values():
        tensor.square().sum().backward()
    plain(torch.ones(1, 4)).sum().backward()
    for tensor in alone.values():
        tensor.square().sum().backward()
    parameters = [*module.parameters(), *plain.parameters()]
    alike = [
        parameter.grad.placements == parameter.placements and parameter.grad.shape == parameter.shape
        for parameter in module.parameters()
    ]
    norm = gradient_norm(parameters)
    clip_gradients(parameters, 1.5, norm)
    clipped = {name: parameter.grad.full_tensor() for name, parameter in module.named_parameters()}
    wanted = {name: tensor.grad for name, tensor in alone.items()}
    plain_gradients = [parameter.grad.clone() / (1.5 / norm) for parameter in plain.parameters()]
    for parameter, gradient in zip(plain.parameters(), plain_gradients, strict=True):
        parameter.grad = gradient
    expected = clip_grad_norm_([*alone.values(), *plain.parameters()], 1.5)
    return clipped, wanted, alike, norm, expected


@pytest.mark.parametrize(("num_experts", "d_ff"), [(8, 6), (5, 6), (2, 6), (2, 2), (1, 4)])
def test_gradients_have_the_parameters_placements(num_experts: int, d_ff: int) -> None:
    for clipped, wanted, alike, norm, expected in harness.pool(3).run(trained, num_experts, d_ff):
        assert all(alike)
        torch.testing.assert_close(norm, expected)
        for name, gradient in clipped.items():
            torch.testing.assert_close(gradient.reshape(wanted[name].shape), wanted[name])


class TestRefusals:
    def check(self, given: ExpertWeights, ranks: int, **attributes: object) -> None:
        module = nn.Module()
        module.__dict__.update(attributes)
        check_shardable(module, "layer.experts", expert_form(given), ExpertLayout(3, F, ranks))

    def test_codes(self) -> None:
        module = bank(3)
        module.quantize(QuantFormat.named("int8"))
        with pytest.raises(UnsupportedError, match=r"layer\.experts: experts stored as int8 codes"):
            self.check(module.weights(), 2)

    def test_pools_and_low_rank_parts(self) -> None:
        with pytest.raises(ConfigError, match=r"layer\.experts: .*AdapterPool"):
            self.check(weights(), 2, slots=object())
        with pytest.raises(UnsupportedError, match=r"layer\.experts: .*low-rank"):
            self.check(weights(), 2, low_rank=object())

    def test_slices_before_a_norm(self) -> None:
        normed = replace(weights(), post_norm=nn.Identity())
        self.check(normed, 3)
        with pytest.raises(UnsupportedError, match=r"layer\.experts: .*norm.*use at most 3 ranks"):
            self.check(normed, 4)

    def test_slices_of_a_gate_over_all_features(self) -> None:
        def by_feature(h_NG: Tensor) -> Tensor:
            gate_NF, up_NF = h_NG.chunk(2, dim=-1)
            return (up_NF.clamp(-1, 1) + 1) * gate_NF.tanh()

        def over_all(h_NG: Tensor) -> Tensor:
            return by_feature(h_NG).softmax(dim=-1)

        def of_one_width(h_NG: Tensor) -> Tensor:
            return by_feature(h_NG) * torch.ones(F)

        self.check(weights(activation=Activation("custom", True, by_feature)), 4)
        for gate in (over_all, of_one_width):
            self.check(weights(activation=Activation("custom", True, gate)), 3)
            with pytest.raises(UnsupportedError, match=r"own gate .*use at most 3 ranks"):
                self.check(weights(activation=Activation("custom", True, gate)), 4)


class TestAgreement:
    def test_every_bit_and_every_place_counts(self) -> None:
        layer = nn.Linear(3, 4)
        before = fingerprints(layer)
        assert fingerprints(layer) == before
        with torch.no_grad():
            layer.weight.copy_(layer.weight[[1, 0, 2, 3]])
        moved = fingerprints(layer)
        assert moved["weight"] != before["weight"] and moved["bias"] == before["bias"]
        with torch.no_grad():
            layer.bias[0] = torch.nextafter(layer.bias[0], torch.tensor(9.0))
        assert fingerprints(layer)["bias"] != before["bias"]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_of_any_dtype(self, dtype: torch.dtype) -> None:
        assert len(fingerprints(nn.Linear(3, 4, dtype=dtype))) == 2

    def test_buffers_count_and_empty_tensors_do_no_harm(self) -> None:
        norm = nn.BatchNorm1d(2)
        norm.register_buffer("nothing", torch.empty(0))
        assert set(fingerprints(norm)) >= {"running_mean", "num_batches_tracked", "nothing"}

    def test_weights_that_are_not_there(self) -> None:
        with pytest.raises(ConfigError, match="weight is on the meta device"):
            fingerprints(nn.Linear(2, 2, device="meta"))

    def test_says_who_differs_in_what(self) -> None:
        told = harness.pool(3).run(compared, 1)
        assert told == ["rank 1 differs from rank 0 in b (other instead of same): " + ADVICE] * 3
        assert harness.pool(3).run(compared, 3) == [None] * 3


ADVICE = "all ranks must begin with the same weights and settings"


def compared(odd: int) -> str | None:
    rank = dist.get_rank()
    try:
        check_alike({"a": "1", "b": "other" if rank == odd else "same"}, dist.group.WORLD)
    except ConfigError as error:
        return str(error)
    return None
