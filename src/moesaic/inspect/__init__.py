"""What the routers of a model do with a text: traces, metrics, and a report to look at.

:func:`collect` runs text through a model and gives a :class:`RoutingTrace`; :func:`analyze` turns it into numbers, and
:func:`write_report` into a page. :func:`inspect_folder` does all of it for a model on disk.
"""

from moesaic.inspect.analysis import analyze
from moesaic.inspect.folder import Inspection, inspect_folder
from moesaic.inspect.passages import read_documents
from moesaic.inspect.report import check_out, write_report
from moesaic.inspect.spending import spending_table
from moesaic.inspect.trace import LayerTrace, ModelFacts, Passage, RoutingTrace
from moesaic.inspect.tracing import collect

__all__ = [
    "Inspection",
    "LayerTrace",
    "ModelFacts",
    "Passage",
    "RoutingTrace",
    "analyze",
    "check_out",
    "collect",
    "inspect_folder",
    "read_documents",
    "spending_table",
    "write_report",
]
