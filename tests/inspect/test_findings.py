"""The sentences: what they say is in the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.inspect.traces import made_up_trace

from moesaic.inspect import LayerTrace, ModelFacts, Passage, RoutingTrace, analyze
from moesaic.inspect.findings import Finding, find, percent, visible


def told(trace: RoutingTrace) -> dict[str, Finding]:
    return {finding.title: finding for finding in find(analyze(trace))}


@pytest.fixture
def known() -> RoutingTrace:
    """800 tokens, half code and half prose; two layers of four experts, one slot a token.

    Layer 3: code goes to expert 1, prose to expert 2, but every tenth token to expert 0. Layer 5: token ids 0 to 3 go
    to the expert of that number.
    """
    n = 800
    domain = np.repeat([0, 1], n // 2)
    tokens = np.arange(n) % 4
    first = np.where(np.arange(n) % 10 == 0, 0, domain + 1)

    def layer(number: int, experts: np.ndarray, entropy: float) -> LayerTrace:  # type: ignore[type-arg]
        ids = experts.astype(np.int64)[:, None]
        return LayerTrace(f"layers.{number}", number, 4, ids, np.ones((n, 1)), np.full(n, entropy), "scores")

    words = ["ab", " cd", "\n", "  "]
    text = "".join(words[t] for t in tokens[: n // 2])
    lengths = np.array([len(words[t]) for t in tokens])
    ends = np.concatenate([lengths[: n // 2].cumsum()] * 2)
    return RoutingTrace(
        ModelFacts("known", "Known", 6, 10, 5),
        [Passage("code", "c", text, 0, n // 2), Passage("prose", "p", text, n // 2, n)],
        tokens.astype(np.int64),
        np.stack([ends - lengths, ends], axis=1),
        dict(enumerate(words)),
        [layer(3, first, 0.25), layer(5, tokens, 0.75)],
    )


def test_what_a_cache_could_hold(known: RoutingTrace) -> None:
    finding = told(known)["Experts in a cache"]
    caches = analyze(known)["locality"]["caches"]
    assert f"at best {percent(caches['1'])} of what the next ones take" in finding.text
    assert f"twice that size {percent(caches['2'])}, of four times 100\u00a0%" in finding.text
    assert "with an F1 score of 0." in finding.text
    for layer in known.layers:
        layer.expert_ids[:] = 1
    assert "Experts in a cache" not in told(known)  # always the same: nothing to hold back


def test_experts_that_are_alike(known: RoutingTrace) -> None:
    assert "Two of a kind" not in told(known)
    known.layers[1].similarity = {"outputs": np.array([[1, 0.1, 0, 0], [0.1, 1, 0, 0.9], [0, 0, 1, 0], [0, 0.9, 0, 1]])}
    finding = told(known)["Two of a kind"]
    assert finding.text.startswith("Experts 1 and 3 in layer 5 answer the same tokens alike")
    assert "0.90" in finding.text
    assert "0.17 in the mean" in finding.text
    assert (finding.layer, finding.expert) == (1, 1)


def test_the_sharpest_domain(known: RoutingTrace) -> None:
    finding = told(known)["A taste for one domain"]
    assert finding.text == "Expert 1 in layer 3 takes 90\u00a0% of the code tokens and 0\u00a0% of prose."
    assert (finding.layer, finding.expert) == (0, 1)  # the position among the MoE layers


def test_balance(known: RoutingTrace) -> None:
    # 360 of 800 tokens with four experts: 1.8 even shares; expert 3 of layer 3 gets nothing.
    assert told(known)["Balance"].text == (
        "The busiest expert, number 1 in layer 3, does 1.8 times an even share. 1 of 8 experts got no token at all."
    )


def test_certainty(known: RoutingTrace) -> None:
    assert told(known)["Certainty"].text == (
        "The router is surest in layer 3: 25\u00a0% of the largest entropy. "
        "It is least sure in layer 5, with 75\u00a0%."
    )
    for layer in known.layers:
        layer.entropy_source = "weights"
    assert "25\u00a0% of the largest entropy of the chosen weights." in told(known)["Certainty"].text
    known.layers[0].entropy_source = "scores"
    assert "Certainty" not in told(known)  # two kinds of entropy cannot be compared


def test_token_or_context(known: RoutingTrace) -> None:
    # In layer 5 the token is all that counts; in layer 3 a token id meets at most 200 · 0.9 · 1/2 times one expert.
    text = told(known)["Token or context"].text
    assert text.startswith(
        "In layer 5, a common token goes to its usual expert 100\u00a0% of the time, by chance 25\u00a0%; in layer 3, "
    )


def report_with(known: RoutingTrace, *consistencies: tuple[float, float]) -> dict[str, Any]:
    report = analyze(known)
    for layer, (share, chance) in zip(report["layers"], consistencies, strict=True):
        layer["token_consistency"] = {"share": share, "chance": chance, "tokens": 500}
    return report


def context(report: dict[str, Any]) -> str:
    return next((finding.text for finding in find(report) if finding.title == "Token or context"), "")


def test_layers_are_compared_beyond_chance(known: RoutingTrace) -> None:
    # Layer 3 has the larger share, but only since one of its experts gets nearly everything.
    text = context(report_with(known, (0.9, 0.85), (0.8, 0.3)))
    assert text.startswith("In layer 5, a common token goes to its usual expert 80\u00a0% of the time")
    assert "in layer 3, where the token alone counts for less, 90\u00a0%, by chance 85\u00a0%." in text


def test_no_difference_is_made_of_noise(known: RoutingTrace) -> None:
    assert "layer 3" not in context(report_with(known, (0.87, 0.5), (0.88, 0.5)))
    assert context(report_with(known, (0.5, 0.49), (0.52, 0.5))) == ""
    for layer, entropy in zip(known.layers, (0.996, 0.999), strict=True):
        layer.entropy[:] = entropy
    assert "Certainty" not in told(known)


def test_a_specialist_needs_several_tokens_of_its_own(known: RoutingTrace) -> None:
    assert "A specialist for a few tokens" not in told(known)
    assert "A specialist for a few tokens" in told(made_up_trace())


def test_the_beaten_path() -> None:
    trace = made_up_trace([(4, 1), (4, 1)])
    trace.layers[1].expert_ids = (trace.layers[0].expert_ids + 1) % 4
    finding = told(trace)["A beaten path"]
    assert finding.text.startswith("100\u00a0% of the tokens of expert ")
    assert finding.layer == 1
    words = finding.text.split()
    before, after = (int(words[i + 1]) for i, word in enumerate(words) if word == "expert")
    assert after == (before + 1) % 4 == finding.expert


def test_a_model_with_one_layer_and_one_domain_has_something_to_say() -> None:
    found = told(made_up_trace([(4, 1)], ["only"], passages_per_domain=1))
    assert "Balance" in found
    assert not {"A taste for one domain", "A beaten path"} & set(found)


def test_signs() -> None:
    assert [percent(x) for x in (0, 0.0123, 0.0994, 0.0996, 0.41, 1)] == [
        f"{n}\u00a0%" for n in ("0", "1.2", "9.9", "10", "41", "100")
    ]
    assert visible(" a\n\n") == "‘␣a↵↵’"
    assert visible(" " * 7 + "\t") == "‘␣×7⇥’"
