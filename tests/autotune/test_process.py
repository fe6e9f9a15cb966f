"""The tuner of a process, on real layers: choices that can be read, replayed and made repeatable."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tests.hf.test_experts import config_of, experts_class

from moesaic import MoE, MoEConfig, autotune, use_backend
from moesaic.autotune import setting
from moesaic.autotune.process import tuner
from moesaic.errors import ConfigError, UsageError
from moesaic.experts import Choice, available
from moesaic.experts.backend import BACKENDS
from moesaic.folders import cache_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_tuner() -> Iterator[None]:
    """A tuner that knows nothing; the process's own one is put back."""
    tuner.cache_clear()
    autotune.install()
    yield
    tuner.cache_clear()
    autotune.install()


def small_layer() -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig(d_model=16, d_ff=24, num_experts=8, top_k=2))


class TestLastChoice:
    def test_of_a_layer(self) -> None:
        layer, x = small_layer(), torch.randn(5, 16)
        assert layer.last_choice is None
        layer(x)
        choice = layer.last_choice
        assert choice.why == "prior" and choice.backend in available()
        assert {estimate.backend for estimate in choice.estimates} == set(available())
        assert choice.signature.family.grad and choice.signature.family.d_model == 16
        line = str(choice)
        assert line.startswith(f"{choice.backend} (prior): ") and "E8 D16 F24 swiglu" in line and "\n" not in line

    def test_of_a_backend_that_is_fixed(self) -> None:
        layer = small_layer()
        with use_backend("loop"):
            layer(torch.randn(5, 16))
        assert layer.last_choice == Choice("loop", "fixed")
        assert str(layer.last_choice) == "loop (fixed)"

    def test_on_the_meta_device(self) -> None:
        layer = small_layer().to("meta")
        layer(torch.randn(5, 16, device="meta"))
        assert layer.last_choice.why == "rule"

    def test_of_a_module_of_transformers(self) -> None:
        module = experts_class()(config_of())
        module(torch.randn(3, 8), torch.randint(0, 5, (3, 2)), torch.rand(3, 2))
        assert module.last_choice.why == "prior"

    def test_it_is_copied_and_pickled_with_the_layer(self) -> None:
        layer = small_layer()
        layer(torch.randn(5, 16))
        assert deepcopy(layer).last_choice == layer.last_choice == pickle.loads(pickle.dumps(layer)).last_choice


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        torch._dynamo.reset()
        with autotune.use_tuning("on"):
            yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("grad", [True, False])
    def test_the_tuner_breaks_no_graph(self, grad: bool) -> None:
        layer, x = small_layer(), torch.randn(5, 16)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x), layer(x))
            compiled(x)
        assert layer.last_choice.why == "rule"

    def test_what_was_tuned_before_does_not_matter(self) -> None:
        layer, x = small_layer(), torch.randn(5, 16)
        layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


class TestSetting:
    @pytest.fixture(autouse=True)
    def unasked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(setting._Setting, "on", None)

    @pytest.mark.parametrize(("word", "on"), [("on", True), ("off", False), ("", True)])
    def test_the_environment(self, monkeypatch: pytest.MonkeyPatch, word: str, on: bool) -> None:
        monkeypatch.setenv("MOESAIC_TUNE", word)
        assert setting.is_tuning_on() is on

    def test_a_wrong_word_in_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOESAIC_TUNE", "of")
        message = "the environment variable MOESAIC_TUNE is 'of': did you mean 'off'\\? allowed: off, on"
        with pytest.raises(ConfigError, match=message):
            small_layer()(torch.randn(5, 16))

    def test_in_a_program(self) -> None:
        autotune.use_tuning("off")
        with autotune.use_tuning("on"):
            assert setting.is_tuning_on()
            with autotune.use_tuning("off"):
                assert not setting.is_tuning_on()
            assert setting.is_tuning_on()
        assert not setting.is_tuning_on()
        with pytest.raises(ConfigError, match="use_tuning is 'maybe': allowed: off, on"):
            autotune.use_tuning("maybe")


class TestRecordAndReplay:
    def test_the_same_choices_give_the_same_bits(self) -> None:
        layer, x = small_layer(), torch.randn(5, 16)
        names = ["loop", "grouped", "loop"]
        with autotune.replay(names), autotune.record() as nothing:
            pass
        assert nothing == []
        with autotune.replay(names):
            outputs = [layer(x) for _ in names]
            assert layer.last_choice == Choice("loop", "replayed")
        for name, output in zip(names, outputs, strict=True):
            with use_backend(name):
                assert torch.equal(layer(x), output)

    def test_what_is_recorded_can_be_replayed(self) -> None:
        layer, x = small_layer(), torch.randn(5, 16)
        with autotune.use_tuning("on"), torch.no_grad(), autotune.record() as log:
            outputs = [layer(x) for _ in range(30)]
        assert [choice.why for choice in log[:2]] == ["prior", "prior"] and len(log) == 30
        with torch.no_grad(), autotune.replay([choice.backend for choice in log]):
            assert all(torch.equal(layer(x), output) for output in outputs)
        layer(x)
        assert len(log) == 30 and layer.last_choice.why == "prior"

    def test_more_calls_than_names(self) -> None:
        layer, x = small_layer(), torch.randn(5, 16)
        with autotune.replay(["loop"]):
            layer(x)
            with pytest.raises(UsageError, match="there are more calls than the 1 choices that are replayed"):
                layer(x)
        with pytest.raises(ConfigError, match="unknown backend 'lop'"), autotune.replay(["lop"]):
            pass


class TestExplain:
    def test_every_kind_of_call_of_this_process(self) -> None:
        layer = small_layer()
        assert autotune.explain() == []
        with autotune.use_tuning("on"), torch.no_grad():
            for tokens in (1, 1, 20, 20, 20):
                layer(torch.randn(tokens, 16))
        told = autotune.explain()
        assert [choice.signature.rows for choice in told] == [4, 12]  # 2 rows, 32-47 rows
        assert all({estimate.backend for estimate in choice.estimates} == set(available()) for choice in told)
        statistics = autotune.statistics()
        assert statistics.calls == 5 and statistics.seconds > 0 and statistics.problem is None
        assert statistics.explored == 0

    def test_and_of_those_before_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
        layer = small_layer()
        with autotune.use_tuning("on"), torch.no_grad():
            for _ in range(10):
                layer(torch.randn(20, 16))
        best = layer.last_choice.backend
        tuner().save()
        file = Path(autotune.statistics().file)
        assert file.parent == tmp_path / "tuner"
        told = json.loads(file.read_text())
        assert told["machine"]["torch"] == torch.__version__
        assert [entry["backend"] for entry in told["timings"]] == [best]

        tuner.cache_clear()
        autotune.install()
        (choice,) = autotune.explain()
        assert (choice.backend, choice.why) == (best, "measured")
        assert str(choice.signature).endswith("32-47 rows on 4-7 experts") or "8 experts" in str(choice.signature)

    def test_without_a_home_nothing_is_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("MOESAIC_CACHE")
        monkeypatch.setattr(Path, "home", no_home)
        with torch.no_grad(), autotune.use_tuning("on"):
            small_layer()(torch.randn(5, 16))
        told = autotune.statistics()
        assert told.file is None and told.problem is not None and "MOESAIC_CACHE" in told.problem
        with pytest.raises(UsageError, match="set MOESAIC_CACHE"):
            cache_folder()


class TestLearn:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))

    @pytest.mark.parametrize("grad", [False, True])
    def test_all_candidates_are_timed_and_remembered(self, grad: bool) -> None:
        layer = small_layer()
        told = autotune.learn(layer.experts.weights(), [1, 20], top_k=2, grad=grad)
        assert len(told) == 2
        for choice in told:
            assert choice.why == "measured" and choice.signature.family.grad == grad
            assert {(estimate.backend, estimate.samples) for estimate in choice.estimates} == {
                (name, 3) for name in available()
            }
            assert choice.backend == choice.estimates[0].backend
        assert layer.experts.up.grad is None
        assert Path(autotune.statistics().file).exists()

        x, chosen = torch.randn(1, 16), min(told, key=lambda choice: choice.signature.rows)
        with autotune.use_tuning("on"), torch.set_grad_enabled(grad):
            layer(x)
            assert (layer.last_choice.backend, layer.last_choice.why) == (chosen.backend, "measured")
            assert [estimate.samples for estimate in layer.last_choice.estimates] == [3] * len(available())
        layer(x)
        assert layer.last_choice.why == "prior"  # off, it makes no difference

    def test_it_leaves_the_random_numbers_alone(self) -> None:
        weights, state = small_layer().experts.weights(), torch.get_rng_state()
        autotune.learn(weights, [1], top_k=2)
        assert torch.equal(torch.get_rng_state(), state)

    def test_out_of_range(self) -> None:
        weights = small_layer().experts.weights()
        with pytest.raises(ConfigError, match="top_k is 9: it must be between 1 and the number of experts, 8"):
            autotune.learn(weights, [1], top_k=9)
        with pytest.raises(ConfigError, match=r"tokens is \[4, 0\]: each number must be at least 1"):
            autotune.learn(weights, [4, 0], top_k=2)


RUN = """
import sys, torch, moesaic
from moesaic import autotune
torch.set_num_threads(1)
torch.manual_seed(0)
layer = moesaic.MoE(moesaic.MoEConfig(d_model=64, d_ff=96, num_experts=8, top_k=2))
if sys.argv[2] == "learn":
    autotune.learn(layer.experts.weights(), [1, 7, 40, 300], top_k=2)
with torch.no_grad(), autotune.record() as log:
    torch.save([layer(torch.randn(tokens, 64)) for _ in range(100) for tokens in (1, 7, 40, 300)], sys.argv[1])
assert len(log) == 400
"""


def test_two_histories_give_equal_numbers(tmp_path: Path) -> None:
    outputs = []
    for number, history in enumerate(["learn", "nothing"]):
        file = tmp_path / f"{number}.pt"
        environment = {**os.environ, "MOESAIC_TUNE": "on", "MOESAIC_CACHE": str(tmp_path / str(number))}
        subprocess.run([sys.executable, "-c", RUN, str(file), history], env=environment, cwd=ROOT, check=True)
        outputs.append(torch.load(file))
        assert list((tmp_path / str(number) / "tuner").glob("*.json"))  # written at the end
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_reference_is_never_explored_by_accident() -> None:
    """What the prior calls hopeless stays unexplored on real calls, however many there are."""
    model = MoE(MoEConfig(d_model=32, d_ff=32, num_experts=64, top_k=8))
    with autotune.use_tuning("on"), torch.no_grad(), autotune.record() as log:
        for _ in range(50):
            model(torch.randn(16, 32))
    if BACKENDS.get("native").missing() is None:
        assert {choice.backend for choice in log} == {"native"}
