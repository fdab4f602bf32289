import itertools

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from fljax import errors
from fljax.cleanse import selection

ACCURACIES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(accuracies=ACCURACIES, floor=st.floats(0, 1))
def test_the_failing_step_is_undone(accuracies, floor):
  """Everything up to the chosen step holds the floor; the next one fails."""
  chosen = selection.last_above(np.asarray(accuracies), floor)
  floor -= selection.TOLERANCE
  assert all(a >= floor for a in accuracies[1 : chosen + 1])
  if chosen + 1 < len(accuracies):
    assert accuracies[chosen + 1] < floor


@pytest.mark.parametrize(
  "accuracies, floor, chosen",
  [
    ([0.9, 0.9, 0.8, 0.9], 0.85, 1),  # A later recovery does not count.
    ([0.9, 0.8], 0.85, 0),
    ([0.9, 0.85], 0.85, 1),  # Reaching the floor exactly is allowed.
    ([0.9, 0.9, 0.9], 0.85, 2),
    ([0.9, float("nan"), 0.9], 0.85, 0),
    ([0.2], 0.85, 0),
    ([1.0, np.float32(0.9)], 0.9, 1),  # Rounding is no loss of accuracy.
  ],
)
def test_the_last_step_before_the_first_failing_one(accuracies, floor, chosen):
  assert selection.last_above(np.asarray(accuracies), floor) == chosen


@given(accuracies=ACCURACIES, drop=st.floats(0, 1))
def test_no_single_step_costs_more_than_the_drop(accuracies, drop):
  """However far they go together; the step that does is undone."""
  chosen = selection.last_gentle(np.asarray(accuracies), drop)
  drop += selection.TOLERANCE
  falls = [a - b for a, b in itertools.pairwise(accuracies)]
  assert all(fall <= drop for fall in falls[:chosen])
  if chosen < len(falls):
    assert falls[chosen] > drop


@pytest.mark.parametrize(
  "accuracies, total, neuron",
  [
    # A slow decline is bounded by the sum alone, a cliff by either.
    ([0.90, 0.895, 0.89, 0.885, 0.88, 0.7], 2, 4),
    ([0.90, 0.90, 0.88, 0.90], 1, 1),
    ([0.90, 0.91, 0.895, 0.892], 3, 1),
    ([0.90, 0.89], 1, 1),
    ([0.90, float("nan"), 0.9], 0, 0),
    ([0.5], 0, 0),
  ],
)
def test_what_a_drop_is_of(accuracies, total, neuron):
  for drop_of, count in (("total", total), ("neuron", neuron)):
    found = selection.pruning_count(np.asarray(accuracies), 0.01, drop_of)
    assert found == count, drop_of
  with pytest.raises(errors.ConfigError, match="unknown drop_of 'neurons'"):
    selection.pruning_count(np.asarray(accuracies), 0.01, "neurons")


@given(
  honest=st.integers(5, 12),
  liars=st.integers(0, 3),
  seed=st.integers(0, 99),
  lie=st.sampled_from([0.0, 1.0]),
)
def test_a_minority_of_liars_cannot_leave_the_honest_range(
  honest, liars, seed, lie
):
  reports = np.random.default_rng(seed).uniform(0.4, 0.6, (honest, 4))
  told = np.concatenate([np.full((liars, 4), lie), reports])
  combined = selection.trimmed_mean(told, liars / len(told))
  assert (combined >= reports.min(axis=0) - 1e-12).all()
  assert (combined <= reports.max(axis=0) + 1e-12).all()


@given(silent=st.integers(1, 5), seed=st.integers(0, 99))
def test_clients_without_an_answer_do_not_count(silent, seed):
  rng = np.random.default_rng(seed)
  reports = rng.uniform(0, 1, (6, 4))
  nothing = np.full((silent, 4), np.nan)
  nothing[0, 1:] = rng.uniform(0, 1, 3)  # One answers in part.
  together = rng.permutation(np.concatenate([reports, nothing]))
  np.testing.assert_allclose(
    selection.trimmed_mean(together, 0.2), selection.trimmed_mean(reports, 0.2)
  )
  with pytest.raises(errors.ConfigError, match="no client has a sample"):
    selection.trimmed_mean(nothing, 0.2)


def test_the_trimmed_mean_leaves_something_over():
  reports = np.asarray([[0.1], [0.5], [0.9]])
  assert selection.trimmed_mean(reports, 0.49)[0] == 0.5
  assert selection.trimmed_mean(reports, 0.0)[0] == pytest.approx(0.5)
  assert selection.trimmed_mean(reports[:1], 0.3)[0] == 0.1
  assert selection.trimmed_mean(reports[:2], 0.3)[0] == pytest.approx(0.3)
