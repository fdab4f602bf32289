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
from fljax import federation as federations
from fljax import models
from fljax.cleanse import pipeline
from fljax.cleanse import pruning
from fljax.cleanse import reports


def _means(seed, clients=3, neurons=7, ties=False):
  rng = np.random.default_rng(seed)
  means = rng.random((clients, neurons))
  if ties:
    means = np.round(means * 3) / 3
  return jnp.asarray(means, jnp.float32)


SEEDS = st.integers(0, 999)


def _brute_force_ranks(row):
  """Rank = 1 + number of neurons that come before, in decreasing activity."""
  return [
    1
    + sum(
      1
      for other in range(len(row))
      if row[other] > row[i] or (row[other] == row[i] and other < i)
    )
    for i in range(len(row))
  ]


@given(seed=SEEDS, ties=st.booleans())
def test_ranks_and_scores_equal_a_brute_force_reading(seed, ties):
  means = _means(seed, ties=ties)
  expected = np.asarray([_brute_force_ranks(row) for row in np.asarray(means)])
  np.testing.assert_array_equal(pruning.ranks(means), expected)
  np.testing.assert_allclose(
    pruning.rank_scores(means), expected.mean(axis=0), rtol=1e-6
  )


@given(seed=SEEDS, rate=st.floats(0, 1), ties=st.booleans())
def test_votes_equal_a_brute_force_reading(seed, rate, ties):
  means = _means(seed, ties=ties)
  count = round(rate * 7)
  expected = np.zeros((3, 7), int)
  for client, row in enumerate(np.asarray(means)):
    # The least active first; among equals the one with the higher index.
    least = sorted(range(7), key=lambda i: (row[i], -i))
    expected[client, least[:count]] = 1
  votes = pruning.votes(means, rate)
  np.testing.assert_array_equal(votes, expected)
  np.testing.assert_array_equal(votes.sum(axis=1), [count] * 3)
  np.testing.assert_allclose(
    pruning.vote_scores(means, rate), expected.mean(axis=0), rtol=1e-6
  )


@given(seed=SEEDS)
def test_ranks_do_not_change_under_monotone_transforms(seed):
  means = _means(seed)
  expected = pruning.ranks(means)
  for transform in (lambda a: 5 * a + 2, jnp.exp, jnp.sqrt, lambda a: a**3):
    np.testing.assert_array_equal(pruning.ranks(transform(means)), expected)


@given(seed=SEEDS)
def test_ranks_are_permutations_with_the_most_active_first(seed):
  means = _means(seed)
  ranks = np.asarray(pruning.ranks(means))
  np.testing.assert_array_equal(np.sort(ranks, axis=1), [range(1, 8)] * 3)
  np.testing.assert_array_equal(
    ranks.argmin(axis=1), np.asarray(means).argmax(axis=1)
  )


@pytest.mark.parametrize("method", sorted(pruning.SCORES))
@given(seed=SEEDS, inactive=st.integers(0, 6))
def test_an_inactive_neuron_is_pruned_before_an_active_one(
  method, seed, inactive
):
  """Sorting the other way would prune the most active neurons first."""
  means = (_means(seed) + 0.1).at[:, inactive].set(0)
  order = pruning.pruning_order(pruning.SCORES[method](means, 1 / 7))
  assert int(order[0]) == inactive
  always_most_active = means.at[:, inactive].set(9)
  order = pruning.pruning_order(
    pruning.SCORES[method](always_most_active, 6 / 7)
  )
  assert int(order[-1]) == inactive


@pytest.mark.parametrize("method", sorted(pruning.SCORES))
@given(seed=SEEDS)
def test_the_order_does_not_depend_on_who_is_which_client(method, seed):
  means = _means(seed, clients=5)
  shuffled = means[np.random.default_rng(seed).permutation(5)]
  score = pruning.SCORES[method]
  chex.assert_trees_all_close(score(means, 0.5), score(shuffled, 0.5))


def test_the_order_breaks_ties_by_index():
  scores = jnp.asarray([0.5, 1.0, 0.5, 1.0, 0.0])
  np.testing.assert_array_equal(pruning.pruning_order(scores), [1, 3, 0, 2, 4])


def test_a_minority_cannot_outvote_the_others():
  """One of five clients wants neuron 0 kept; its reach is 1/5 of the votes."""
  honest = jnp.tile(jnp.asarray([[0.0, 3, 2, 1]]), (5, 1))
  lying = honest.at[0].set(jnp.asarray([9.0, 3, 2, 1]))
  order = pruning.pruning_order(pruning.vote_scores(lying, 0.25))
  assert int(order[0]) == 0


@given(seed=SEEDS, count=st.integers(0, 7))
def test_masks_remove_the_first_of_the_order(seed, count):
  order = np.random.default_rng(seed).permutation(7)
  mask = np.asarray(pruning.mask_without_first(jnp.asarray(order), count))
  assert set(np.flatnonzero(~mask)) == set(order[:count])


@given(seed=SEEDS)
def test_the_curve_is_the_accuracy_of_every_pruned_model(model, params, seed):
  order = jnp.asarray(np.random.default_rng(seed).permutation(model.neurons))
  images, labels = make_images(30)
  examples = evaluate.batched(images, labels, batch_size=12)
  curve = pruning.pruning_curve(model, params, order, examples)
  accuracy = jax.jit(evaluate.accuracy, static_argnums=0)
  expected = [
    float(
      accuracy(
        model,
        models.mask_neurons(
          model, params, pruning.mask_without_first(order, count)
        ),
        examples,
      )
    )
    for count in range(model.neurons + 1)
  ]
  np.testing.assert_allclose(curve, expected, atol=1e-6)


def test_clients_report_the_accuracies_of_their_own_data(model, params):
  federation, _ = make_federation(attackers=0)
  federation = federation.replace(mask=federation.mask.at[1, 7:].set(False))
  order = jnp.arange(model.neurons)
  curves = pruning.client_curves(model, params, order, federation)
  assert curves.shape == (4, model.neurons + 1)
  for client in range(4):
    own = np.asarray(federation.mask[client])
    examples = evaluate.batched(
      np.asarray(federation.images[client])[own],
      np.asarray(federation.labels[client])[own],
    )
    expected = pruning.pruning_curve(model, params, order, examples)
    np.testing.assert_allclose(curves[client], expected, atol=1e-6)


@pytest.mark.parametrize("method", ["rap", "mvp"])
def test_a_client_without_samples_has_no_say(model, params, method):
  federation, _ = make_federation()
  asked = federations.select(federation, jnp.arange(2))
  empty = federation.replace(mask=federation.mask.at[2:].set(False))
  assert np.isnan(reports.client_activations(model, params, empty)[2:]).all()
  orders = [
    pipeline.prune(
      model,
      params,
      reports.client_activations(model, params, clients),
      pipeline.reported_curves(model, clients, trim=0.0).pruning,
      method=method,
      max_drop=1.0,
    )
    for clients in (empty, asked)
  ]
  chex.assert_trees_all_equal(*(one.order for one in orders))
  np.testing.assert_allclose(*(one.accuracies for one in orders))


@pytest.mark.parametrize("batch_size", [3, 10, 64])
def test_clients_report_mean_activations_of_their_own_data(
  model, params, batch_size
):
  federation, _ = make_federation()
  federation = federation.replace(mask=federation.mask.at[1, 7:].set(False))

  def total(params, images, labels, mask):
    active = model.activations(params, model.stem(params, images))
    return jnp.where(mask[:, None], active.mean(axis=(1, 2)), 0).sum(axis=0)

  means = reports.client_mean(total, params, federation, batch_size=batch_size)
  chex.assert_trees_all_close(
    means, reports.client_activations(model, params, federation), rtol=1e-5
  )
  for client in range(4):
    activations = []
    for sample in range(10):
      if not federation.mask[client, sample]:
        continue
      image = np.array(federation.images[client, sample])
      if federation.poisoned[client, sample]:
        image[-2:, -2:] = 255
      active = model.activations(
        params, model.stem(params, jnp.asarray(image[None]))
      )
      assert float(active.min()) >= 0
      activations.append(np.asarray(active).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(
      means[client], np.mean(activations, axis=0), rtol=1e-4
    )
