"""A report's figures show what the lines of metrics.jsonl say."""

import numpy as np
import pytest

from fljax import report

TA, AA = "test accuracy (TA)", "attack success (AA)"


def _curves(figure):
  """The lines of a figure's only axes, by label: x and y."""
  (axes,) = figure.axes
  return {
    line.get_label(): (np.asarray(line.get_xdata()), line.get_ydata())
    for line in axes.lines
  }


def _lines(**places):
  ((key, values),) = places.items()
  return [
    {key: x, "test_accuracy": 0.9 - k / 100, "attack_success": 0.1 + k / 100}
    for k, x in enumerate(values)
  ]


@pytest.mark.parametrize(
  "draw, lines, phase, chosen",
  [
    (
      report.rounds_figure,
      _lines(round=[0, 1, 2, 3]),
      {"name": "fp+ft", "kept_round": 2},
      ("kept: round 2", 2),
    ),
    (
      report.pruning_figure,
      _lines(pruned_neurons=[0, 1, 2, 3]),
      {"name": "fp", "pruned_neurons": 3},
      ("chosen: 3", 3),
    ),
    (
      report.delta_figure,
      _lines(delta=[None, 4.0, 3.0, 2.0]),
      {"name": "all", "delta": 3.0},
      ("chosen: Δ = 3", 3),
    ),
    (
      report.delta_figure,
      _lines(delta=[None, 4.0, 3.0, 2.0]),
      {"name": "all", "delta": None},
      ("chosen: no change", 4.2),
    ),
  ],
  ids=["rounds", "pruning", "delta", "no change"],
)
def test_curves_and_marks_are_where_they_belong(draw, lines, phase, chosen):
  curves = _curves(draw(lines, phase))
  for label, first, step in ((TA, 90, -1), (AA, 10, 1)):
    x, y = curves[label]
    np.testing.assert_allclose(y, first + step * np.arange(4))
    if draw is report.delta_figure:
      np.testing.assert_allclose(x, [4.2, 4, 3, 2])
    else:
      np.testing.assert_allclose(x, np.arange(4))
  label, place = chosen
  np.testing.assert_allclose(curves[label][0], place)
