import chex
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import aggregators


def _updates(seed, clients):
  rng = np.random.default_rng(seed)
  return {
    "w": jnp.asarray(rng.normal(size=(clients, 3, 2)), jnp.float32),
    "b": jnp.asarray(rng.normal(size=(clients,)), jnp.float32),
  }


@pytest.mark.parametrize("name", sorted(aggregators.AGGREGATORS))
@given(seed=st.integers(0, 99), clients=st.integers(1, 8))
def test_every_aggregator_keeps_the_contract(name, seed, clients):
  """Structure and dtype kept, order of clients irrelevant, jit as eager."""
  aggregator = aggregators.build(name, trim=0.2)
  updates = _updates(seed, clients)
  rng = np.random.default_rng(seed)
  weights = jnp.asarray(rng.integers(1, 50, clients), jnp.float32)
  state = aggregator.init({"w": jnp.zeros((3, 2)), "b": jnp.zeros(())})
  combined, _ = aggregator.update(updates, weights, state)
  assert combined["w"].shape == (3, 2) and combined["b"].shape == ()
  assert combined["w"].dtype == jnp.float32
  order = rng.permutation(clients)
  permuted, _ = aggregator.update(
    jax.tree.map(lambda leaf: leaf[order], updates), weights[order], state
  )
  chex.assert_trees_all_close(permuted, combined, rtol=1e-4, atol=1e-5)
  jitted, _ = jax.jit(aggregator.update)(updates, weights, state)
  chex.assert_trees_all_close(jitted, combined, rtol=1e-5, atol=1e-6)
  # Clients that agree are followed.
  same = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), updates
  )
  agreed, _ = aggregator.update(same, weights, state)
  chex.assert_trees_all_close(
    agreed, jax.tree.map(lambda leaf: leaf[0], same), rtol=1e-5
  )


def test_mean_and_weighted_mean_are_the_papers_equations():
  updates = {"w": jnp.asarray([[1.0], [2.0], [6.0]])}
  counts = jnp.asarray([1.0, 1.0, 2.0])
  plain, _ = aggregators.mean().update(updates, counts, ())
  weighted, _ = aggregators.weighted_mean().update(updates, counts, ())
  assert float(plain["w"][0]) == pytest.approx(3.0)
  assert float(weighted["w"][0]) == pytest.approx((1 + 2 + 12) / 4)


@given(
  seed=st.integers(0, 99),
  clients=st.integers(1, 20),
  share=st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.49]),
)
def test_the_trimmed_mean_is_that_of_the_middle(seed, clients, share):
  updates = _updates(seed, clients)
  combined, _ = aggregators.trimmed_mean(share).update(
    updates, jnp.ones(clients), ()
  )
  out = min(int(np.ceil(share * clients)), (clients - 1) // 2)
  expected = jax.tree.map(
    lambda leaf: np.sort(leaf, axis=0)[out : clients - out].mean(axis=0),
    updates,
  )
  chex.assert_trees_all_close(combined, expected, rtol=1e-5, atol=1e-6)
  middle, _ = aggregators.median().update(updates, jnp.ones(clients), ())
  chex.assert_trees_all_close(
    middle,
    jax.tree.map(lambda leaf: np.median(leaf, axis=0), updates),
    rtol=1e-5,
    atol=1e-6,
  )


@given(
  seed=st.integers(0, 99),
  clients=st.integers(3, 20),
  sent=st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.1]),
  name=st.sampled_from(["trimmed_mean", "median"]),
)
def test_a_minority_cannot_leave_the_range_of_the_others(
  seed, clients, sent, name
):
  updates = _updates(seed, clients)
  aggregator = aggregators.build(name, trim=0.2)
  liars = aggregators.left_out(clients, {"trimmed_mean": 0.2}.get(name, 0.5))
  assert liars >= 1
  lying = jax.tree.map(lambda leaf: leaf.at[:liars].set(sent), updates)
  combined, _ = jax.jit(aggregator.update)(lying, jnp.ones(clients), ())
  for key, leaf in combined.items():
    honest = np.asarray(updates[key])[liars:]
    assert (leaf >= honest.min(axis=0) - 1e-6).all()
    assert (leaf <= honest.max(axis=0) + 1e-6).all()


def test_a_cohort_without_samples_changes_nothing():
  updates = {"w": jnp.zeros((3, 2))}
  combined, _ = aggregators.weighted_mean().update(updates, jnp.zeros(3), ())
  chex.assert_trees_all_equal(combined, {"w": jnp.zeros(2)})
