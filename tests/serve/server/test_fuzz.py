"""Bad requests, drawn from the server's own description of itself: whatever comes, the server does not fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.serve.server.conftest import SETTINGS, Folders
from tests.serve.server.running import Running, serving

from moesaic.serve.server.build import load

pytestmark = pytest.mark.slow

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
FEW = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def fuzzed(folders: Folders) -> Iterator[Running]:
    """A server that lets an adapter go and come, and gives a few tokens only: what is asked for is wild enough."""

    def build() -> Any:
        return load(folders.model, SETTINGS, adapters={"poet": folders.adapters / "poet"})

    with serving(build, adapter_folder=folders.adapters, max_tokens=6) as running:
        yield running
        # After all of it, it still works, and holds nothing back.
        two = {"model": "base", "prompt": "a", "max_tokens": 2, "ignore_eos": True}
        status, _, told = running.ask("POST", "/v1/completions", two)
        assert (status, told["usage"]["completion_tokens"]) == (200, 2)
        assert running.service.state == "ready"
        _, _, stats = running.ask("GET", "/stats")
        assert (stats["requests"]["running"], stats["requests"]["waiting"], stats["pages"]["used"]) == (0, 0, 0)


@pytest.fixture(scope="module")
def described(fuzzed: Running) -> Any:
    return schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        # Found by what follows.
        ({"regex": "a", "response_format": {"type": "json_object"}}, 400),
        ({"regex": "a", "grammar": 'start: "a"'}, 400),
        ({"repetition_penalty": 1e-300}, 400),  # is 0 in float32
        ({"repetition_penalty": 0.01, "max_tokens": 6}, 200),
        ({"repetition_penalty": 100, "max_tokens": 6}, 200),
        ({}, 200),  # a completion has 16 tokens by default, more than this server gives
        ({"max_tokens": None}, 200),
        ({"max_tokens": 16}, 400),
    ],
)
def test_found_before(fuzzed: Running, body: dict[str, Any], status: int) -> None:
    found, _, told = fuzzed.ask("POST", "/v1/completions", {"model": "base", "prompt": "a", **body})
    assert found == status, told
    assert status != 200 or told["usage"]["completion_tokens"] <= 6


OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters"),
    ("DELETE", "/v1/adapters/{name}"),
    ("GET", "/stats"),
    ("GET", "/metrics"),
    ("GET", "/health"),
    ("GET", "/ready"),
]


def test_all_operations_are_here(described: Any) -> None:
    told = [found.ok() for found in described.get_all_operations()]
    assert sorted((one.method.upper(), one.path) for one in told) == sorted(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_document_allows(described: Any, method: str, path: str) -> None:
    @given(described[path][method].as_strategy(), st.randoms(use_true_random=False))
    @FEW
    def ask(case: Any, dice: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            # Most would end at the name of the model, or at two fields that do not go together.
            free = sorted(set(case.body) - {"model", "prompt", "messages"})
            for name in dice.sample(free, max(0, len(free) - dice.randrange(4))):
                del case.body[name]
            if dice.random() < 0.9:
                case.body["model"] = dice.choice(["base", "poet"])
        response = case.call(timeout=60)
        seen[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    seen: Counter[int] = Counter()
    ask()
    # Otherwise nothing but the doors of these two would be tested.
    assert seen[200] or not path.endswith("completions")


@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if one[0] == "POST"])
def test_what_the_document_does_not_allow(described: Any, method: str, path: str) -> None:
    @given(described[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    @FEW
    def ask(case: Any) -> None:
        response = case.call(timeout=60)
        case.validate_response(response, checks=CHECKS)
        assert 400 <= response.status_code < 500

    ask()
