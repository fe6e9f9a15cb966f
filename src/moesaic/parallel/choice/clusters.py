"""Clusters on paper: links and devices by published figures, or by a user's own.

The figures are what manufacturers publish, peaks that nobody reaches, except for latencies, which are those of NCCL's
own cost model (nccl, src/graph/tuning.cc: baseLat and hwLat of a ring with the low-latency protocol).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moesaic.errors import ConfigError, did_you_mean
from moesaic.parallel.choice.links import Link, Links

# Seconds of an exchange beside its messages: NCCL's base latency.
_START = 6.6e-6


@dataclass(frozen=True)
class Wire:
    """A kind of link as one rank has it.

    Attributes:
        gbytes: 1e9 bytes per second one way.
        micros: 1e-6 seconds a message.
        source: of the figures.
    """

    gbytes: float
    micros: float
    source: str


@dataclass(frozen=True)
class Device:
    """What a rank computes on: dense bfloat16 TFLOP/s at most, and 1e9 bytes per second of its memory."""

    tflops: float
    gbytes: float
    source: str


WIRES: dict[str, Wire] = {
    "nvlink3": Wire(300.0, 0.6, "NVIDIA A100 data sheet: 600 GB/s both ways together"),
    "nvlink4": Wire(450.0, 0.6, "NVIDIA H100 data sheet: 900 GB/s both ways together"),
    "hdr": Wire(25.0, 2.7, "InfiniBand HDR, 200 Gbit/s a GPU: Azure ND A100 v4, on which Tutel was measured"),
    "ndr": Wire(50.0, 2.7, "InfiniBand NDR, 400 Gbit/s a GPU: Azure ND H100 v5"),
    "ethernet100": Wire(12.5, 2.7, "IEEE 802.3, 100 Gbit/s a rank"),
    "ethernet25": Wire(3.125, 2.7, "IEEE 802.3, 25 Gbit/s a rank"),
    "ethernet10": Wire(1.25, 2.7, "IEEE 802.3, 10 Gbit/s a rank"),
}
DEVICES: dict[str, Device] = {
    "a100": Device(312.0, 2039.0, "NVIDIA A100 80 GB SXM data sheet"),
    "h100": Device(989.0, 3350.0, "NVIDIA H100 SXM data sheet, without sparsity"),
}


def wire(text: str) -> Wire:
    """A preset's name, or figures of one's own such as ``25GB/s,3us`` or ``200Gbit/s,3us``.

    Raises:
        ConfigError: for anything else.
    """
    if text in WIRES:
        return WIRES[text]
    found = re.fullmatch(r"([\d.]+)\s*(GB/s|(?i:gbit/s|gbps))\s*(?:,\s*([\d.]+)\s*us)?", text.strip())
    if not found or not (giga := _number(found[1])):
        raise ConfigError(
            f"unknown link {text!r}: {did_you_mean(text, WIRES)}, or figures such as 25GB/s,3us or 200Gbit/s,3us"
        )
    if found[3] is None:
        raise ConfigError(f"link {text!r}: the latency is missing, as in {text.strip()},3us")
    return Wire(giga if found[2] == "GB/s" else giga / 8, _number(found[3]), "given")


def device(text: str) -> Device:
    """A preset's name, or figures of one's own such as ``312TFLOP/s,2039GB/s``.

    Raises:
        ConfigError: for anything else.
    """
    if text in DEVICES:
        return DEVICES[text]
    found = re.fullmatch(r"([\d.]+)\s*TFLOP/s,\s*([\d.]+)\s*GB/s", text)
    if not found or not (_number(found[1]) and _number(found[2])):
        raise ConfigError(
            f"unknown device {text!r}: {did_you_mean(text, DEVICES)}, or figures such as 312TFLOP/s,2039GB/s"
        )
    return Device(_number(found[1]), _number(found[2]), "given")


def links(inside: Wire, between: Wire) -> Links:
    """The links of a cluster in which every rank has its own."""
    near, far = (Link(each.micros * 1e-6, 1e-9 / each.gbytes) for each in (inside, between))
    return Links(near, far, _START)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
