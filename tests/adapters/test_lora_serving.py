"""Low-rank adapters of any ranks in one batch: every token as if its own had been merged, and nobody beside it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.lora_models import CONFIGS, IDS, logits, make, random_lora
from torch import Tensor, nn
from transformers import PreTrainedModel

import moesaic
from moesaic.adapters import lora_blocks
from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.folder import AdapterLayer, Base, write_adapter
from moesaic.adapters.lora import LoraAdapter
from moesaic.adapters.lora_blocks import LoraBlocks
from moesaic.adapters.lora_format import save_lora
from moesaic.adapters.lora_merge import merge_lora
from moesaic.adapters.lora_serving import LoraMemory, LoraParts
from moesaic.adapters.pool import AdapterPool
from moesaic.errors import CheckpointError, ConfigError, UsageError
from moesaic.hf.quantized import expert_modules
from moesaic.serve.isolation import isolated

KINDS = pytest.mark.parametrize("kind", list(CONFIGS))
TARGETS: list[str | list[str]] = [
    "both",
    "attention",
    "experts",
    ["q_proj", "experts.down_proj"],
    ["experts.gate_up_proj"],
]


def written(folder: Path, model: PreTrainedModel, number: int, targets: str | Sequence[str] = "both") -> LoraAdapter:
    """The adapter ``number`` of a mix: ranks from 1 to 40, some for chosen experts only."""
    rank = (1, 40, 16, 17, 8, 33, 3)[number % 7]
    experts = {name: [0, 1 + number % 3] for name in expert_modules(model)} if number % 2 else None
    adapter = random_lora(model, targets, rank, alpha=2.0 * rank, experts=experts, seed=number)
    if targets == "both":  # one with a rank of its own
        name = next(name for name in adapter.parts if "layers.1" in name)
        other = random_lora(model, targets, rank + 5, alpha=3.0, experts=experts, seed=number + 100)
        adapter = LoraAdapter(adapter.parts | {name: other.parts[name]})
    save_lora(folder, adapter, model)
    return adapter


def merged_logits(kind: str, adapter: LoraAdapter | None) -> Tensor:
    model = make(kind)
    if adapter is not None:
        merge_lora(model, adapter)
    return logits(model)


@KINDS
def test_each_token_of_a_mixed_batch_gets_what_its_merged_model_says(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    names = TARGETS if kind != "ours" else [*TARGETS[:3], ["q_proj", "experts.down"], ["experts.up"]]
    wanted = [merged_logits(kind, None)]
    parts = LoraParts(model)
    for number, targets in enumerate(names, start=1):
        wanted.append(merged_logits(kind, written(tmp_path / str(number), model, number, targets)))
        parts.publish(3 * number, parts.prepare(tmp_path / str(number)))  # indices need not be dense
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        row_adapters = torch.randint(len(wanted), (IDS.shape[0],), generator=generator)
        index_T = (3 * row_adapters).repeat_interleave(IDS.shape[1])
        with parts.using(index_T):
            got = logits(model)
        for row, number in enumerate(row_adapters.tolist()):
            torch.testing.assert_close(got[row], wanted[number][row], rtol=0, atol=1e-5)
    assert torch.equal(logits(model), wanted[0])


class TestPool:
    """Low-rank and ESFT adapters side by side."""

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return make("olmoe")

    @pytest.fixture
    def pool(self, model: PreTrainedModel) -> Iterator[AdapterPool]:
        pool = AdapterPool(model, max_adapters=8)
        yield pool
        pool.close()

    @staticmethod
    def experts_adapter(folder: Path, model: PreTrainedModel, seed: int) -> dict[str, tuple[list[int], Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        layers, tensors = {}, {}
        for name, module in expert_modules(model).items():
            ids = sorted(torch.randperm(4, generator=generator)[: 1 + seed % 3].tolist())
            layers[name] = AdapterLayer(ids, [0.5] * len(ids), 4)
            tensors[name] = {
                parameter: value.detach()[ids] + 0.1 * torch.randn(value[ids].shape, generator=generator)
                for parameter, value in module.named_parameters(recurse=False)
            }
        write_adapter(folder, Base(fingerprint(model), "olmoe", "tiny"), layers, tensors)
        return {f"{name}.{key}": (layers[name].experts, rows) for name in layers for key, rows in tensors[name].items()}

    def test_all_kinds_mix_freely(self, model: PreTrainedModel, pool: AdapterPool, tmp_path: Path) -> None:
        wanted = {0: merged_logits("olmoe", None)}
        for number in range(1, 7):
            folder = tmp_path / str(number)
            other = make("olmoe")
            if number % 2:
                merge_lora(other, written(folder, make("olmoe"), number, TARGETS[number // 2]))
            else:
                weights = dict(other.named_parameters())
                for name, (ids, rows) in self.experts_adapter(folder, make("olmoe"), number).items():
                    weights[name].data[ids] = rows
            wanted[pool.load(f"adapter-{number}", folder)] = logits(other)
        generator = torch.Generator().manual_seed(1)
        ids = IDS.repeat(3, 1)
        for _ in range(8):
            rows = torch.randint(7, (len(ids),), generator=generator)
            with pool.using(rows.repeat_interleave(ids.shape[1])):
                got = logits(model, ids)
            for row, number in enumerate(rows.tolist()):
                torch.testing.assert_close(got[row], wanted[number][row % 2], rtol=0, atol=1e-5)
        for name in pool.names():
            pool.unload(name)
        assert torch.equal(logits(model), wanted[0])
        memory = pool.memory()
        assert memory.adapter_bytes == 0 and memory.slots_used == [0, 0]

    def test_a_trained_adapter_is_served_only_on_its_base(
        self, model: PreTrainedModel, pool: AdapterPool, tmp_path: Path
    ) -> None:
        adapter = replace(random_lora(model), base=Base(fingerprint(make("olmoe")), "olmoe", "tiny"))
        save_lora(tmp_path / "right", adapter, model)
        save_lora(tmp_path / "wrong", replace(adapter, base=Base("v1:0", "olmoe", "another")), model)
        assert pool.load("right", tmp_path / "right") == 1
        with pytest.raises(CheckpointError, match="trained from 'another'"):
            pool.load("wrong", tmp_path / "wrong")
        assert pool.names() == ["right"]


def loaded(model: PreTrainedModel, folder: Path, number: int = 1, index: int = 1) -> LoraParts:
    parts = LoraParts(model)
    written(folder, model, number)
    parts.publish(index, parts.prepare(folder))
    return parts


def test_without_such_an_adapter_in_the_batch_nothing_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("olmoe")
    wanted = logits(model)
    parts = loaded(model, tmp_path)
    calls = []
    monkeypatch.setattr(LoraBlocks, "add", lambda *_: calls.append(1))
    for index_T in (None, torch.zeros(14, dtype=torch.int64), torch.full((14,), 7)):
        with parts.using(index_T):
            assert torch.equal(logits(model), wanted)
    assert not calls


def test_a_layer_that_no_adapter_of_the_batch_has_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("olmoe")
    parts = LoraParts(model)
    for index, target in ((1, "layers.0.self_attn.q_proj"), (2, "experts.down_proj")):
        save_lora(tmp_path / str(index), random_lora(model, [target]), model)
        parts.publish(index, parts.prepare(tmp_path / str(index)))
    asked: list[str] = []
    add = LoraBlocks.add

    def watched(blocks: LoraBlocks, *args: Tensor) -> Tensor:
        asked.append(blocks.target.name)
        return add(blocks, *args)

    monkeypatch.setattr(LoraBlocks, "add", watched)
    with parts.using(torch.ones(14, dtype=torch.int64)):
        logits(model)
    assert asked == ["model.layers.0.self_attn.q_proj.weight"]


def test_unloading_leaves_nothing_behind(tmp_path: Path) -> None:
    model = make("olmoe")
    before = logits(model)
    parts = LoraParts(model)
    for number in range(1, 5):
        written(tmp_path / str(number), model, number)
    kept = parts.prepare(tmp_path / "2")
    parts.publish(9, kept)
    alone = parts.memory()
    assert 0 < alone.adapter_bytes <= alone.committed_bytes
    with parts.using(torch.full((14,), 9)):
        wanted = logits(model)
    for cycle in range(40):
        number = (1, 3, 4)[cycle % 3]
        prepared = parts.prepare(tmp_path / str(number))
        if cycle % 4 == 3:
            parts.discard(prepared)
            continue
        parts.publish(number, prepared)
        with parts.using(torch.full((14,), number)):
            assert not torch.equal(logits(model), wanted)
        parts.unload(number)
        assert parts.memory() == alone
    with parts.using(torch.full((14,), 9)):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
    parts.unload(9)
    assert parts.memory() == LoraMemory(0, 0)
    assert not any(module._forward_hooks or hasattr(module, "low_rank") for module in model.modules())
    assert torch.equal(logits(model), before)


def test_closing_takes_all_of_them_off(tmp_path: Path) -> None:
    model = make("olmoe")
    before = logits(model)
    parts = loaded(model, tmp_path)
    parts.prepare(tmp_path)
    parts.close()
    assert parts.memory() == LoraMemory(0, 0) and torch.equal(logits(model), before)
    assert not any(module._forward_hooks or hasattr(module, "low_rank") for module in model.modules())


def test_preparing_in_another_thread_changes_no_running_forward(tmp_path: Path) -> None:
    model = make("olmoe")
    parts = loaded(model, tmp_path / "1")
    for number in (2, 3):
        written(tmp_path / str(number), model, number)
    index_T = torch.ones(14, dtype=torch.int64)
    with parts.using(index_T):
        wanted = logits(model)
    failed: list[BaseException] = []

    def prepare() -> None:
        try:
            for _ in range(10):
                for number in (2, 3):
                    parts.discard(parts.prepare(tmp_path / str(number)))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=prepare)
    thread.start()
    while thread.is_alive():
        with parts.using(index_T):
            assert torch.equal(logits(model), wanted)
    thread.join()
    assert not failed


def test_in_bfloat16_it_is_the_merged_model_up_to_rounding(tmp_path: Path) -> None:
    model = make("olmoe")
    wanted = merged_logits("olmoe", written(tmp_path, model, 2))
    nn.Module.to(model, dtype=torch.bfloat16)
    parts = LoraParts(model)
    parts.publish(1, parts.prepare(tmp_path))
    with parts.using(torch.ones(14, dtype=torch.int64)):
        got = logits(model)
    assert got.dtype == torch.bfloat16 and (got - wanted).norm() / wanted.norm() < 0.05


def test_quantized_experts_are_served_too(tmp_path: Path) -> None:
    model = moesaic.quantize(make("olmoe"), "int8")
    floats = moesaic.quantize(make("olmoe"), "int8").dequantize()
    merge_lora(floats, written(tmp_path, floats, 2))
    parts = LoraParts(model)
    parts.publish(1, parts.prepare(tmp_path))
    with parts.using(torch.ones(14, dtype=torch.int64)):
        torch.testing.assert_close(logits(model), logits(floats), rtol=0, atol=1e-4)


class TestIsolation:
    """Bits, under adversarial neighbours: module by module, for attention is the engine's part."""

    TOKENS = 23

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", ["olmoe", "ours"])
    def test_no_bit_of_a_token_hangs_on_its_neighbours(self, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
        model = nn.Module.to(make(kind), dtype=dtype)
        parts = LoraParts(model)
        for number in range(1, 5):
            written(tmp_path / str(number), model, number)
            parts.publish(number, parts.prepare(tmp_path / str(number)))
        generator = torch.Generator().manual_seed(0)
        x_TD = torch.randn(self.TOKENS, 32, generator=generator).to(dtype)
        adapters_T = torch.arange(self.TOKENS) % 5
        for module in (model.model.layers[1].mlp, model.model.layers[1].self_attn.q_proj):
            whole = self.run(module, parts, x_TD, adapters_T)
            for count in (1, 2, 3, 9, 22):
                rows = torch.randperm(self.TOKENS, generator=generator)[:count]
                assert torch.equal(self.run(module, parts, x_TD[rows], adapters_T[rows]), whole[rows])
            strangers = torch.where((torch.arange(self.TOKENS) % 2 == 0)[:, None], x_TD, 1e4 * x_TD.flip(0))
            mixed_T = torch.where(torch.arange(self.TOKENS) % 2 == 0, adapters_T, (adapters_T * 3 + 1) % 5)
            assert torch.equal(self.run(module, parts, strangers, mixed_T)[::2], whole[::2])
            base = adapters_T == 0
            assert torch.equal(self.run(module, parts, x_TD[base], adapters_T[base]), whole[base])

    @staticmethod
    @torch.no_grad()
    def run(module: nn.Module, parts: LoraParts, x_TD: Tensor, index_T: Tensor) -> Tensor:
        with isolated(), parts.using(index_T):
            out: Tensor = module(x_TD.unsqueeze(0))
        return out.view(len(x_TD), -1)


def test_what_cannot_be_served_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("olmoe")
    save_lora(tmp_path / "head", random_lora(model, ["lm_head"]), model)
    parts = LoraParts(model)
    with pytest.raises(CheckpointError, match="lm_head does not get every token"):
        parts.prepare(tmp_path / "head")
    written(tmp_path / "one", model, 1)
    file = tmp_path / "one" / "adapter_model.safetensors"
    whole = load_file(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        parts.prepare(tmp_path / "one")
    save_file(whole, file)
    parts = LoraParts(model)
    monkeypatch.setattr("moesaic.adapters.lora_blocks._ROOM", 2)
    with pytest.raises(UsageError, match=r"room for 2 more blocks of rank 16 in .*q_proj.weight, not 3"):
        parts.prepare(tmp_path / "one")
    assert parts.memory() == LoraMemory(0, 0)


def test_an_adapter_that_cannot_be_copied_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("olmoe")
    written(tmp_path, model, 1)
    parts = LoraParts(model)
    to_blocks, copied = lora_blocks._to_blocks, []

    def failing(matrix_XRI: Tensor, like: Tensor) -> Tensor:
        copied.append(like)
        if len(copied) == 4:
            raise RuntimeError("not this one")
        return to_blocks(matrix_XRI, like)

    monkeypatch.setattr(lora_blocks, "_to_blocks", failing)
    with pytest.raises(RuntimeError, match="not this one"):
        parts.prepare(tmp_path)
    assert parts.memory() == LoraMemory(0, 0)


def test_as_many_tokens_must_come_as_were_announced(tmp_path: Path) -> None:
    model = make("olmoe")
    for index, targets in ((1, "attention"), (2, "experts")):
        save_lora(tmp_path / targets, random_lora(model, targets), model)
        parts = LoraParts(model)
        parts.publish(index, parts.prepare(tmp_path / targets))
        with parts.using(torch.full((7,), index)), pytest.raises(ConfigError, match=r"7 tokens .* got 14 tokens"):
            logits(model)
        parts.close()
