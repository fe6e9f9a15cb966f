"""What stands out in a report, in plain words: the sentences at the top of the page."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from moesaic.inspect.kinds import KINDS
from moesaic.inspect.spending import common_kinds

SMALL = 0.25
"""Of an even share: an expert with less load than this says little, whatever its few tokens are."""
ALIKE = 0.5
"""Cosine of the outputs of two experts from which on they are called alike."""
CLEAR = 0.05
"""Two shares that differ by less are called neither different nor more and less."""


@dataclass(frozen=True)
class Finding:
    """One sentence or two under a short title; ``layer`` (position among the MoE layers) and ``expert`` say whom it is
    about, where it is about one expert."""

    title: str
    text: str
    layer: int | None = None
    expert: int | None = None


def find(report: dict[str, Any]) -> list[Finding]:
    """The findings of a report of :func:`moesaic.inspect.analyze`, those that have something to say.

    Every number in them is a number of the report, rounded.
    """
    candidates = [
        spending_finding(report),
        _domains(report),
        _meaning(report),
        _context(report),
        _balance(report),
        _certainty(report),
        _paths(report),
        _offloading(report),
        _likeness(report),
    ]
    return [finding for finding in candidates if finding]


def spending_finding(report: dict[str, Any]) -> Finding | None:
    """Where a router whose number of experts varies spends most: by kind of token, and by layer."""
    spent = report["experts_per_token"]
    if not spent["varies"]:
        return None
    text = f"A token takes {spent['mean']:.1f} ± {spent['spread']:.1f} experts a layer"
    text += f" and {spent['free']:.1f} that compute nothing. " if spent["free"] else ". "
    extremes = most_and_least(spent, report["data"]["tokens"])
    if extremes:
        (most, much), (least, little) = extremes
        text += f"The model spends most on {KINDS[most]} ({much:.1f}) and least on {KINDS[least]} ({little:.1f})."
    else:
        text += "It spends alike on every kind of token."
    layers = sorted(report["layers"], key=lambda layer: layer["experts_per_token"]["mean"])
    few, many = (layer["experts_per_token"]["mean"] for layer in (layers[0], layers[-1]))
    if many - few >= CLEAR * max(1, many):
        text += (
            f" Of the layers, number {layers[-1]['label']} spends most ({many:.1f}) and number {layers[0]['label']} "
            f"least ({few:.1f})."
        )
    return Finding("Where it spends", text)


def most_and_least(spent: dict[str, Any], num_tokens: int) -> tuple[tuple[str, float], tuple[str, float]] | None:
    """(kind, mean) of the kinds that most and fewest experts are spent on; None where they do not clearly differ.

    Kinds that are not common are passed over. The difference must be ``CLEAR`` of the mean, and twice its standard
    error.
    """
    kinds = common_kinds(spent, num_tokens)
    if len(kinds) < 2:
        return None
    ranked = sorted(kinds, key=lambda kind: kinds[kind]["mean"])
    low, high = kinds[ranked[0]], kinds[ranked[-1]]
    error = math.sqrt(sum(of["spread"] ** 2 / of["tokens"] for of in (low, high)))
    if high["mean"] - low["mean"] < max(CLEAR * spent["mean"], 2 * error):
        return None
    return (ranked[-1], high["mean"]), (ranked[0], low["mean"])


def _domains(report: dict[str, Any]) -> Finding | None:
    """The expert with the largest difference between the shares of tokens that it takes of two domains."""
    best: tuple[float, int, int, str, str] | None = None
    for position, layer in enumerate(report["layers"]):
        shares = layer["token_share_by_domain"]
        for expert in range(layer["experts"]):
            ranked = sorted(shares, key=lambda name: shares[name][expert])
            low, high = ranked[0], ranked[-1]
            difference = shares[high][expert] - shares[low][expert]
            if best is None or difference > best[0]:
                best = (difference, position, expert, high, low)
    if best is None or best[0] < CLEAR:
        return None
    _, position, expert, high, low = best
    layer = report["layers"][position]
    shares = layer["token_share_by_domain"]
    return Finding(
        "A taste for one domain",
        f"Expert {expert} in layer {layer['label']} takes {percent(shares[high][expert])} of the {high} tokens and "
        f"{percent(shares[low][expert])} of {low}.",
        position,
        expert,
    )


def _meaning(report: dict[str, Any]) -> Finding | None:
    """The expert with the most of its slots in a few tokens that are rare elsewhere."""
    best: tuple[float, int, int] | None = None
    for position, layer in enumerate(report["layers"]):
        slots = sum(layer["token_share"]) * report["data"]["tokens"]
        for expert, tops in enumerate(layer["top_tokens"]):
            own = layer["load"][expert] * slots
            distinct = _distinct(tops)
            if len(distinct) < 3 or layer["load"][expert] * layer["experts"] < SMALL:
                continue
            concentration = sum(top["count"] for top in distinct) / own
            if best is None or concentration > best[0]:
                best = (concentration, position, expert)
    if best is None or best[0] < CLEAR:
        return None
    share, position, expert = best
    layer = report["layers"][position]
    names = ", ".join(visible(top["text"]) for top in _distinct(layer["top_tokens"][expert]))
    return Finding(
        "A specialist for a few tokens",
        f"{percent(share)} of what expert {expert} in layer {layer['label']} reads is {names}.",
        position,
        expert,
    )


def _distinct(tops: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first few tokens that are twice as common here as elsewhere, and that a reader can see."""
    return [top for top in tops if top["lift"] >= 2 and not top["text"].isspace()][:6]


def _context(report: dict[str, Any]) -> Finding | None:
    """Where the token alone decides most beyond chance, and where it does so clearly less."""
    known = [layer for layer in report["layers"] if layer["token_consistency"]["tokens"] >= 200]
    if not known:
        return None
    most, least = max(known, key=_beyond_chance), min(known, key=_beyond_chance)
    if _beyond_chance(most) < CLEAR:
        return None
    share, chance = most["token_consistency"]["share"], most["token_consistency"]["chance"]
    text = (
        f"In layer {most['label']}, a common token goes to its usual expert {percent(share)} of the time, by chance "
        f"{percent(chance)}"
    )
    if _beyond_chance(most) - _beyond_chance(least) >= CLEAR:
        share, chance = least["token_consistency"]["share"], least["token_consistency"]["chance"]
        text += (
            f"; in layer {least['label']}, where the token alone counts for less, {percent(share)}, by chance "
            f"{percent(chance)}"
        )
    return Finding("Token or context", text + ".")


def _beyond_chance(layer: dict[str, Any]) -> float:
    consistency = layer["token_consistency"]
    return float(consistency["share"] - consistency["chance"])


def _balance(report: dict[str, Any]) -> Finding:
    layers = report["layers"]
    worst = max(range(len(layers)), key=lambda i: layers[i]["imbalance"])
    layer = layers[worst]
    expert = layer["load"].index(max(layer["load"]))
    idle = sum(len(layer["idle_experts"]) for layer in layers)
    total = sum(layer["experts"] for layer in layers)
    idle_text = f"{idle} of {total} experts got no token at all." if idle else f"None of the {total} experts is idle."
    return Finding(
        "Balance",
        f"The busiest expert, number {expert} in layer {layer['label']}, does {layer['imbalance']:.1f} times an even "
        f"share. {idle_text}",
        worst,
        expert,
    )


def _certainty(report: dict[str, Any]) -> Finding | None:
    """The layers with the least and the largest entropy, where they differ."""
    sources = {layer["entropy_source"] for layer in report["layers"]}
    if len(sources) > 1:
        return None
    of_what = " of the chosen weights" if sources == {"weights"} else ""
    surest = min(report["layers"], key=lambda layer: layer["entropy"])
    least = max(report["layers"], key=lambda layer: layer["entropy"])
    if least["entropy"] - surest["entropy"] < CLEAR:
        return None
    return Finding(
        "Certainty",
        f"The router is surest in layer {surest['label']}: {percent(surest['entropy'])} of the largest "
        f"entropy{of_what}. It is least sure in layer {least['label']}, with {percent(least['entropy'])}.",
    )


def _paths(report: dict[str, Any]) -> Finding | None:
    """The commonest step from an expert that is not too small to one in the next layer, against chance."""
    best: tuple[float, float, int, int, int] | None = None
    for position, transition in enumerate(report["transitions"]):
        source, target = report["layers"][position : position + 2]
        for i, row in enumerate(transition["counts"]):
            tokens = source["token_share"][i] * report["data"]["tokens"]
            if source["load"][i] * source["experts"] < SMALL:
                continue
            j = row.index(max(row))
            rate, chance = row[j] / tokens, target["token_share"][j]
            if rate >= max(1.5 * chance, chance + CLEAR) and (best is None or rate > best[0]):
                best = (rate, chance, position, i, j)
    if best is None:
        return None
    rate, chance, position, i, j = best
    source, target = report["layers"][position : position + 2]
    return Finding(
        "A beaten path",
        f"{percent(rate)} of the tokens of expert {i} in layer {source['label']} go on to expert {j} in layer "
        f"{target['label']}; of all tokens it is {percent(chance)}.",
        position + 1,
        j,
    )


def _offloading(report: dict[str, Any]) -> Finding | None:
    """What a cache of experts could hope for, where it could hold back some."""
    caches = report["locality"]["caches"]
    if not caches["1"] or caches["1"] > 1 - CLEAR:
        return None
    f1 = report["locality"]["segments"]["16"]["performance"]
    fixed = (
        f" A fixed choice for 16 tokens in a row would meet the router's with an F1 score of {f1:.2f} at best."
        if f1
        else ""
    )
    return Finding(
        "Experts in a cache",
        f"A cache with room for the experts of one token has at best {percent(caches['1'])} of what the next ones "
        f"take, one of twice that size {percent(caches['2'])}, of four times {percent(caches['4'])}.{fixed}",
    )


def _likeness(report: dict[str, Any]) -> Finding | None:
    """The two experts of one layer that make the most similar thing of the same tokens, where they are alike."""
    best: tuple[float, int, int, int] | None = None
    for position, layer in enumerate(report["layers"]):
        for expert, nearest in enumerate(layer["similarity"].get("outputs", {}).get("nearest", [])):
            if best is None or nearest["cosine"] > best[0]:
                best = (nearest["cosine"], position, expert, nearest["expert"])
    if best is None or best[0] < ALIKE:
        return None
    cosine, position, expert, other = best
    layer = report["layers"][position]
    return Finding(
        "Two of a kind",
        f"Experts {expert} and {other} in layer {layer['label']} answer the same tokens alike: the cosine of their "
        f"outputs is {cosine:.2f}, that of two experts there {layer['similarity']['outputs']['mean']:.2f} in the mean.",
        position,
        expert,
    )


def percent(fraction: float) -> str:
    """``0.413`` as ``41 %`` (with a space that does not break); below 10 % with one decimal where it is not round."""
    value = 100 * fraction
    digits = 0 if value >= 9.95 or value == 0 else 1
    return f"{value:.{digits}f}\u00a0%"


def visible(token: str) -> str:
    """A token as a reader can see it: quoted, white space shown by signs, long runs of it counted."""
    shown = token.translate(_SIGNS)
    return f"‘{_RUN.sub(lambda run: f'{run[1]}×{len(run[0])}', shown)}’"


_SIGNS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍", " ": "␣"})
_RUN = re.compile(r"([↵⇥␣])\1{2,}")
