"""Weights in 8 and 4 bits: against the words of ``native/moesaic.h``, spelled out here one value at a time."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import relative_error
from torch import Tensor

import moesaic
from moesaic import Dispatch, Routing
from moesaic.errors import ConfigError, UnsupportedError
from moesaic.experts import BACKENDS, ExpertBank, ExpertWeights, QuantFormat, available, use_backend
from moesaic.experts.quantized import pack_int4, unpack_int4
from moesaic.experts.scales import int4_scales

INT8, INT4_32, INT4 = QuantFormat.named("int8"), QuantFormat.named("int4", 32), QuantFormat.named("int4")
FORMATS = pytest.mark.parametrize("format", [INT8, INT4_32, INT4], ids=["int8", "int4-32", "int4-64"])


def value(format: QuantFormat, codes: Tensor, scale: Tensor, output: int, i: int) -> float:
    """What moesaic.h says that one weight of one expert is."""
    if format.name == "int8":
        return float(codes[output, i]) * float(scale[output])
    block, within = divmod(i, 128)
    p, word = divmod(within, 32)
    low, high = (int(codes[output, 64 * block + 2 * word + byte]) for byte in (0, 1))
    nibble = (low | high << 8) >> 4 * p & 15
    return (nibble - 8) * float(scale[output, i // format.group])


@FORMATS
@pytest.mark.parametrize("inputs", [1, 32, 100, 128, 129, 300])
def test_codes_mean_what_the_kernels_read(format: QuantFormat, inputs: int) -> None:
    torch.manual_seed(inputs)
    made = format.quantize(torch.randn(2, 3, inputs))
    assert made.codes.shape == format.codes_shape(2, 3, inputs)
    assert made.scale.shape == format.scale_shape(2, 3, inputs)
    assert (made.codes.dtype, made.scale.dtype) == (format.codes_dtype, format.scale_dtype)
    wanted = [
        [[value(format, made.codes[e], made.scale[e], o, i) for i in range(inputs)] for o in range(3)] for e in range(2)
    ]
    torch.testing.assert_close(made.dequantize(torch.float64), torch.tensor(wanted, dtype=torch.float64))
    assert torch.equal(made[1:].dequantize(), made.dequantize()[1:])


def test_the_order_of_nibbles_by_hand() -> None:
    codes = torch.zeros(1, 256, dtype=torch.int8)
    codes[0, [0, 32, 64, 96]] = torch.tensor([-8, -7, 6, 7], dtype=torch.int8)  # the four of word 0
    codes[0, 128 + 64 + 31] = 1  # the third of word 31 of the second block
    packed = pack_int4(codes)
    assert packed.shape == (1, 128)
    assert [hex(byte) for byte in packed[0, :2].tolist()] == ["0x10", "0xfe"]
    assert [hex(byte) for byte in packed[0, -2:].tolist()] == ["0x88", "0x89"]
    assert packed[0, 2:-2].eq(0x88).all()


def test_the_shapes_that_the_kernels_expect() -> None:
    assert INT8.codes_shape(2, 5, 100) == (2, 5, 100)
    assert INT4.codes_shape(2, 5, 100) == (2, 5, 64)
    assert INT4.scale_shape(2, 5, 100) == (2, 5, 2)
    assert INT4_32.scale_shape(2, 5, 129) == (2, 5, 8)


@given(st.integers(1, 3), st.integers(0, 2**31))
def test_packing_is_undone(blocks: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (2, 128 * blocks), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


@pytest.mark.parametrize("format", [INT4_32, INT4])
def test_inputs_that_there_are_not_are_zero(format: QuantFormat) -> None:
    made = format.quantize(torch.randn(1, 4, 70) + 3)
    assert unpack_int4(made.codes)[..., 70:].eq(0).all()
    assert torch.isfinite(made.scale).all()


@FORMATS
def test_errors_are_within_half_a_step(format: QuantFormat) -> None:
    torch.manual_seed(0)
    w = torch.randn(2, 16, 256) * torch.logspace(-3, 3, 16).view(1, 16, 1)
    made = format.quantize(w)
    off = (made.dequantize() - w).abs()
    if format is INT8:
        assert (off <= made.scale.unsqueeze(-1) / 2 * (1 + 1e-5)).all()
        assert made.codes.abs().amax(-1).eq(127).all()
        return
    # Only what is clipped, the codes at either end, may be further off.
    codes = unpack_int4(made.codes)
    step = made.scale.float().abs().repeat_interleave(format.group, -1)
    clipped = (codes == -8) | (codes == 7)
    assert (off <= step / 2 * (1 + 1e-5))[~clipped].all()
    assert set(codes.unique().tolist()) == set(range(-8, 8))


def plain_error(w_OGg: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared errors [O, G] of the searched scales and of max |w| / 7, both as they are stored."""
    errors = []
    for scale in (int4_scales(w_OGg, importance), (w_OGg.abs().amax(-1) / 7).bfloat16()):
        step = scale.double().unsqueeze(-1)
        codes = torch.where(step == 0, 0.0, w_OGg.double() / step).round().clamp(-8, 7)
        squared = (codes * step - w_OGg.double()).square()
        errors.append((squared if importance is None else squared * importance.double()).sum(-1))
    return errors[0], errors[1]


@given(st.sampled_from([32, 64]), st.sampled_from(["normal", "heavy", "one-sided", "sparse"]), st.integers(0, 2**31))
def test_no_searched_scale_is_worse_than_the_plain_one(group: int, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(8, 4, group, generator=generator)
    w = {"normal": w, "heavy": w**3, "one-sided": w.abs(), "sparse": w * (w > 1.5)}[kind]
    importance = torch.rand(4, group, generator=generator) ** 4
    for weight in (None, importance):
        searched, plain = plain_error(w, weight)
        assert (searched <= plain * (1 + 1e-4) + 1e-30).all()


def test_the_search_gains_a_fifth_on_normal_weights() -> None:
    torch.manual_seed(0)
    searched, plain = plain_error(torch.randn(256, 4, 64), None)
    assert searched.sum() < 0.8 * plain.sum()


def test_importance_moves_the_error_to_where_it_does_not_count() -> None:
    torch.manual_seed(0)
    w, importance = torch.randn(1, 64, 128), torch.ones(1, 128)
    importance[:, ::2] = 100.0
    off, weighted = ((INT4.quantize(w, each).dequantize() - w).square() for each in (None, importance))
    assert weighted[..., ::2].mean() < 0.97 * off[..., ::2].mean()
    with pytest.raises(ConfigError, match=r"importance has shape \[128\]: it must be \[1, 128\]"):
        INT4.quantize(w, torch.ones(128))


@FORMATS
@pytest.mark.parametrize("fill", [0.0, 1e-42, 1e-38, 3e38, -2.0])
def test_extreme_weights(format: QuantFormat, fill: float) -> None:
    made = format.quantize(torch.full((1, 2, 128), fill))
    assert torch.isfinite(made.scale).all()
    got = made.dequantize()
    if abs(fill) < 1e-37:
        assert (got - fill).abs().max() <= 1e-38
    else:
        torch.testing.assert_close(got, torch.full((1, 2, 128), fill), rtol=5e-3, atol=0)


@FORMATS
def test_an_infinite_weight_does_not_go_unseen(format: QuantFormat) -> None:
    for wrong in (torch.inf, torch.nan):
        w = torch.randn(3, 4, 128)
        w[1, 2, 3] = wrong
        with pytest.raises(ConfigError, match="expert 1 has weights that are not finite"):
            format.quantize(w)


@pytest.mark.parametrize(
    ("name", "group", "message"),
    [
        ("int3", None, r"unknown weight format 'int3': did you mean 'int8'\? allowed: int4, int8"),
        ("int4", 128, "group is 128: it must be one of 32, 64"),
        ("int8", 32, "group is 32: int8 has one scale per output"),
    ],
)
def test_formats_that_there_are_not(name: str, group: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moesaic.quantize(ExpertBank(8, 8, 2), name, group=group)


def a_call(d_model: int, d_ff: int, activation: str = "swiglu", bias: bool = False) -> tuple[ExpertBank, Dispatch]:
    torch.manual_seed(0)
    bank = ExpertBank(d_model, d_ff, 4, activation, bias)
    if bias:
        torch.nn.init.normal_(bank.up_bias)
        torch.nn.init.normal_(bank.down_bias)
    ids = torch.randint(0, 5, (7, 2))  # 4 is the null expert
    routing = Routing(ids, torch.rand(7, 2), torch.zeros(7, 4)).without(ids == 4)
    return bank, Dispatch.from_routing(routing)


def outputs(bank: ExpertBank, dispatch: Dispatch, backend: str) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(7, bank.d_model, requires_grad=True, dtype=bank.weights().tensors().get("up", torch.ones(())).dtype)
    with use_backend(backend):
        y = bank(x, dispatch)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


@FORMATS
@pytest.mark.parametrize(
    ("d_model", "d_ff", "activation", "bias"),
    [(128, 128, "swiglu", False), (100, 40, "geglu", True), (24, 200, "relu", True)],
)
def test_backends_compute_what_the_codes_stand_for(
    format: QuantFormat, d_model: int, d_ff: int, activation: str, bias: bool
) -> None:
    """Outputs and the inputs' gradients, against a bank of floats with the dequantized values."""
    bank, dispatch = a_call(d_model, d_ff, activation, bias)
    plain = copy.deepcopy(bank)
    bank.quantize(format)
    with torch.no_grad():
        for parameter, matrix in zip((plain.up, plain.down), bank.quantized(), strict=True):
            parameter.copy_(matrix.dequantize())
    wanted = outputs(plain, dispatch, "loop")
    assert BACKENDS.get("loop").refusal(torch.zeros(1), bank.weights()) is None
    for backend in {"loop", "grouped", "native"} & set(available()):
        # bf16's: the native kernels may keep an integer's and a scale's product in bf16.
        tolerance = 2e-2 if backend == "native" else 1e-6
        for got, right in zip(outputs(bank, dispatch, backend), wanted, strict=True):
            assert relative_error(got, right) < tolerance, backend


@pytest.mark.skipif("native" not in available(), reason="there are no native kernels here")
@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_native_kernels_read_the_same_codes(format: QuantFormat, dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(tokens)
    bank = ExpertBank(320, 160, 4, bias=True)
    bank.quantize(format)
    x, ids = torch.randn(tokens, 320).to(dtype), torch.randint(0, 4, (tokens, 2))
    dispatch = Dispatch.from_routing(Routing(ids, torch.rand(tokens, 2), torch.zeros(tokens, 4)))
    with torch.no_grad():
        wanted = BACKENDS.get("loop").run(x.double(), dispatch, bank.weights().to(torch.float64))
        got = BACKENDS.get("native").run(x, dispatch, bank.to(dtype).weights())
    assert relative_error(got, wanted) < 2e-2


def test_the_bank_of_codes() -> None:
    bank, _ = a_call(24, 40, bias=True)
    bank.quantize(INT4)
    assert [name for name, _ in bank.named_parameters()] == ["up_bias", "down_bias"]
    assert {name: list(buffer.shape) for name, buffer in bank.named_buffers()} == {
        "up_codes": [4, 80, 64],
        "up_scale": [4, 80, 2],
        "down_codes": [4, 24, 64],
        "down_scale": [4, 24, 2],
    }
    assert "weights=int4" in repr(bank)
    weights = bank.weights()
    assert (weights.num_experts, weights.d_model, weights.d_ff) == (4, 24, 40)
    assert weights.up.data_ptr() == bank.up_codes.data_ptr()
    with pytest.raises(UnsupportedError, match="the weights are int4 codes"):
        weights.up_EDG()
    plain = weights.dequantize(torch.float32)
    assert plain.format is None and plain.up_scale is None
    assert torch.equal(plain.up_EDG()[1], weights.up_GD(1, torch.float32).t())
    assert torch.equal(plain.down_EFD()[1], weights.down_DF(1, torch.float32).t())


@FORMATS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_and_scales_survive_every_move(format: QuantFormat, dtype: torch.dtype) -> None:
    bank, dispatch = a_call(24, 40, bias=True)
    bank.quantize(format)
    before = {name: buffer.clone() for name, buffer in bank.named_buffers()}
    moved = copy.deepcopy(bank).to(dtype).float().to(dtype)
    assert moved.up_bias.dtype == dtype
    for name, buffer in moved.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    x = torch.randn(7, 24, dtype=dtype)
    assert moved(x, dispatch).dtype == dtype
    assert relative_error(moved(x, dispatch), bank(x.float(), dispatch)) < 3e-2
    assert {buffer.device.type for buffer in copy.deepcopy(bank).to("meta").buffers()} == {"meta"}


def test_autocast_leaves_codes_alone() -> None:
    bank, dispatch = a_call(24, 40, bias=True)
    bank.quantize(INT8)
    x = torch.randn(7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        got = bank(x, dispatch)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, copy.deepcopy(bank).bfloat16()(x.bfloat16(), dispatch))


def test_codes_are_copied_pickled_and_saved() -> None:
    bank, dispatch = a_call(24, 40)
    bank.quantize(INT4_32)
    x = torch.randn(7, 24)
    stream = io.BytesIO()
    torch.save(bank, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(bank), torch.load(stream, weights_only=False)):
        assert torch.equal(copied(x, dispatch), bank(x, dispatch))
    other = moesaic.quantize(ExpertBank(24, 40, 4), "int4", group=32)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other(x, dispatch), bank(x, dispatch))
    other.reset_parameters()
    assert torch.equal(other(x, dispatch), bank(x, dispatch))


@FORMATS
def test_floats_again(format: QuantFormat) -> None:
    bank, dispatch = a_call(24, 40, bias=True)
    plain, x = copy.deepcopy(bank), torch.randn(7, 24)
    bank.quantize(format)
    wanted = bank(x, dispatch)
    bank.dequantize(torch.float32)
    assert bank.format is None
    assert [*bank.state_dict()] and bank.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(bank(x, dispatch), wanted)
    bank.quantize(format)


def test_refusals() -> None:
    bank, dispatch = a_call(24, 40)
    moesaic.quantize(bank, "int8")
    with pytest.raises(ConfigError, match="the experts are quantized already, as int8"):
        moesaic.quantize(bank, "int4")
    with pytest.raises(ConfigError, match=r"the experts take features of shape \[tokens, 24\], got \[7, 25\]"):
        bank(torch.randn(7, 25), dispatch)
    bank.up_scale.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="quantized expert weights cannot be trained, but up_scale requires"):
        bank(torch.randn(7, 24), dispatch)
    with pytest.raises(ConfigError, match="Linear has no experts to quantize"):
        moesaic.quantize(torch.nn.Linear(2, 2), "int8")


def test_a_bank_that_cannot_be_quantized_stays_as_it_is() -> None:
    layers = torch.nn.ModuleList([ExpertBank(24, 40, 4), ExpertBank(24, 40, 4)])
    with torch.no_grad():
        layers[1].down[3, 2, 1] = torch.nan
    with pytest.raises(ConfigError, match="down has weights that are not finite"):
        moesaic.quantize(layers, "int8")
    assert [bank.format for bank in layers] == [None, None]
    assert len(list(layers.parameters())) == 4


def test_the_layer() -> None:
    torch.manual_seed(0)
    layer = moesaic.MoE(moesaic.MoEConfig(d_model=64, d_ff=96, num_experts=4, top_k=2, num_shared_experts=1))
    x = torch.randn(3, 5, 64)
    wanted = layer(x)
    assert moesaic.quantize(layer, "int8") is layer
    assert relative_error(layer(x), wanted) < 0.02
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"router.weight", "shared.up.weight", "shared.down.weight"}
    layer(x).sum().backward()
    assert layer.router.weight.grad is not None


@pytest.mark.parametrize("backend", ["grouped"])
def test_compiled(backend: str) -> None:
    bank, dispatch = a_call(24, 40)
    bank.quantize(INT4)
    weights: ExpertWeights = bank.weights()

    def run(x: Tensor) -> Tensor:
        return BACKENDS.get(backend).run(x, dispatch, weights)

    x = torch.randn(7, 24, requires_grad=True)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, run(x))
    (gradient,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(run(x).sum(), x)[0])


def test_the_operator_passes_pytorchs_own_check() -> None:
    made = INT4.quantize(torch.randn(3, 8, 20))
    offsets = torch.tensor([2, 2, 4], dtype=torch.int32)
    for transposed in (False, True):
        x = torch.randn(5, 8 if transposed else 20)
        arguments = (x, made.codes, made.scale, 4, 64, 20, offsets, transposed)
        torch.library.opcheck(torch.ops.moesaic.quantized_matmul.default, arguments)
        assert not torch.ops.moesaic.quantized_matmul(*arguments)[4:].any()
