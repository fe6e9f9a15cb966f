"""What the routers of a model do with a text: traces, metrics, and a report to look at.

:func:`collect` runs text through a model and gives a :class:`RoutingTrace`; :func:`analyze` turns it into numbers, and
:func:`write_report` into a page.
"""

from moesaic.inspect.analysis import analyze
from moesaic.inspect.collect import collect
from moesaic.inspect.passages import read_documents
from moesaic.inspect.report import check_out, write_report
from moesaic.inspect.trace import LayerTrace, ModelFacts, Passage, RoutingTrace

__all__ = [
    "LayerTrace",
    "ModelFacts",
    "Passage",
    "RoutingTrace",
    "analyze",
    "check_out",
    "collect",
    "read_documents",
    "write_report",
]
