"""HOW: ``use_backend("auto")`` chooses by timings of real calls, by those that earlier processes left, and by a prior.

Importing this makes ``"auto"`` tuned; the layer and the transformers floor import it.
"""

from __future__ import annotations

from moesaic.autotune.process import explain, install, record, replay, statistics
from moesaic.autotune.setting import use_tuning
from moesaic.autotune.signature import Family, Signature
from moesaic.autotune.trial import learn
from moesaic.autotune.tuner import Statistics

install()

__all__ = [
    "Family",
    "Signature",
    "Statistics",
    "explain",
    "learn",
    "record",
    "replay",
    "statistics",
    "use_tuning",
]
