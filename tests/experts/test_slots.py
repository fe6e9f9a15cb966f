"""Expert slots: rerouted calls equal each adapter's own experts, and slots come and go without a trace."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hf.test_experts import config_of, experts_class
from torch import Tensor, nn

import moesaic
from moesaic import ExpertBank, MoE, MoEConfig
from moesaic.autotune.signature import family_of
from moesaic.autotune.tuner import Tuner
from moesaic.dispatch import Dispatch
from moesaic.errors import ConfigError, UnsupportedError, UsageError
from moesaic.experts import BACKENDS, ExpertWeights, QuantFormat, ranges
from moesaic.experts.slots import BatchAdapters, ExpertSlots
from moesaic.hf.experts import experts_forward, weights_of

E, D, F, K = 6, 8, 10, 2
BACKEND = pytest.mark.parametrize("backend", moesaic.experts.available())


def bank_of(bias: bool = True) -> ExpertBank:
    torch.manual_seed(0)
    bank = ExpertBank(D, F, E, bias=bias).requires_grad_(False)
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.3)
    return bank


def slots_of(bank: ExpertBank, room: int = 12, adapters: int = 4) -> tuple[ExpertSlots, BatchAdapters]:
    batch = BatchAdapters()
    bank.slots = ExpertSlots(bank.weights(), room, adapters, batch)
    return bank.slots, batch


def copies(weights: ExpertWeights, experts: list[int], seed: int) -> dict[str, Tensor]:
    """An adapter's versions of some experts."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor.detach()[experts] + 0.3 * torch.randn(len(experts), *tensor.shape[1:], generator=generator)
        for name, tensor in weights.tensors().items()
    }


def load(slots: ExpertSlots, adapter: int, experts: list[int], rows: dict[str, Tensor]) -> list[int]:
    taken = slots.allocate(len(experts))
    slots.write(taken, experts, rows)
    slots.publish(adapter, experts, taken)
    return taken


def merged(weights: ExpertWeights, experts: list[int], rows: dict[str, Tensor]) -> ExpertWeights:
    """The weights of the base with an adapter's experts in their places."""
    whole = {name: tensor.detach().clone() for name, tensor in weights.tensors().items()}
    for name, values in rows.items():
        whole[name][experts] = values
    return replace(weights, **whole)


def call(tokens: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Features, expert ids of which some are null, and routing weights."""
    ids = torch.rand(tokens, E + 1).topk(K).indices
    ids[ids == E] += torch.randint(0, 5, (1,))
    return torch.randn(tokens, D), ids, torch.rand(tokens, K)


def expected(index: Tensor, versions: list[ExpertWeights], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    alone = [moesaic.experts.compute(x, Dispatch.from_slots(ids, weights, E), version) for version in versions]
    return torch.stack([alone[adapter][token] for token, adapter in enumerate(index.tolist())])


@BACKEND
@pytest.mark.parametrize("bias", [True, False])
def test_a_mixed_batch_equals_each_adapter_alone(backend: str, bias: bool) -> None:
    bank = bank_of(bias)
    base = bank.weights()
    told = {1: [0, 3, 5], 2: [3], 3: [1, 2, 3, 4]}
    rows = {adapter: copies(base, experts, adapter) for adapter, experts in told.items()}
    versions = [base, *(merged(base, told[adapter], rows[adapter]) for adapter in told)]
    x, ids, weights = call()
    index = torch.randint(0, 4, (len(x),))
    with moesaic.use_backend(backend):
        wanted = expected(index, versions, x, ids, weights)
        slots, batch = slots_of(bank)
        for adapter, experts in told.items():
            load(slots, adapter, experts, rows[adapter])
        with batch.using(index):
            dispatch = Dispatch.from_slots(slots.reroute(ids), weights, slots.in_use)
            torch.testing.assert_close(bank(x, dispatch), wanted, rtol=1e-5, atol=1e-5)
    assert slots.in_use == E + 8


@BACKEND
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_transformers(backend: str, transposed: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    module = experts_class(has_bias=True, is_transposed=transposed)(config_of())
    moesaic.freeze(module) if frozen else module.requires_grad_(False)
    base, strides = weights_of(module), weights_of(module).up.stride()
    experts, width = [1, 4], module.down_proj.shape[1 if transposed else 2]
    assert width == 6
    rows = copies(base, experts, 1)
    versions = [base, merged(base, experts, rows)]
    x, ids, weights = torch.randn(9, 8), torch.randint(0, 7, (9, 3)), torch.rand(9, 3)  # from 5 on null
    index = torch.randint(0, 2, (9,))
    with moesaic.use_backend(backend):
        alone = [moesaic.experts.compute(x, Dispatch.from_slots(ids, weights, 5), each) for each in versions]
        wanted = torch.where(index[:, None] == 1, alone[1], alone[0])
        batch = BatchAdapters()
        module.slots = ExpertSlots(base, 7, 1, batch)
        load(module.slots, 1, experts, rows)
        assert weights_of(module).up.stride() == strides == module.slots.weights.up.stride()
        torch.testing.assert_close(experts_forward(module, x, ids, weights), alone[0], rtol=0, atol=0)
        assert module.last_counts.shape == (5,)
        with batch.using(index):
            torch.testing.assert_close(experts_forward(module, x, ids, weights), wanted, rtol=1e-5, atol=1e-5)
        counts = module.last_counts
        assert counts.shape == (7,)
        folded = module.slots.by_expert(counts)
        assert folded.dtype == torch.int64
        assert folded.tolist() == [int((ids == expert).sum()) for expert in range(5)]


@pytest.mark.parametrize("capacity_factor", [0.0, 1.5])
def test_the_layer_reroutes_after_capacity_was_granted(capacity_factor: float) -> None:
    torch.manual_seed(0)
    config = MoEConfig(d_model=D, d_ff=F, num_experts=E, top_k=K, num_shared_experts=1)
    layer = MoE(replace(config, capacity_factor=capacity_factor)).eval().requires_grad_(False)
    tuned = copy.deepcopy(layer)
    rows = copies(layer.experts.weights(), [0, 2, 5], 1)
    for name, values in rows.items():
        getattr(tuned.experts, name)[[0, 2, 5]] = values
    x = torch.randn(3, 7, D)
    index = torch.randint(0, 2, (21,))
    wanted = torch.where(index.view(3, 7, 1) == 1, tuned(x), layer(x))
    routing = layer.last_routing
    slots, batch = slots_of(layer.experts)
    load(slots, 1, [0, 2, 5], rows)
    with batch.using(index):
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.last_routing.expert_ids, routing.expert_ids)  # of experts, not of slots
    if capacity_factor == 0:
        assert torch.equal(slots.by_expert(layer.experts.last_counts), routing.counts())


def test_without_an_adapter_in_the_batch_nothing_changes() -> None:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(d_model=D, d_ff=F, num_experts=E, top_k=K)).eval().requires_grad_(False)
    x = torch.randn(9, D)
    wanted = layer(x)
    slots, batch = slots_of(layer.experts)
    load(slots, 1, [2], copies(slots.weights, [2], 1))
    for index in (None, torch.zeros(9, dtype=torch.int64), torch.full((9,), 2)):  # 2 has no experts here
        with batch.using(index):
            assert torch.equal(layer(x), wanted)
    with batch.using(torch.zeros(9, dtype=torch.int64)):
        assert slots.is_idle


def test_both_ways_of_rerouting_agree() -> None:
    slots, batch = slots_of(bank_of())
    load(slots, 1, [0, 5], {})
    load(slots, 4, [1], {})
    ids = torch.tensor([[0, 5], [1, 6], [5, 9], [1, 0], [2, 8]])
    with batch.using(torch.tensor([1, 4, 1, 0, 3])):
        by_numpy = slots.reroute(ids)
        by_torch = torch.vmap(slots.reroute)(ids[None])[0]
    null = slots.total
    assert by_numpy.tolist() == by_torch.tolist() == [[6, 7], [8, null], [7, null], [1, 0], [2, null]]
    assert ids[1].tolist() == [1, 6]  # the router's own tensor stays


def test_another_number_of_tokens_is_refused() -> None:
    slots, batch = slots_of(bank_of())
    load(slots, 1, [0], {})
    with batch.using(torch.ones(3, dtype=torch.int64)), pytest.raises(ConfigError, match=r"3 tokens .* got 4"):
        slots.reroute(torch.zeros(4, K, dtype=torch.int64))
    with batch.using(torch.ones(3, dtype=torch.int64)):
        with batch.using(None):
            assert slots.is_idle
        assert not slots.is_idle


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 4), st.sets(st.integers(0, E - 1))), max_size=25))
def test_slots_are_the_lowest_free_ones_and_hold_what_was_written(steps: list[tuple[int, set[int]]]) -> None:
    """Adapters come and go in any order; a plain dictionary says what each token must get."""
    bank = bank_of(bias=False)
    slots, batch = slots_of(bank, room=9)
    base = bank.up.clone()
    held: dict[int, dict[int, int]] = {}
    values: dict[int, int] = {}
    for number, (adapter, chosen) in enumerate(steps):
        free = [slot for slot in range(E, E + 9) if slot not in values]
        if adapter in held:
            assert slots.withdraw(adapter) == list(held[adapter].values())
            slots.release(list(held[adapter].values()))
            for slot in held.pop(adapter).values():
                del values[slot]
        elif len(chosen) > len(free):
            with pytest.raises(UsageError, match=f"{len(chosen)} expert slots are needed, but {len(free)} of 9"):
                slots.allocate(len(chosen))
        else:
            experts = sorted(chosen)
            taken = load(slots, adapter, experts, {"up": torch.full((len(experts), 2 * F, D), float(number))})
            assert taken == free[: len(experts)]
            held[adapter] = dict(zip(experts, taken, strict=True))
            values |= dict.fromkeys(taken, number)
        assert slots.used == len(values) and slots.free == 9 - len(values)
        assert slots.in_use == max([E, *(slot + 1 for slot in values)])
        for slot, value in values.items():
            assert (slots.weights.up[slot] == value).all()
        every = torch.arange(E + 2).repeat(5, 1)
        with batch.using(torch.arange(5)):
            wanted = [[held.get(a, {}).get(e, e) if e < E else slots.total for e in range(E + 2)] for a in range(5)]
            assert slots.reroute(every).tolist() == wanted
    assert torch.equal(bank.up, base)


def test_what_an_adapter_leaves_out_is_the_base() -> None:
    bank = bank_of()
    slots, _ = slots_of(bank)
    rows = copies(bank.weights(), [1, 4], 1)
    taken = load(slots, 1, [1, 4], {"up": rows["up"].double()})  # another precision is converted
    torch.testing.assert_close(slots.weights.up[taken], rows["up"])
    for name in ("down", "up_bias", "down_bias"):
        assert torch.equal(slots.weights.tensors()[name][taken], getattr(bank, name)[[1, 4]])


def test_the_base_is_held_once_and_is_the_modules_own() -> None:
    bank = bank_of()
    before = {name: (parameter, parameter.clone()) for name, parameter in bank.named_parameters()}
    slots, _ = slots_of(bank)
    for name, parameter in bank.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.data_ptr() == slots.weights.tensors()[name].data_ptr()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    bank.load_state_dict({name: value + 1 for name, (_, value) in before.items()})
    assert torch.equal(slots.weights.up[:E], before["up"][1] + 1)
    slots.close()
    bank.slots = None
    for name, parameter in bank.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1] + 1)


def test_a_copy_has_the_base_only() -> None:
    bank = bank_of()
    slots, _ = slots_of(bank, room=1000)
    load(slots, 1, [0], {})
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert other.slots is None and torch.equal(other.up, bank.up)
        assert other.up.data_ptr() != bank.up.data_ptr()
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    assert file.tell() < 2 * sum(parameter.nbytes for parameter in bank.parameters()) + 8192


def test_memory_comes_and_goes_with_the_adapters() -> None:
    bank = ExpertBank(64, 64, 4).requires_grad_(False)
    slots, _ = slots_of(bank, room=8)
    assert slots.row_bytes == 3 * 64 * 64 * 4
    before = slots.committed
    taken = load(slots, 1, [0, 2], {})
    assert slots.committed == before + 2 * slots.row_bytes  # whole pages
    slots.release(slots.withdraw(1))
    assert slots.committed == before and taken == [4, 5]


@pytest.mark.parametrize("error", [UsageError, UnsupportedError])
def test_memory_that_runs_out_changes_nothing(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    slots, _ = slots_of(bank_of())
    load(slots, 1, [0], {})
    before = slots.committed, slots.used
    commits: list[int] = []
    commit = ranges.AddressRange.commit

    def sometimes(memory: ranges.AddressRange, first: int, last: int) -> None:
        commits.append(first)
        if len(commits) == 3:
            raise error("no memory")
        commit(memory, first, last)

    monkeypatch.setattr(ranges.AddressRange, "commit", sometimes)
    with pytest.raises(error, match="no memory"):
        slots.allocate(2)
    assert (slots.committed, slots.used) == before
    assert slots.allocate(2) == [E + 1, E + 2]


def test_codes_are_refused() -> None:
    bank = ExpertBank(32, 32, 2)
    bank.quantize(QuantFormat.named("int8"))
    with pytest.raises(UnsupportedError, match="int8 codes"):
        ExpertSlots(bank.weights(), 1, 1, BatchAdapters())


def test_freeze_and_quantize_come_before() -> None:
    bank = bank_of(bias=False)
    slots_of(bank)
    with pytest.raises(ConfigError, match="freeze the model before"):
        moesaic.freeze(bank)
    with pytest.raises(ConfigError, match="AdapterPool"):
        bank.quantize(QuantFormat.named("int8"))


def test_adapters_make_no_new_kind_of_call_for_the_tuner() -> None:
    """Else every adapter that comes or goes would make it time all backends anew."""
    bank = bank_of(bias=False)
    x, ids, weights = torch.randn(4, D), torch.tensor([[0, 1], [2, 3], [4, 5], [0, 2]]), torch.rand(4, K)
    base = family_of(x, bank.weights(), grad=False)
    slots, batch = slots_of(bank)
    tuner = Tuner(BACKENDS)
    for adapter, experts in ((1, [0, 1]), (2, [4]), (3, [1, 2, 3])):
        load(slots, adapter, experts, {})
        assert family_of(x, slots.weights, grad=False) == base
        with batch.using(torch.full((4,), adapter)), moesaic.autotune.use_tuning("on"):
            tuner.run(x, Dispatch.from_slots(slots.reroute(ids), weights, slots.in_use), slots.weights)
    assert len(tuner.decisions()) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_adapters_come_and_go_in_any_mode(mode: type[torch.no_grad] | type[torch.inference_mode]) -> None:
    bank = bank_of()
    slots, batch = slots_of(bank)
    x, ids, weights = call()
    with mode():
        load(slots, 1, [3], copies(slots.weights, [3], 1))
        with batch.using(torch.ones(len(x), dtype=torch.int64)):
            within = bank(x, Dispatch.from_slots(slots.reroute(ids), weights, slots.in_use))
    with batch.using(torch.ones(len(x), dtype=torch.int64)):
        after = bank(x, Dispatch.from_slots(slots.reroute(ids), weights, slots.in_use))
    assert torch.equal(within, after)
    slots.release(slots.withdraw(1))
    assert slots.in_use == E
