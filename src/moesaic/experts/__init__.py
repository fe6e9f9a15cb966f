"""MATH: the weights of the experts and the backends that compute them.

N routed rows · D model width · F expert hidden width · G = 2F where a gate is fused, else F · E experts. A backend is
one file here that registers itself; the import below is its one registration.
"""

from __future__ import annotations

from moesaic.experts import grouped, loop, native, triton  # noqa: F401  (each registers its backend)
from moesaic.experts.activations import ACTIVATIONS, Activation
from moesaic.experts.backend import (
    BACKENDS,
    Backend,
    available,
    compute,
    compute_and_tell,
    current_backend,
    status,
    use_backend,
)
from moesaic.experts.bank import ExpertBank
from moesaic.experts.choice import Choice, Estimate
from moesaic.experts.quantized import QuantFormat, QuantizedMatrix
from moesaic.experts.shared import SharedExperts
from moesaic.experts.weights import ExpertWeights

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Activation",
    "Backend",
    "Choice",
    "Estimate",
    "ExpertBank",
    "ExpertWeights",
    "QuantFormat",
    "QuantizedMatrix",
    "SharedExperts",
    "available",
    "compute",
    "compute_and_tell",
    "current_backend",
    "status",
    "use_backend",
]
