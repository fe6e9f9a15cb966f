"""A model that has been rerouted is served as it generates."""

from __future__ import annotations

from typing import Any

import pytest
from tests.serve.driving import GREEDY, PAGE_BYTES, PROMPTS, TOKENIZER, continued, finish, gathered
from tests.serve.tiny import tiny

import moesaic
from moesaic.serve.engine import Engine
from moesaic.serve.request import EngineSettings, Request


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("family", ["olmoe", "moesaic"])
@pytest.mark.parametrize(
    ("router", "options"),
    [("expert_skipping", {"top_k": 4, "ratio": 0.98}), ("hash", {}), (None, {"top_k": 1})],
    ids=str,
)
def test_served_as_it_generates(family: str, router: str | None, options: dict[str, Any], isolate: bool) -> None:
    model, plain = (tiny(family, experts_implementation=name) for name in ("moesaic", "eager"))
    settings = EngineSettings(kv_bytes=200 * PAGE_BYTES[family], token_budget=40, isolate=isolate)
    with moesaic.reroute(model, router, **options), moesaic.reroute(plain, router, **options):
        if family == "moesaic":
            plain.load_state_dict(model.state_dict())  # what a hash has drawn
        expected = [continued(plain, prompt, 24) for prompt in PROMPTS]
        engine = Engine(model, TOKENIZER, settings)
        for number, prompt in enumerate(PROMPTS):
            engine.add(Request(str(number), prompt, GREEDY))
        found = gathered(finish(engine))
    assert [found[str(number), 0].token_ids for number in range(len(PROMPTS))] == expected
