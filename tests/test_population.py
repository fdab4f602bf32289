"""Clients on the host give what clients on the device give."""

import time

import chex
from conftest import IMAGE_SHAPE
from conftest import TRIGGER
from conftest import make_dealt
from conftest import make_federation
from conftest import make_images
from conftest import make_round
from conftest import make_state
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import evaluate
from fljax import federation as federations
from fljax import population as populations
from fljax import rounds
from fljax import triggers
from fljax.cleanse import pruning
from fljax.cleanse import reports

KEY = jax.random.key(4)
CLIENTS, SAMPLES, ATTACKERS = 7, 6, 2


def make_both(chunk=3):
  """The same clients on the device and on the host, and their attack."""
  federation, attack = make_federation(
    clients=CLIENTS, samples=SAMPLES, attackers=ATTACKERS, gamma=2.0
  )
  population = populations.Population(
    *make_dealt(CLIENTS, SAMPLES),
    poison=lambda clients: attack.data(clients, jax.random.key(2)),
    num_attackers=ATTACKERS,
    pieces=[triggers.from_pixels(TRIGGER, IMAGE_SHAPE)],
    chunk=chunk,
  )
  return federation, population, attack


def test_a_cohort_is_what_the_federation_has_there():
  federation, population, _ = make_both()
  chosen = np.asarray([5, 1, 3])
  expected = jax.tree.map(lambda leaf: leaf[chosen], federation)
  chex.assert_trees_all_equal(population.cohort(chosen), expected)


@pytest.mark.parametrize("pieces", [None, []])
def test_a_cohort_where_nobody_attacks(pieces):
  images, labels, partition = make_dealt(CLIENTS, SAMPLES)
  population = populations.Population(
    images, labels, partition, poison=None, num_attackers=0, pieces=pieces
  )
  chosen = np.asarray([2, 0])
  on_device = federations.create(images, labels, partition, pieces=pieces)
  chex.assert_trees_all_equal(
    population.cohort(chosen), federations.select(on_device, chosen)
  )
  assert not on_device.attacker.any()


@pytest.mark.parametrize("lengths", [(4,), (1, 3), (0, 2, 2)])
def test_training_is_the_same_wherever_the_images_are(model, lengths):
  federation, population, attack = make_both()
  images, labels = make_images(20, seed=3)
  examples = {"test": evaluate.batched(images, labels)}
  on_device = rounds.make_block(model, make_round(model, attack, cohort_size=3))
  on_host = rounds.make_streamed_block(model, make_round(model, attack), 3)
  expected, metrics = on_device(make_state(model), federation, KEY, 4, examples)
  state = make_state(model)
  for length in lengths:
    state, found = on_host(state, population, KEY, length, examples)
  chex.assert_trees_all_close(state.params, expected.params, rtol=1e-6)
  assert int(state.round) == 4
  assert float(found.loss) == pytest.approx(float(metrics.loss), rel=1e-6)
  assert found.accuracies == metrics.accuracies


def test_the_next_cohort_is_gathered_while_a_round_computes(model, monkeypatch):
  """And no sooner: two cohorts are on the device at most."""
  _, population, _ = make_both()
  times = []

  def run_round(state, cohort, key):
    del cohort, key
    big = jnp.full((300, 300), 1 / 300)
    busy = lax.fori_loop(0, 500, lambda _, x: x @ big, big)[0, 0]
    state = state.replace(round=state.round + 1)
    bad = jnp.where(jnp.isfinite(busy), 0, state.round)
    return state, rounds.RoundMetrics(loss=busy, bad_round=bad)

  block = rounds.make_streamed_block(model, run_round, 3)
  state, _ = block(make_state(model), population, KEY, 2)  # Compiles.
  gather = populations.Population.cohort

  def spied(self, chosen):
    times.append(time.perf_counter())
    return gather(self, chosen)

  monkeypatch.setattr(populations.Population, "cohort", spied)
  block(state, population, KEY, 4)
  first, second, third = np.diff(times)
  # The first round has hardly begun; the others wait for the one before.
  assert first < min(second, third) / 2


def test_fine_tuning_has_its_own_amplification_and_rate(model):
  federation, population, _ = make_both()
  for clients in (federation, population):
    tuned = populations.for_fine_tuning(clients, gamma=1.5, rate=0.25)
    if clients is population:
      tuned = tuned.clients
    expected = np.where(federation.attacker, 1.5, 1)
    np.testing.assert_array_equal(tuned.scale, expected)
    np.testing.assert_array_equal(tuned.rate, 0.25 * federation.rate)


def test_the_first_bad_round_is_told(model):
  _, population, attack = make_both()
  diverging = populations.for_fine_tuning(population, gamma=1e38)
  block = rounds.make_streamed_block(model, make_round(model, attack), 6)
  _, metrics = block(make_state(model), diverging, KEY, 4)
  assert int(metrics.bad_round) in (1, 2)
  assert float(population.clients.scale.max()) == 2


@pytest.mark.parametrize("chunk", [1, 3, 7, 10])
def test_all_clients_answer_in_parts(model, params, chunk):
  federation, population, _ = make_both(chunk)

  def means(clients):
    return reports.client_activations(model, params, clients)

  expected = populations.ask_clients(means, federation)
  chex.assert_trees_all_close(
    populations.ask_clients(means, population), expected, rtol=1e-6
  )
  order = pruning.pruning_order(pruning.rank_scores(expected))

  def curves(clients):
    return pruning.client_curves(model, params, order, clients)

  chex.assert_trees_all_close(
    populations.ask_clients(curves, population), curves(federation), rtol=1e-6
  )
