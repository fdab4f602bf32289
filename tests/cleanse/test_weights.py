import chex
from conftest import make_federation
from conftest import make_images
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import evaluate
from fljax import models
from fljax.cleanse import pipeline
from fljax.cleanse import weights

SEEDS = st.integers(0, 999)
DELTAS = st.floats(0.1, 4)


def _kernel(seed):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(0.1, 1, (3, 3, 2, 5)), jnp.float32)


@given(seed=SEEDS, delta=DELTAS)
def test_adjusting_zeroes_exactly_what_lies_outside(seed, delta):
  kernel = _kernel(seed)
  mean, std = 0.1, 0.9
  adjusted = np.asarray(weights.zero_extremes(kernel, mean, std, delta))
  flat = np.asarray(kernel)
  low, high = np.float32(mean - delta * std), np.float32(mean + delta * std)
  # At the very edge, rounding decides; keep away from it.
  clear = (np.abs(flat - low) > 1e-5) & (np.abs(flat - high) > 1e-5)
  expected = np.where((flat >= low) & (flat <= high), flat, 0)
  np.testing.assert_array_equal(adjusted[clear], expected[clear])


@given(seed=SEEDS, delta=DELTAS)
def test_adjusting_is_idempotent_for_fixed_mean_and_deviation(seed, delta):
  kernel = _kernel(seed)
  mean, std = kernel.mean(), kernel.std()
  once = weights.zero_extremes(kernel, mean, std, delta)
  chex.assert_trees_all_equal(
    weights.zero_extremes(once, mean, std, delta), once
  )


@given(seed=SEEDS, small=DELTAS, large=DELTAS)
def test_adjusting_is_monotone_in_delta(seed, small, large):
  small, large = sorted((small, large))
  kernel = _kernel(seed)
  mean, std = kernel.mean(), kernel.std()
  by_small = weights.zero_extremes(kernel, mean, std, small) == 0
  by_large = weights.zero_extremes(kernel, mean, std, large) == 0
  assert not (by_large & ~by_small).any()


@given(seed=SEEDS, delta=DELTAS)
def test_adjusting_is_symmetric_around_a_zero_mean(seed, delta):
  kernel = _kernel(seed)
  chex.assert_trees_all_equal(
    weights.zero_extremes(-kernel, 0.0, 1.0, delta),
    -weights.zero_extremes(kernel, 0.0, 1.0, delta),
  )


def test_an_infinite_threshold_changes_nothing():
  kernel = _kernel(0)
  for std in (1.0, 0.0):
    chex.assert_trees_all_equal(
      weights.zero_extremes(kernel, 0.0, std, jnp.inf), kernel
    )


@given(seed=SEEDS)
def test_statistics_are_over_surviving_or_all_weights(seed):
  mask = jnp.asarray([True, False, True, True, False])
  kernel = jnp.where(mask.reshape(1, 1, 1, -1), _kernel(seed), 0)
  surviving = np.asarray(kernel)[..., np.asarray(mask)]
  mean, std = weights.statistics(kernel, mask, "surviving")
  np.testing.assert_allclose(mean, surviving.mean(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(std, surviving.std(), rtol=1e-4)
  mean, std = weights.statistics(kernel, mask, "all")
  np.testing.assert_allclose(mean, np.mean(kernel), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(std, np.std(kernel), rtol=1e-4)


def test_statistics_of_nothing_are_zero():
  mean, std = weights.statistics(_kernel(0), jnp.zeros(5, bool), "surviving")
  assert float(mean) == float(std) == 0


@given(seed=SEEDS)
def test_no_cell_raises_a_neuron_by_more_than_its_gain(seed):
  """Whatever lies in one cell, and as much if the right thing does."""
  kernel = _kernel(seed)
  height, width, channels, neurons = kernel.shape
  gains = np.asarray(weights.gains(kernel))
  cells = np.random.default_rng(seed).random((20, 1, 1, channels))
  # All that a neuron's best place lets through.
  sums = np.maximum(np.asarray(kernel), 0).sum(axis=2).reshape(-1, neurons)
  best = np.asarray(kernel).reshape(-1, channels, neurons)[
    sums.argmax(axis=0), :, np.arange(neurons)
  ]  # [neurons, channels]
  cells = np.concatenate([cells, (best > 0)[:, None, None]])
  images = np.pad(
    cells, [(0, 0), (height - 1,) * 2, (width - 1,) * 2, (0, 0)]
  ).astype(np.float32)
  answers = jax.lax.conv_general_dilated(
    images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  raised = np.asarray(answers).max(axis=(1, 2))
  assert (raised <= gains + 1e-5).all()
  np.testing.assert_allclose(
    np.diagonal(raised[-neurons:]), gains, rtol=1e-4, atol=1e-6
  )


@given(start=st.floats(0.5, 20), step=st.sampled_from([0.1, 0.25, 1.0]))
def test_thresholds_fall_evenly_and_stay_positive(start, step):
  steps = weights.delta_steps(start, step)
  assert steps[0] == pytest.approx(start) and steps.min() > -1e-9
  np.testing.assert_allclose(np.diff(steps), -step, rtol=1e-6)
  assert steps[-1] <= step + 1e-9


def test_the_thresholds_of_even_division_end_at_one_step():
  np.testing.assert_allclose(
    weights.delta_steps(1.0, 0.25), [1, 0.75, 0.5, 0.25]
  )


def _examples():
  return evaluate.batched(*make_images(40), batch_size=16)


def _curve(model, params, deltas):
  kernel = models.target_kernel(model, params)
  mean, std = kernel.mean(), kernel.std()
  return (
    mean,
    std,
    list(
      pipeline.delta_accuracies(
        model, params, _examples(), mean=mean, std=std, deltas=deltas
      )
    ),
  )


def test_the_cached_curve_is_the_accuracy_of_every_adjusted_model(
  model, params
):
  deltas = np.asarray([np.inf, 9.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.1])
  mean, std, curve = _curve(model, params, deltas)
  for delta, actual in zip(deltas, curve, strict=True):
    kernel = weights.zero_extremes(
      models.target_kernel(model, params), mean, std, delta
    )
    expected = evaluate.accuracy(
      model, models.with_target_kernel(model, params, kernel), _examples()
    )
    assert actual == pytest.approx(float(expected), abs=1e-6)


def test_clients_report_the_accuracies_of_their_own_data(model, params):
  federation, _ = make_federation(attackers=0)
  deltas = np.asarray([np.inf, 2.0, 1.0, 0.3])
  mean, std, _ = _curve(model, params, deltas)
  curves = weights.client_curves(
    model, params, mean, std, jnp.asarray(deltas, jnp.float32), federation
  )
  for client in range(4):
    examples = evaluate.batched(
      np.asarray(federation.images[client]),
      np.asarray(federation.labels[client]),
    )
    expected = list(
      pipeline.delta_accuracies(
        model, params, examples, mean=mean, std=std, deltas=deltas
      )
    )
    np.testing.assert_allclose(curves[client], expected, atol=1e-6)
