"""What is not let in, and what happens to requests that cannot end well: around an engine that a test holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.serve.server.running import FakeEngine, Running, fake, serving

PROMPT = {"model": "base", "prompt": "hi", "max_tokens": 3}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Running]:
    with serving(fake(engine)) as running:
        yield running


def test_a_completion_and_its_stream_say_the_same(server: Running) -> None:
    client = server.client()
    whole = client.completions.create(model="base", prompt="hi", max_tokens=5)
    assert whole.choices[0].text == "aaaaa"
    assert whole.usage is not None and whole.usage.completion_tokens == 5
    pieces = client.completions.create(model="base", prompt="hi", max_tokens=5, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "aaaaa"
