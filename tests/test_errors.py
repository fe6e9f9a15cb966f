"""The family of exceptions, and names that are nearly right."""

from __future__ import annotations

import pytest

from moesaic import errors
from moesaic.errors import MoesaicError, did_you_mean
from moesaic.registry import Registry

FAMILY = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MoesaicError)]


def test_exit_codes() -> None:
    codes = {c.__name__: c.exit_code for c in FAMILY}
    assert codes == {
        "MoesaicError": 1,
        "UsageError": 2,
        "ConfigError": 2,
        "DataError": 2,
        "CheckpointError": 2,
        "UnsupportedError": 2,
        "MissingDependencyError": 2,
        "TrainingError": 1,
        "Told": 1,  # and what the process that tells exits with
        "ParallelError": 1,
        "Interrupted": 130,
    }


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("DataError", ValueError),
        ("CheckpointError", ValueError),
        ("UnsupportedError", NotImplementedError),
        ("MissingDependencyError", ImportError),
        ("TrainingError", RuntimeError),
        ("ParallelError", RuntimeError),
    ],
)
def test_each_can_be_caught_as_the_builtin_that_it_is(name: str, builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="what was wrong"):
        raise getattr(errors, name)("what was wrong")


def test_did_you_mean() -> None:
    assert did_you_mean("lop", ["grouped", "loop"]) == "did you mean 'loop'? allowed: grouped, loop"
    assert did_you_mean("zzz", ["grouped", "loop"]) == "allowed: grouped, loop"
    assert did_you_mean("zzz", []) == "allowed: none"


class TestRegistry:
    def registry(self) -> Registry[int]:
        registry: Registry[int] = Registry("number")
        registry.register("two")(2)
        registry.register("one")(1)
        return registry

    def test_names_are_sorted(self) -> None:
        assert self.registry().names() == list(self.registry()) == ["one", "two"]
        assert "one" in self.registry()
        assert "three" not in self.registry()

    def test_get(self) -> None:
        assert self.registry().get("two") == 2
        with pytest.raises(errors.ConfigError, match=r"unknown number 'tow': did you mean 'two'\? allowed: one, two"):
            self.registry().get("tow")

    def test_a_name_is_taken_once(self) -> None:
        with pytest.raises(errors.ConfigError, match="the number 'one' is registered twice"):
            self.registry().register("one")(3)
