"""The pictures: nothing in them is cut off."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tests.inspect.traces import made_up_trace

from moesaic.inspect import analyze, figures


def cut_off(figure: Figure) -> list[str]:
    """The axis labels that reach over the edge of the picture."""
    FigureCanvasAgg(figure).draw()
    labels = [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label, axes.title)]
    edge = figure.bbox
    boxes = [(label.get_text(), label.get_window_extent()) for label in labels if label.get_text()]
    return [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > edge.x1 or box.y1 > edge.y1]


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 30])
def test_labels_fit(layers: int) -> None:
    report = analyze(made_up_trace([(8, 2)] * layers))
    assert cut_off(figures._load(report)) == []
    assert cut_off(figures._preference(report)) == []
    assert cut_off(figures._layers(report)) == []
    if layers > 1:
        assert cut_off(figures._transitions(report)) == []
