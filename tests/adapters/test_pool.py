"""Many adapters in one batch equal each merged model alone; they come and go while the model computes."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.adapters.lora_models import SIZES, make, random_lora
from tests.experts.test_ranges import linux, resident
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import moesaic
from moesaic import ExpertBank
from moesaic.adapters import AdapterLayer, Base, load, merge, write_adapter
from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.lora_format import save_lora
from moesaic.adapters.pool import AdapterPool, Prepared
from moesaic.errors import CheckpointError, ConfigError, UnsupportedError, UsageError
from moesaic.experts import ranges, slots
from moesaic.hf.experts import parameter_names
from moesaic.hf.quantized import expert_modules

DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
KINDS = ["ours", "olmoe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"]
TOKENS = 6


def model_of(kind: str) -> PreTrainedModel:
    if kind != "deepseek_v3":
        return make(kind)
    torch.manual_seed(0)
    config = DeepseekV3Config(**SIZES | DEEPSEEK)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation="moesaic")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write(
    model: nn.Module,
    folder: Path,
    seed: int,
    choose: Callable[[str, int, torch.Generator], Sequence[int]] | None = None,
    base: str | None = None,
) -> Path:
    """An adapter whose experts are the base's and noise; by default a random choice of them in each layer."""
    generator = torch.Generator().manual_seed(seed)
    layers, tensors = {}, {}
    for name, module in expert_modules(model).items():
        parameters = {each: getattr(module, each).detach() for each in parameter_names(module).values()}
        num_experts = len(next(iter(parameters.values())))
        ids = choose(name, num_experts, generator) if choose else some_experts(num_experts, generator)
        if ids:
            layers[name] = AdapterLayer(list(ids), [0.5] * len(ids), num_experts)
            tensors[name] = {
                each: value[ids] + 0.3 * torch.randn(len(ids), *value.shape[1:], generator=generator).to(value.dtype)
                for each, value in parameters.items()
            }
    return write_adapter(folder, Base(base or fingerprint(model), "test", "a base"), layers, tensors)


def some_experts(num_experts: int, generator: torch.Generator) -> list[int]:
    count = int(torch.randint(1, num_experts, (), generator=generator))
    return sorted(torch.randperm(num_experts, generator=generator)[:count].tolist())


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


def prompts(batch: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def per_token(adapters: Sequence[int]) -> Tensor:
    return torch.tensor(adapters).repeat_interleave(TOKENS)


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[tuple[PreTrainedModel, AdapterPool, Path]]:
    model = make("ours")
    pool = AdapterPool(model, max_adapters=8)
    yield model, pool, tmp_path
    pool.close()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_equals_each_merged_model_alone(kind: str, frozen: bool, tmp_path: Path) -> None:
    model = model_of(kind)
    names = ["poet", "lawyer", "v1.5-b"]
    folders = [write(model, tmp_path / name, seed) for seed, name in enumerate(names)]
    ids = prompts()
    alone = [logits(model, ids)]
    for folder in folders:
        merged = copy.deepcopy(model)
        merge(merged, folder)
        alone.append(logits(merged, ids))
    assert (alone[1] - alone[0]).abs().max() > 0.01
    if frozen:
        moesaic.freeze(model)
        alone[0] = logits(model, ids)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pool = AdapterPool(model)
    assert [pool.load(name, folder) for name, folder in zip(names, folders, strict=True)] == [1, 2, 3]
    assert pool.names() == names and [pool.index(name) for name in (None, *names)] == [0, 1, 2, 3]
    for mix in ([0, 1, 2, 3, 1, 0], [3, 3, 3, 3, 3, 3], [2, 0, 0, 0, 0, 0]):
        with pool.using(per_token(mix)):
            got = logits(model, ids)
        wanted = torch.stack([alone[adapter][row] for row, adapter in enumerate(mix)])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    with pool.using(per_token([0] * 6)):
        assert torch.equal(logits(model, ids), alone[0])
    assert torch.equal(logits(model, ids), alone[0])
    assert {name: value for name, value in model.state_dict().items() if not torch.equal(value, state[name])} == {}
    pool.close()
    assert torch.equal(logits(model, ids), alone[0])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=st.lists(st.integers(0, 4), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_any_mix_at_any_time(ours: Any, mix: list[int], seed: int) -> None:
    """One adapter was loaded anew since the last example, so that slots are not where they were."""
    model, pool, folder = ours
    for number in range(1, 5):
        if not (folder / f"a{number}").exists():
            write(model, folder / f"a{number}", number)
            pool.load(f"a{number}", folder / f"a{number}")
    again = f"a{1 + seed % 4}"
    pool.unload(again)
    pool.load(again, folder / again)
    ids = prompts(len(mix), seed)
    indices = [pool.index(f"a{number}" if number else None) for number in mix]
    with pool.using(per_token(indices)):
        got = logits(model, ids)
    for row, number in enumerate(mix):
        merged = make("ours")
        if number:
            merge(merged, folder / f"a{number}")
        torch.testing.assert_close(got[row], logits(merged, ids)[row], rtol=1e-5, atol=1e-5)


def test_expert_adapters_and_low_rank_ones_share_a_batch(ours: Any) -> None:
    model, pool, folder = ours
    write(model, folder / "experts", 1)
    save_lora(folder / "low", random_lora(model), model)
    ids, mix = prompts(), [0, 1, 2, 2, 1, 0]
    alone = []
    for each in (None, "experts", "low"):
        merged = make("ours")
        if each:
            merge(merged, folder / each)
        alone.append(logits(merged, ids))
    assert pool.load("experts", folder / "experts") == 1 and pool.load("low", folder / "low") == 2
    with pool.using(per_token(mix)):
        got = logits(model, ids)
    wanted = torch.stack([alone[adapter][row] for row, adapter in enumerate(mix)])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)
    held = pool.memory()
    assert held.adapter_bytes > sum(held.slots_used) * next(iter(pool._layers.values())).slots.row_bytes
    pool.unload("low")
    assert pool.names() == ["experts"] and pool.memory().committed_bytes < held.committed_bytes
    assert torch.equal(logits(model, ids), alone[0])


def test_a_copy_of_the_model_has_no_adapters(ours: Any) -> None:
    model, pool, folder = ours
    alone = logits(model, prompts())
    save_lora(folder / "low rank", random_lora(model, "both", 3, 4.0, seed=1), model)
    pool.load("whole", write(model, folder / "whole", 2))
    both = per_token([pool.load("parts", folder / "low rank"), pool.index("whole")] * 3)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pool.using(both):
            assert torch.equal(logits(copied, prompts()), alone)
        with load(copied, folder / "low rank"):
            assert not torch.equal(logits(copied, prompts()), alone)


def test_a_dense_model_can_have_low_rank_adapters_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    write(make("ours"), tmp_path / "experts", 0, base=fingerprint(model))
    save_lora(tmp_path / "low", random_lora(model, "attention"), model)
    pool = AdapterPool(model)
    with pytest.raises(CheckpointError, match="layers with experts are: none"):
        pool.load("experts", tmp_path / "experts")
    ids, before = prompts(), logits(model, prompts())
    with pool.using(per_token([0, pool.load("low", tmp_path / "low")] * 3)):
        got = logits(model, ids)
    torch.testing.assert_close(got[::2], before[::2], rtol=1e-5, atol=1e-5)
    assert (got[1::2] - before[1::2]).abs().max() > 1e-3


def test_nothing_changes_for_running_requests(ours: Any) -> None:
    """Bit for bit, while others are prepared, published, unloaded and take the slots of one another."""
    model, pool, folder = ours
    for number in range(4):
        write(model, folder / f"a{number}", number)
    pool.load("a0", folder / "a0")
    ids, index = prompts(), per_token([0, 1, 1, 0, 1, 1])

    def step() -> Tensor:
        with pool.using(index):
            return logits(model, ids)

    wanted = step()
    prepared = pool.prepare("a1", folder / "a1")
    assert torch.equal(step(), wanted) and pool.names() == ["a0"]
    assert pool.publish(prepared) == 2 and torch.equal(step(), wanted)
    assert pool.load("a2", folder / "a2") == 3 and torch.equal(step(), wanted)
    pool.unload("a1")
    assert torch.equal(step(), wanted)
    assert pool.load("a3", folder / "a3") == 2 and torch.equal(step(), wanted)
    pool.discard(pool.prepare("a1", folder / "a1"))
    assert torch.equal(step(), wanted)


def test_an_adapters_numbers_do_not_depend_on_where_its_slots_are(ours: Any) -> None:
    model, pool, folder = ours
    for number in range(3):
        write(model, folder / f"a{number}", number)
    ids = prompts()

    def alone(name: str) -> Tensor:
        with pool.using(per_token([pool.index(name)] * 6)):
            return logits(model, ids)

    pool.load("a0", folder / "a0")
    wanted = alone("a0")
    pool.load("a1", folder / "a1")
    pool.unload("a0")
    pool.load("a2", folder / "a2")
    pool.load("a0", folder / "a0")
    assert torch.equal(alone("a0"), wanted)


def test_loading_beside_a_thread_that_steps(tmp_path: Path) -> None:
    """Another thread prepares; publishing and unloading happen between the steps of this one."""
    model, rounds = make("ours"), 30
    folders = [write(model, tmp_path / f"a{number}", number) for number in range(3)]
    pool = AdapterPool(model, max_adapters=rounds + 2)
    pool.load("a0", folders[0])
    ids, index = prompts(2), per_token([0, 1])
    with pool.using(index):
        wanted = logits(model, ids)
    committed = pool.memory().committed_bytes
    ready: list[Prepared] = []
    failed: list[Exception] = []

    def prepare() -> None:
        try:
            for number in range(rounds):
                ready.append(pool.prepare(f"n{number}", folders[1 + number % 2]))
                if number % 3 == 2:
                    pool.discard(pool.prepare("given-up", folders[2]))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=prepare)
    thread.start()
    published = 0
    while thread.is_alive() or ready:
        while ready:
            prepared = ready.pop(0)
            pool.publish(prepared)
            published += 1
            pool.unload(prepared.name)
        with pool.using(index):
            assert torch.equal(logits(model, ids), wanted)
    thread.join()
    assert not failed and published == rounds
    assert pool.names() == ["a0"] and pool.memory().committed_bytes == committed
    pool.close()


class Banks(nn.Module):
    """Experts of some size, and nothing else: 768 KiB each."""

    def __init__(self, layers: int = 2, num_experts: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(ExpertBank(256, 256, num_experts) for _ in range(layers))


def in_memory(pool: AdapterPool) -> int:
    """Bytes of the pages of all ranges that are there."""
    matrices = [matrix for layer in pool._layers.values() for matrix in layer.slots._matrices.values()]
    return sum(resident(matrix.rows) for matrix in matrices)


@linux
def test_twenty_adapters_take_what_their_experts_take(tmp_path: Path) -> None:
    model = Banks()
    pool = AdapterPool(model)
    base = sum(parameter.nbytes for parameter in model.parameters())
    assert pool.memory().base_bytes == base and in_memory(pool) <= base * 1.02
    for number in range(20):
        pool.load(
            f"a{number}", write(model, tmp_path / "a", number, lambda name, count, generator, at=number: [at % 8])
        )
    held = pool.memory()
    assert held.adapter_bytes == base // 8 * 20 and held.slots_used == [20, 20]
    assert in_memory(pool) <= held.committed_bytes <= (base + held.adapter_bytes) * 1.02
    for number in range(0, 20, 2):
        pool.unload(f"a{number}")
    held = pool.memory()
    assert held.adapter_bytes == base // 8 * 10
    assert in_memory(pool) <= held.committed_bytes <= (base + held.adapter_bytes) * 1.02


@linux
def test_unloading_returns_the_memory_to_the_system(tmp_path: Path) -> None:
    model = Banks()
    pool = AdapterPool(model)
    folder = write(model, tmp_path / "a", 0, lambda name, count, generator: range(count))
    pool.discard(pool.prepare("warm", folder))
    before, size = anonymous_bytes(), sum(parameter.nbytes for parameter in model.parameters())
    pool.load("a", folder)
    assert anonymous_bytes() - before > 0.95 * size
    pool.unload("a")
    assert anonymous_bytes() - before < 0.05 * size
    pool.load("a", folder)
    pool.close()
    # The parameters' own memory again, and not the ranges'.
    assert anonymous_bytes() - before < 0.05 * size


def anonymous_bytes() -> int:
    """Of this process's memory what is no file's."""
    told = Path("/proc/self/smaps_rollup").read_text()
    return next(1024 * int(line.split()[1]) for line in told.splitlines() if line.startswith("Anonymous:"))


def cycle(pool: AdapterPool, folders: Sequence[Path], times: int) -> None:
    for number in range(times):
        pool.load(f"a{number}", folders[number % len(folders)])
        if number >= 3:
            pool.unload(f"a{number - 3}")
    for number in range(times - 3, times):
        pool.unload(f"a{number}")


def holdings() -> tuple[int, int]:
    """Open files, and mappings."""
    return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())


@linux
@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_cycles_of_loading_and_unloading_leave_nothing(times: int, tmp_path: Path) -> None:
    model = make("ours")
    folders = [write(model, tmp_path / f"a{number}", number) for number in range(3)]
    folders.append(save_lora(tmp_path / "low", random_lora(model), model))
    pool = AdapterPool(model)
    cycle(pool, folders, 20)
    held, rest, (files, mappings) = pool.memory(), anonymous_bytes(), holdings()
    cycle(pool, folders, times)
    assert pool.memory() == held and held.slots_used == [0, 0]
    assert in_memory(pool) <= held.committed_bytes
    assert anonymous_bytes() - rest < 1 << 20
    now = holdings()
    assert now[0] == files and now[1] <= mappings + 8
    pool.close()


def test_a_full_pool_says_so(tmp_path: Path) -> None:
    model = make("ours")
    two = write(model, tmp_path / "two", 0, lambda name, count, generator: [0, 1])
    one = write(model, tmp_path / "one", 1, lambda name, count, generator: [2])
    pool = AdapterPool(model, max_slots=3, max_adapters=2)
    pool.load("a", two)
    before = pool.memory()
    with pytest.raises(UsageError, match=r"'b' does not fit into .*experts: 2 expert slots are needed, but 1 of 3 are"):
        pool.load("b", two)
    assert pool.memory() == before
    pool.load("b", one)
    with pytest.raises(UsageError, match="there are 2 adapters, and room for 2"):
        pool.load("c", one)
    pool.unload("a")
    assert pool.load("c", two) == 1
    pool.close()


@pytest.mark.parametrize("name", ["", "a b", "../a", ".hidden", "-x", "a/b", "a\n"])
def test_names(ours: Any, name: str) -> None:
    _, pool, folder = ours
    with pytest.raises(UsageError, match="letters, digits"):
        pool.prepare(name, folder)


def test_a_name_is_taken_from_preparing_on(ours: Any) -> None:
    model, pool, folder = ours
    write(model, folder / "a", 0)
    prepared = pool.prepare("a", folder / "a")
    with pytest.raises(UsageError, match="'a' already"):
        pool.prepare("a", folder / "a")
    with pytest.raises(UsageError, match="allowed: none"):
        pool.index("a")
    pool.publish(prepared)
    with pytest.raises(UsageError, match="published or discarded"):
        pool.publish(prepared)
    pool.discard(prepared)  # changes nothing any more
    with pytest.raises(UsageError, match="did you mean 'a'"):
        pool.unload("aa")
    assert pool.names() == ["a"]


def test_what_does_not_fit_is_refused_and_leaves_nothing(ours: Any) -> None:
    model, pool, folder = ours
    before = pool.memory()
    other = make("ours")
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    layers = {name: len(module.up) for name, module in expert_modules(model).items()}
    first = next(iter(layers))
    mine = fingerprint(model)
    rows = torch.zeros(1, *model.get_submodule(first).up.shape[1:])

    def made(name: str, layer: AdapterLayer, tensors: dict[str, Tensor], path: str = first) -> Path:
        return write_adapter(folder / name, Base(mine, "test", "a base"), {path: layer}, {path: tensors})

    layer = AdapterLayer([1], [0.5], layers[first])
    cases = {
        "another base": (
            write(other, folder / "other", 0),
            r"trained from another base model \(a base, fingerprint v1:",
        ),
        "no folder": (folder / "nowhere", "nowhere"),
        "a layer": (
            made("l", layer, {"up": rows}, "model.layers.9.mlp.experts"),
            "layers with experts are: model.layers",
        ),
        "experts": (made("e", AdapterLayer([1], [0.5], 99), {"up": rows}), "has 4 experts, not 99"),
        "a parameter": (made("p", layer, {"gate_up_proj": rows}), "has no 'gate_up_proj', only up"),
        "a shape": (made("s", layer, {"up": rows[:, :-1]}), "an expert's up of .* is"),
    }
    for path, said in cases.values():
        with pytest.raises(CheckpointError, match=said):
            pool.load("a", path)
        assert pool.memory() == before and pool.names() == []


def test_an_adapter_in_half_precision_and_one_of_a_single_matrix(ours: Any) -> None:
    model, pool, folder = ours
    name, module = next(iter(expert_modules(model).items()))
    rows = module.down[[2]].detach().bfloat16() * 2
    layer = AdapterLayer([2], [0.5], 4)
    base = Base(fingerprint(model), "test", "a base")
    write_adapter(folder / "a", base, {name: layer}, {name: {"down": rows}})
    merged = make("ours")
    with torch.no_grad():
        merged.get_submodule(name).down[2] = rows[0].float()
    with pool.using(per_token([pool.load("a", folder / "a")] * 6)):
        got = logits(model, prompts())
    torch.testing.assert_close(got, logits(merged, prompts()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), r"of shape \[3, 2\]"),
        (torch.zeros(3), "got torch.float32"),
        (torch.tensor([0, 9]), r"0 \.\.\. 8, got 0 \.\.\. 9"),
        (torch.tensor([0, -1]), r"got -1 \.\.\. 0"),
        (torch.tensor([0, 3, 5]), "no adapter with the index 3"),
    ],
)
def test_indices_are_checked(ours: Any, index: Tensor, said: str) -> None:
    _, pool, _ = ours
    with pytest.raises(ConfigError, match=said), pool.using(index):
        raise AssertionError("not reached")


def test_the_index_of_an_adapter_that_has_gone_is_refused(ours: Any) -> None:
    model, pool, folder = ours
    write(model, folder / "a", 0)
    prepared = pool.prepare("a", folder / "a")
    index = torch.tensor([0, prepared.index])

    def refused() -> None:
        with pytest.raises(ConfigError, match="no adapter with the index 1"), pool.using(index):
            raise AssertionError("not reached")

    refused()
    pool.publish(prepared)
    with pool.using(index):
        pass
    pool.unload("a")
    refused()


def test_models_that_cannot_be_served() -> None:
    eager = make("olmoe", "eager")
    with pytest.raises(UnsupportedError, match=r"'eager': call model\.set_experts_implementation"):
        AdapterPool(eager)
    codes = moesaic.quantize(make("ours"), "int8")
    with pytest.raises(UnsupportedError, match="int8 codes"):
        AdapterPool(codes)
    with pytest.raises(ConfigError, match="max_adapters is 0"):
        AdapterPool(make("ours"), max_adapters=0)
    with pytest.raises(ConfigError, match=r"0 \.\.\. 1000000"):
        AdapterPool(make("ours"), max_slots=1 << 40)
    served = make("ours")
    pool = AdapterPool(served)
    with pytest.raises(UsageError, match="another AdapterPool"):
        AdapterPool(served)
    pool.close()
    AdapterPool(served).close()


def test_room_that_cannot_be_reserved_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("ours")
    wanted = logits(model, prompts())
    reserved = []

    def scarce(*arguments: Any) -> Any:
        reserved.append(arguments)
        if len(reserved) == 6:  # of the second layer
            raise UsageError("these addresses cannot be reserved")
        return ranges.reserve(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(slots, "reserve", scarce)
        with pytest.raises(UsageError, match="cannot be reserved"):
            AdapterPool(model)
    assert len(reserved) == 6
    assert not [module for module in expert_modules(model).values() if module.slots is not None]
    assert torch.equal(logits(model, prompts()), wanted)
    AdapterPool(model).close()


def test_a_closed_pool_takes_no_more(ours: Any) -> None:
    model, pool, folder = ours
    write(model, folder / "a", 0)
    pool.load("a", folder / "a")
    waiting = pool.prepare("b", folder / "a")
    pool.close()
    pool.close()
    assert pool.names() == [] and all(module.slots is None for module in expert_modules(model).values())
    with pytest.raises(UsageError):
        pool.publish(waiting)
    with pytest.raises(UsageError, match="closed"):
        pool.prepare("a", folder / "a")


def test_closing_while_an_adapter_is_read(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool, folder = ours
    write(model, folder / "a", 0, choose=lambda name, count, generator: [1])
    wanted = logits(model, prompts())
    copy_rows = slots._copy

    def closing(into: Tensor, values: Tensor) -> None:
        copy_rows(into, values)
        pool.close()

    monkeypatch.setattr(slots, "_copy", closing)
    with pytest.raises(UsageError, match="closed while it read one"):
        pool.prepare("a", folder / "a")
    assert torch.equal(logits(model, prompts()), wanted)
