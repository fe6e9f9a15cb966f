"""Keys are read and compared; rates are of the last seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.errors import UsageError
from moesaic.serve.server.settings import KEYS_VARIABLE, ApiKeys, read_keys
from moesaic.serve.server.stats import RateWindow


def test_keys_of_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst  # of anna\n\nsecond\n")
    keys = read_keys(file, {KEYS_VARIABLE: "third,fourth fifth"})
    for key in ("first", "second", "third", "fourth", "fifth"):
        assert keys.admit(f"Bearer {key}".encode())
    assert keys.admit(b"bearer  first ")
    for header in (
        b"Bearer",
        b"Bearer ",
        b"Bearer ours",
        b"first",
        b"Basic first",
        b"Bearer first second",
        None,
        b"\xff",
    ):
        assert not keys.admit(header)


def test_without_keys_everybody_is_let_in() -> None:
    assert not read_keys(None, {})
    assert ApiKeys().admit(None)


@pytest.mark.parametrize(
    ("content", "environment", "part"),
    [
        (b"# nothing\n", {}, "no API key in"),
        (b"a key\n", {}, "a space"),
        ("schlüssel\n".encode(), {}, "printable ASCII"),
        (b"\xff\n", {}, "no text"),
        (b"good\n", {KEYS_VARIABLE: " , "}, "is set, but"),
    ],
)
def test_keys_that_cannot_be(tmp_path: Path, content: bytes, environment: dict[str, str], part: str) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(UsageError, match=part) as caught:
        read_keys(tmp_path / "keys", environment)
    assert "schl" not in str(caught.value)  # a key does not belong into a message


def test_rates_are_of_the_last_seconds() -> None:
    window = RateWindow(100.0)
    assert window.rates(100.0).generated == 0
    window.record(101.0, 10, 100)
    assert window.rates(102.0).generated == 50
    window.record(104.0, 10, 200)
    assert window.rates(105.0).generated == 40
    assert window.rates(106.5).generated == 20  # the first 100 are more than 5 seconds old
    assert window.rates(110.0).generated == 0
    window.record(111.0, 60, 200)
    assert (window.rates(112.0).prompt, window.rates(112.0).generated) == (10, 0)
