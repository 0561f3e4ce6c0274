# SPDX-License-Identifier: Apache-2.0
"""Labels at the ends of curves in the documents' figures."""

import itertools

import curves
import matplotlib
import pytest
from matplotlib.figure import Figure

from ems_vllm.eval.report.style import Style

matplotlib.use("Agg")


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.0, 30.0], [0.0, 30.0]),
        ([10.0, 10.0], [5.0, 15.0]),
        ([10.0, 12.0, 11.0], [1.0, 21.0, 11.0]),
        # Two that move apart push a third, which keeps its place in the order.
        ([0.0, 0.0, 8.0], [-7.0 - 1 / 3, 2.0 + 2 / 3, 12.0 + 2 / 3]),
    ],
)
def test_labels_are_spread_as_little_as_need_be(heights, expected):
    assert curves.spread(heights, 10.0) == pytest.approx(expected)


def test_labels_of_curves_that_end_together_do_not_overlap():
    figure = Figure()
    axes = figure.subplots()
    ends = [1.0, 1.01, 1.02, 5.0]
    lines = [
        curves.Curve(str(end), Style(1, "o", "solid", False), [0.1, 0.5], [0, end]) for end in ends
    ]
    curves.draw_curves(axes, lines)
    axes.set_xlim(0, 1)
    curves.label_ends(axes, lines, "right")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [str(end) for end in ends]
    for below, above in itertools.pairwise(boxes):
        assert below.y1 <= above.y0


def test_more_curves_than_can_be_told_apart_are_refused():
    line = curves.Curve("a", Style(1, "o", "solid", False), [0.1], [1.0])
    with pytest.raises(ValueError, match="at most 6"):
        curves.draw_curves(Figure().subplots(), [line] * 7)
