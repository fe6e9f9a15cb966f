"""Who runs against whom: names, why one is absent, and how one is made."""

from __future__ import annotations

from moesaic.bench import llama, vllm
from moesaic.bench.contenders import FROZEN, Contender, ModuleContender, TrainingContender
from moesaic.bench.workload import Bank, Workload
from moesaic.errors import ConfigError, UnsupportedError, did_you_mean
from moesaic.experts import status, use_backend
from moesaic.experts.backend import AUTO
from moesaic.experts.quantized import FORMATS

TRANSFORMERS = ("grouped_mm", "eager", "batched_mm")
PEERS = {"vllm": vllm.missing, "llama.cpp": llama.missing}
OTHERS = (*TRANSFORMERS, *PEERS)
_BY_DEFAULT = ("grouped_mm", "eager", *PEERS)


def our_backends(names: list[str] | None) -> list[str]:
    """The backends to measure: those named, or all that run here, ``"auto"`` last.

    Args:
        names: backends, each with ``"+int8"`` or ``"+int4"`` where its weights are to be quantized, or ``"+frozen"``.

    Raises:
        ConfigError: for an unknown name, or a backend that cannot run here (with the reason).
    """
    if names is None:
        return [*(name for name, reason in status().items() if reason is None), AUTO]
    for name in names:
        backend, plus, variant = name.partition("+")
        with use_backend(backend):
            pass
        if plus and variant not in (*FORMATS, FROZEN):
            raise ConfigError(f"unknown variant {variant!r} of {backend}: {did_you_mean(variant, (*FORMATS, FROZEN))}")
    return names


def others(names: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """The other contenders to measure: those named, or the usual ones that are here; and why peers are absent.

    Raises:
        ConfigError: for an unknown name.
        UnsupportedError: for a peer that was named and is not here.
    """
    if names is None:
        absent = {name: reason for name, missing in PEERS.items() if (reason := missing())}
        return [name for name in _BY_DEFAULT if name not in absent], absent
    for name in names:
        if name not in OTHERS:
            raise ConfigError(f"unknown contender {name!r}: {did_you_mean(name, OTHERS)}")
        if name in PEERS and (reason := PEERS[name]()):
            raise UnsupportedError(f"{name} cannot take part: {reason}")
    return names, {}


def make_other(name: str, work: Workload, banks: list[Bank]) -> Contender:
    """The contender of ``OTHERS`` called ``name``.

    Raises:
        UnsupportedError: where it does not compute in this dtype, or no gradients.
    """
    if name in TRANSFORMERS:
        return (TrainingContender if work.backward else ModuleContender)(work.shape, banks, name)
    if work.backward:
        raise UnsupportedError(f"{name} computes no gradients")
    return vllm.VllmContender(banks) if name == "vllm" else llama.LlamaContender(work)
