import functools

import chex
from hypothesis import assume
from hypothesis import example
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


@functools.cache
def _built(name):
  """A rule, and it compiled: once for all examples of a shape."""
  aggregator = aggregators.build(name, trim=0.2)
  return aggregator, jax.jit(aggregator.update)


@pytest.mark.parametrize("name", sorted(aggregators.AGGREGATORS))
@given(seed=st.integers(0, 99), clients=st.sampled_from([1, 2, 5, 8]))
def test_every_aggregator_keeps_the_contract(name, seed, clients):
  """Structure and dtype kept, order of clients irrelevant, jit as eager."""
  if "krum" in name:
    # Two that are nearest to each other have the same score: with less than
    # two neighbours to count, the first of them is chosen.
    assume(clients >= 5)
  aggregator, compiled = _built(name)
  updates = _updates(seed, clients)
  rng = np.random.default_rng(seed)
  weights = jnp.asarray(rng.integers(1, 50, clients), jnp.float32)
  state = aggregator.init({"w": jnp.zeros((3, 2)), "b": jnp.zeros(())})
  combined, _ = aggregator.update(updates, weights, state)
  assert combined["w"].shape == (3, 2) and combined["b"].shape == ()
  assert combined["w"].dtype == jnp.float32
  order = rng.permutation(clients)
  permuted, _ = compiled(
    jax.tree.map(lambda leaf: leaf[order], updates), weights[order], state
  )
  chex.assert_trees_all_close(permuted, combined, rtol=1e-4, atol=1e-5)
  jitted, _ = compiled(updates, weights, state)
  chex.assert_trees_all_close(jitted, combined, rtol=1e-5, atol=1e-6)
  # Clients that agree are followed.
  same = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), updates
  )
  agreed, _ = compiled(same, weights, state)
  # Its noise has a deviation of a thousandth of their norm, some 3.
  noise = 0.03 if name == "flame" else 0
  chex.assert_trees_all_close(
    agreed, jax.tree.map(lambda leaf: leaf[0], same), rtol=1e-5, atol=noise
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


@pytest.mark.parametrize("clients, shape", [(17, (9000,)), (65, (3, 1000))])
def test_many_clients_are_sorted_block_by_block(clients, shape):
  """More columns than fit into one block, and no multiple of its width."""
  leaf = np.random.default_rng(clients).normal(size=(clients, *shape))
  leaf = leaf.astype(np.float32)
  leaf[:3] = np.array([np.inf, -np.inf, np.nan])[:, *(None,) * len(shape)]
  found, _ = aggregators.trimmed_mean(0.2).update(
    {"w": jnp.asarray(leaf)}, jnp.ones(clients), ()
  )
  leaf[2] = np.inf
  out = aggregators.left_out(clients, 0.2)
  middle = np.sort(leaf, axis=0)[out : clients - out]
  np.testing.assert_allclose(
    found["w"], middle.mean(axis=0), rtol=1e-5, atol=1e-6
  )


def _rows(updates):
  return np.concatenate(
    [
      np.asarray(leaf, np.float64).reshape(len(leaf), -1)
      for leaf in jax.tree.leaves(updates)
    ],
    axis=1,
  )


def _row(combined):
  return _rows(jax.tree.map(lambda leaf: leaf[None], combined))[0]


@given(seed=st.integers(0, 99), clients=st.sampled_from([5, 10, 19]))
def test_krum_chooses_who_is_nearest_to_most(seed, clients):
  updates = _updates(seed, clients)
  rows = _rows(updates)
  malicious = aggregators.left_out(clients, 0.2)
  away = np.square(rows[:, None] - rows[None]).sum(axis=-1)
  scores = np.sort(away, axis=1)[:, 1 : clients - malicious - 1].sum(axis=1)
  chosen, _ = aggregators.krum(0.2).update(updates, jnp.ones(clients), ())
  np.testing.assert_allclose(_row(chosen), rows[scores.argmin()], rtol=1e-6)
  several, _ = aggregators.multi_krum(0.2).update(
    updates, jnp.ones(clients), ()
  )
  best = np.argsort(scores)[: clients - malicious]
  np.testing.assert_allclose(
    _row(several), rows[best].mean(axis=0), rtol=1e-4, atol=1e-6
  )


@given(seed=st.integers(0, 99), clients=st.sampled_from([1, 2, 5, 10]))
def test_the_geometric_median_is_nearest_to_all(seed, clients):
  updates = _updates(seed, clients)
  rows = _rows(updates)

  def total(point):
    return np.linalg.norm(rows - point, axis=1).sum()

  found, _ = aggregators.geometric_median().update(
    updates, jnp.ones(clients), ()
  )
  best, _ = aggregators.geometric_median(1000).update(
    updates, jnp.ones(clients), ()
  )
  assert total(_row(found)) <= total(_row(best)) * 1.01 + 1e-4
  # Of a convex function, what no small step improves is the least.
  least = total(_row(best))
  steps = np.random.default_rng(seed).normal(size=(50, rows.shape[1]))
  assert all(total(_row(best) + 0.01 * step) >= least - 1e-4 for step in steps)
  assert least <= min(total(row) for row in rows) + 1e-4


@given(
  seed=st.integers(0, 99),
  clients=st.sampled_from([1, 2, 5, 10]),
  gamma=st.sampled_from([1.0, 10.0, 1e6]),
)
def test_amplification_is_nothing_to_clipped_norms(seed, clients, gamma):
  updates = _updates(seed, clients)
  # Whoever is the longest may be as long as it likes.
  longest = int(np.linalg.norm(_rows(updates), axis=1).argmax())
  amplified = jax.tree.map(
    lambda leaf: leaf.at[longest].multiply(gamma), updates
  )
  rule = aggregators.norm_clipping()
  one, two = (
    rule.update(each, jnp.ones(clients), ())[0] for each in (updates, amplified)
  )
  if clients > 2:
    chex.assert_trees_all_close(one, two, rtol=1e-4, atol=1e-6)
  rows = _rows(updates)
  norms = np.linalg.norm(rows, axis=1)
  kept = np.minimum(1, np.median(norms) / norms)
  np.testing.assert_allclose(
    _row(one), (rows * kept[:, None]).mean(axis=0), rtol=1e-4, atol=1e-6
  )


def _majority(distances, enough):
  """The same by merging the nearest, one after the other."""
  cluster = {thing: {thing} for thing in range(len(distances))}
  pairs = sorted(
    (distances[i, j], i, j) for i in cluster for j in cluster if i < j
  )
  level = -1.0
  for distance, one, other in pairs:
    # What comes at the same distance comes at once.
    if distance > level and max(map(len, cluster.values())) >= enough:
      break
    level = distance
    if np.isfinite(distance):
      joined = cluster[one] | cluster[other]
      for thing in joined:
        cluster[thing] = joined
  largest = max(cluster.values(), key=len)
  return np.isin(np.arange(len(distances)), [*largest])


@given(
  seed=st.integers(0, 999),
  clients=st.sampled_from([1, 2, 3, 5, 10, 20]),
  broken=st.integers(0, 2),
  levels=st.sampled_from([3, 1000]),
)
def test_the_densest_majority_is_that_of_single_linkage(
  seed, clients, broken, levels
):
  """Also where many are at the same distance."""
  rng = np.random.default_rng(seed)
  distances = rng.integers(1, levels + 1, (clients, clients)) / levels
  distances = np.triu(distances, 1) + np.triu(distances, 1).T
  distances[:broken] = distances[:, :broken] = np.inf
  enough = (clients - min(broken, clients)) // 2 + 1
  found = aggregators._densest_majority(jnp.asarray(distances), enough)
  expected = _majority(distances, enough)
  assert found.sum() >= min(enough, max(clients - broken, 1))
  if clients > broken:
    np.testing.assert_array_equal(found, expected)


@given(seed=st.integers(0, 99), clients=st.sampled_from([1, 2, 5, 10]))
def test_flame_leaves_out_who_looks_elsewhere(seed, clients):
  """Less than half lie, as long as they like, in a direction of theirs."""
  updates = _updates(seed, clients)
  liars = (clients - 1) // 2
  rng = np.random.default_rng(seed + 1000)
  # Honest ones look one way, more or less.
  shared = {"w": rng.normal(size=(3, 2)), "b": rng.normal()}
  updates = jax.tree.map(
    lambda leaf, one: jnp.asarray(0.2 * np.asarray(leaf) + one, jnp.float32),
    updates,
    shared,
  )
  away = jax.tree.map(lambda one: np.float32(-50 * one), shared)
  sent = jax.tree.map(lambda leaf, one: leaf.at[:liars].set(one), updates, away)
  rule = aggregators.flame(noise=0)
  found, _ = rule.update(sent, jnp.ones(clients), rule.init(sent))
  rows = _rows(sent)
  norms = np.linalg.norm(rows, axis=1)
  directions = rows / norms[:, None]
  taken = _majority(1 - directions @ directions.T, clients // 2 + 1)
  assert not taken[:liars].any()
  kept = rows * np.minimum(1, np.median(norms) / norms)[:, None]
  np.testing.assert_allclose(
    _row(found), kept[taken].mean(axis=0), rtol=1e-4, atol=1e-5
  )


# Of these, rounding made distances of more than 1e-6 once.
@example(seed=93, clients=4)
@given(seed=st.integers(0, 99), clients=st.sampled_from([4, 10, 19]))
def test_rounding_does_not_tell_like_directions_apart(seed, clients):
  rng = np.random.default_rng(seed)
  direction = rng.normal(size=10_000)
  lengths = rng.uniform(1, 3, (clients, 1))
  updates = {"w": jnp.asarray(lengths * direction, jnp.float32)}
  rule = aggregators.flame(noise=0)
  found, _ = rule.update(updates, jnp.ones(clients), rule.init(updates))
  kept = np.minimum(lengths, np.median(lengths)).mean()
  np.testing.assert_allclose(found["w"], kept * direction, rtol=1e-4)


def test_flames_noise_is_a_share_of_the_median_norm():
  updates = {
    "w": jnp.ones((5, 100, 100)),
    "batch_stats": {"norm": {"var": jnp.ones((5, 400))}},
  }
  rule, quiet = aggregators.flame(noise=0.01), aggregators.flame(noise=0)
  state = rule.init(updates)
  mean, _ = quiet.update(updates, jnp.ones(5), state)
  noisy, state = rule.update(updates, jnp.ones(5), state)
  again, _ = rule.update(updates, jnp.ones(5), state)
  noise = np.asarray(noisy["w"] - mean["w"])
  # 10,000 ones are 100 long.
  assert noise.std() == pytest.approx(1, rel=0.05)
  assert abs(noise.mean()) < 0.05
  # Another one in the next round, and from another model on.
  other = rule.init(jax.tree.map(lambda leaf: 2 * leaf, updates))
  elsewhere, _ = rule.update(updates, jnp.ones(5), other)
  for one in (again, elsewhere):
    assert abs(np.corrcoef(noise.ravel(), np.ravel(one["w"]))[0, 1]) < 0.05
  chex.assert_trees_all_equal(noisy["batch_stats"], mean["batch_stats"])


def test_running_statistics_are_no_direction_to_flame():
  # Three of five look one way, whatever their statistics, which agree with
  # those of another one in two.
  steps = jnp.asarray([[1.0, 0.1], [1.0, 0.0], [1.0, 0.2], [0.0, 1], [0, -1]])
  statistics = jnp.asarray([[9.0], [-9.0], [9.0], [-9.0], [9.0]])
  updates = {"w": steps, "batch_stats": {"norm": {"mean": statistics}}}
  rule = aggregators.flame(noise=0)
  found, _ = rule.update(updates, jnp.ones(5), rule.init(updates))
  np.testing.assert_allclose(found["batch_stats"]["norm"]["mean"], [3.0])
  assert float(found["w"][0]) > 0.9


@given(seed=st.integers(0, 99), clients=st.sampled_from([1, 2, 5, 10]))
def test_where_signs_disagree_the_rate_is_negative(seed, clients):
  updates = _updates(seed, clients)
  combined, _ = aggregators.robust_learning_rate(0.2).update(
    updates, jnp.ones(clients), ()
  )
  rows = _rows(updates)
  mean = rows.mean(axis=0)
  agree = abs(np.sign(rows).sum(axis=0)) >= 2 * aggregators.left_out(
    clients, 0.2
  )
  np.testing.assert_allclose(
    _row(combined), np.where(agree, mean, -mean), rtol=1e-4, atol=1e-6
  )


def test_running_statistics_are_no_direction_and_are_clipped_apart():
  statistics = {"norm": {"var": jnp.asarray([[1.0], [-2.0], [30.0]])}}
  updates = {
    "stem": {
      "w": jnp.asarray([[-0.1], [0.2], [0.4]]),
      "batch_stats": statistics,
    }
  }
  flipped, _ = aggregators.robust_learning_rate(0.4).update(
    updates, jnp.ones(3), ()
  )
  assert float(flipped["stem"]["w"][0]) < 0
  mean = flipped["stem"]["batch_stats"]["norm"]["var"]
  assert float(mean[0]) == pytest.approx(29 / 3)
  clipped, _ = aggregators.norm_clipping().update(updates, jnp.ones(3), ())
  assert float(clipped["stem"]["w"][0]) == pytest.approx(0.3 / 3)
  mean = clipped["stem"]["batch_stats"]["norm"]["var"]
  assert float(mean[0]) == pytest.approx(1 / 3)


@given(
  seed=st.integers(0, 99),
  clients=st.sampled_from([5, 10, 19]),
  sent=st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e10]),
  name=st.sampled_from(
    ["krum", "multi_krum", "geometric_median", "norm_clipping", "flame"]
  ),
)
def test_a_minority_cannot_take_the_update_far(seed, clients, sent, name):
  updates = _updates(seed, clients)
  liars = aggregators.left_out(clients, 0.2)
  lying = jax.tree.map(lambda leaf: leaf.at[:liars].set(sent), updates)
  rule = aggregators.build(name, trim=0.2)
  state = rule.init(updates)
  combined, _ = jax.jit(rule.update)(lying, jnp.ones(clients), state)
  honest = np.linalg.norm(_rows(updates)[liars:], axis=1).max()
  assert np.linalg.norm(_row(combined)) <= 2 * honest


def test_no_change_of_anybody_is_no_change():
  updates = {"w": jnp.zeros((5, 3, 2)), "b": jnp.zeros(5)}
  for name in aggregators.AGGREGATORS:
    rule = aggregators.build(name, trim=0.2)
    combined, _ = rule.update(updates, jnp.ones(5), rule.init(updates))
    chex.assert_trees_all_equal(
      combined, {"w": jnp.zeros((3, 2)), "b": jnp.zeros(())}
    )


def test_a_cohort_without_samples_changes_nothing():
  updates = {"w": jnp.zeros((3, 2))}
  combined, _ = aggregators.weighted_mean().update(updates, jnp.zeros(3), ())
  chex.assert_trees_all_equal(combined, {"w": jnp.zeros(2)})
