"""Where expert layers run: the layout of their weights over ranks, and the exchange of tokens and weights.

:func:`moesaic.parallelize` is the way in. One layout serves every strategy, so that a strategy is chosen for each step:
see :class:`Plan`.
"""

from moesaic.parallel import hierarchical  # noqa: F401  (registers itself)
from moesaic.parallel.choice.decisions import Decision, explain, record, replay
from moesaic.parallel.exchange import EXCHANGES, Exchange
from moesaic.parallel.experts import ParallelExperts
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.plan import Plan, Wish
from moesaic.parallel.schedule import Schedule
from moesaic.parallel.sent import traffic
from moesaic.parallel.setting import use_strategy
from moesaic.parallel.sharding import clip_gradients, gradient_norm
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import Workload

__all__ = [
    "EXCHANGES",
    "Decision",
    "Exchange",
    "ExpertLayout",
    "ParallelExperts",
    "Plan",
    "Schedule",
    "Topology",
    "Wish",
    "Workload",
    "clip_gradients",
    "explain",
    "gradient_norm",
    "record",
    "replay",
    "traffic",
    "use_strategy",
]
