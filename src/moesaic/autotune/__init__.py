"""HOW: ``use_backend("auto")`` chooses by timings of real calls, by those that earlier processes left, and by a prior.

Importing this makes ``"auto"`` tuned; the layer and the transformers floor import it.
"""

from __future__ import annotations

__all__: list[str] = []
# explain() -> list[Choice]; statistics() -> Statistics; learn(weights, tokens, top_k, *, grad=False) -> list[Choice]
