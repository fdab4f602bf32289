import chex
from conftest import TARGET
from conftest import TRIGGER
from conftest import VICTIM
from conftest import copy
from conftest import make_federation
from conftest import make_images
from conftest import make_round
from conftest import make_state
from conftest import make_training
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import aggregators
from fljax import attacks
from fljax import evaluate
from fljax import federation as federations
from fljax import models
from fljax import rounds
from fljax import triggers

KEY = jax.random.key(11)


def _close(a, b):
  chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-6)


def _plain_loop(model, state, federation, *, gamma, server_rate, weighted):
  """A federated round written as loops over clients, in NumPy."""
  round_key = jax.random.fold_in(KEY, state.round)
  _, client_key = jax.random.split(round_key)
  train = jax.jit(make_training(model))
  total = jax.tree.map(np.zeros_like, jax.device_get(state.params))
  weights = 0.0
  for client in range(federation.num_clients):
    one = federations.select(federation, client)
    begun = int(one.attack_start) <= int(state.round) < int(one.attack_end)
    active = bool(one.attacker) and begun
    trained, _ = train(
      state.params,
      one,
      state.neuron_mask,
      jnp.asarray(active),
      jax.random.fold_in(client_key, int(one.ids)),
    )
    count = sum(
      1
      for counts, poisoned in zip(one.mask, one.poisoned, strict=True)
      if counts and (active or not poisoned)
    )
    weight = count if weighted else 1
    weights += weight
    factor = weight * (gamma if active else 1)
    total = jax.tree.map(
      lambda t, new, old, f=factor: t + f * (np.asarray(new) - np.asarray(old)),
      total,
      trained,
      state.params,
    )
  return jax.tree.map(
    lambda old, t: np.asarray(old) + server_rate * t / weights,
    state.params,
    total,
  )


@pytest.mark.parametrize("chunk, weighted", [(0, False), (1, True), (3, False)])
def test_the_mapped_round_equals_a_plain_loop_over_clients(
  model, chunk, weighted
):
  federation, attack = make_federation(
    attackers=2, gamma=1.7, start=1, attack_rounds=1
  )
  federation = federation.replace(mask=federation.mask.at[2, 6:].set(False))
  aggregator = aggregators.build("weighted" if weighted else "mean", trim=0.2)
  run = jax.jit(
    make_round(
      model,
      attack,
      aggregator=aggregator,
      server_rate=0.8,
      client_chunk=chunk,
    )
  )
  state = make_state(model)
  for _ in range(3):  # Before, in and after the attack's only round.
    expected = _plain_loop(
      model,
      state,
      federation,
      gamma=1.7,
      server_rate=0.8,
      weighted=weighted,
    )
    state, _ = run(state, federation, KEY)
    _close(state.params, expected)


@pytest.mark.parametrize("cohort", [0, 3])
def test_permuting_clients_changes_nothing(model, cohort):
  federation, attack = make_federation(attackers=2, gamma=2.0)
  run = jax.jit(make_round(model, attack, cohort_size=cohort))
  state = make_state(model)
  before, _ = run(state, federation, KEY)
  for seed in range(5):
    order = jnp.asarray(np.random.default_rng(seed).permutation(4))
    after, _ = run(state, federations.select(federation, order), KEY)
    _close(after.params, before.params)


@pytest.mark.parametrize(
  "rule, rowwise",
  [("mean", True), ("weighted", True), ("weighted", False), ("median", True)],
)
@pytest.mark.parametrize("cohort", [0, 3])
def test_attackers_remember_what_benign_clients_sent(
  model, rule, rowwise, cohort
):
  """Whatever the attackers sent, and only those of the round's cohort."""
  federation, poisoning = make_federation(clients=5, attackers=2, gamma=9.0)
  federation = federation.replace(mask=federation.mask.at[3, 6:].set(False))
  attack = attacks.chain(
    poisoning, attacks.Attack(remember=lambda sent: sent, rowwise=rowwise)
  )
  run = make_round(
    model,
    attack,
    aggregator=aggregators.build(rule, trim=0.2),
    cohort_size=cohort,
    client_chunk=2,
  )
  before = make_state(model, attack=attack)
  for leaf in jax.tree.leaves(before.memory):
    assert not leaf.any()
  after, _ = jax.jit(run)(before, federation, KEY)

  present = np.arange(5)
  if cohort:
    present = np.asarray(rounds.chosen_in_round(federation.ids, 3, KEY, 0))
  benign = federations.select(federation, present[present >= 2])
  assert 0 < benign.num_clients < len(present)
  # By the median every client weighs the same.
  weighs = aggregators.build(
    "weighted" if rule == "weighted" else "mean", trim=0
  )
  alone, _ = make_round(model, aggregator=weighs)(before, benign, KEY)
  sent = jax.tree.map(jnp.subtract, alone.params, before.params)
  _close(after.memory, sent)


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_where_all_attack_nothing_is_remembered(model, rule):
  federation, poisoning = make_federation(attackers=4, start=1)
  attack = attacks.chain(poisoning, attacks.Attack(remember=lambda sent: sent))
  run = jax.jit(
    make_round(
      model, attack, aggregator=aggregators.build(rule, trim=0), client_chunk=2
    )
  )
  first, _ = run(make_state(model, attack=attack), federation, KEY)
  second, _ = run(first, federation, KEY)
  for before, after in zip(
    *map(jax.tree.leaves, (first.memory, second.memory)), strict=True
  ):
    assert before.any() and not after.any()


def test_a_client_that_diverges_is_not_remembered(model):
  federation, poisoning = make_federation(clients=5, attackers=1)
  broken = federation.replace(rate=federation.rate.at[2].set(jnp.nan))
  attack = attacks.chain(poisoning, attacks.Attack(remember=lambda sent: sent))
  run = jax.jit(make_round(model, attack, aggregator=aggregators.median()))
  state = make_state(model, attack=attack)
  known, _ = run(state, broken, KEY)
  others = federations.select(federation, jnp.asarray([0, 1, 3, 4]))
  expected, _ = run(state, others, KEY)
  _close(known.memory, expected.memory)


def test_attackers_send_no_change_of_what_they_leave_alone(model):
  federation, poisoning = make_federation(attackers=1)
  attack = attacks.chain(poisoning, attacks.neurotoxin(0.3))
  sent = []

  def spied(updates, weights, state):
    sent.append(updates)
    return aggregators.weighted_sum(updates, weights / weights.sum()), state

  run = make_round(
    model, attack, aggregator=aggregators.Aggregator(lambda params: (), spied)
  )
  first, _ = run(make_state(model, attack=attack), federation, KEY)
  held = first.memory
  run(first, federation, KEY)
  number = sum(int(leaf.sum()) for leaf in jax.tree.leaves(held))
  size = sum(leaf.size for leaf in jax.tree.leaves(held))
  assert number == round(0.3 * size)
  once, again = sent
  for leaf, new, mask in zip(
    *map(jax.tree.leaves, (once, again, held)), strict=True
  ):
    assert leaf[0].any()
    np.testing.assert_array_equal(
      new[0] != 0, ~np.asarray(mask) & (new[0] != 0)
    )
    # Benign clients go on as ever.
    assert (np.asarray(new[1])[np.asarray(mask)] != 0).any() or not mask.any()


@pytest.mark.parametrize("server_rate", [1.0, 0.5])
def test_full_amplification_replaces_the_global_model(model, server_rate):
  """γ = N/η and idle benign clients: the model becomes the attacker's."""
  federation, attack = make_federation(attackers=1, gamma=4 / server_rate)
  idle = federation.mask & federation.attacker[:, jnp.newaxis]
  federation = federation.replace(mask=idle)
  state = make_state(model)
  run = jax.jit(make_round(model, attack, server_rate=server_rate))
  after, _ = run(state, federation, KEY)
  client_key = jax.random.split(jax.random.fold_in(KEY, 0))[1]
  attackers, _ = make_training(model)(
    state.params,
    federations.select(federation, 0),
    state.neuron_mask,
    jnp.asarray(True),
    jax.random.fold_in(client_key, 0),
  )
  _close(after.params, attackers)
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), after.params, state.params
  )
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_many_rounds_are_traced_once(model):
  federation, attack = make_federation()
  run = make_round(model, attack)
  block = rounds.make_block(model, chex.assert_max_traces(run, n=1))
  state = make_state(model)
  for length in (1, 5, 2):
    state, _ = block(state, federation, KEY, length)
  # Fine-tuning is the same program: only data differs.
  state = state.replace(neuron_mask=jnp.asarray([True, False] * 3))
  federation = federation.replace(scale=2 * federation.scale)
  state, _ = block(state, federation, KEY, 3)
  assert int(state.round) == 11
  assert block._cache_size() == 1


def test_blocks_of_any_length_give_the_same_bits(model):
  federation, attack = make_federation(gamma=2.0)
  block = rounds.make_block(model, make_round(model, attack, cohort_size=3))
  results = []
  for lengths in ((6,), (1, 2, 3), (5, 1)):
    state = make_state(model)
    for length in lengths:
      state, metrics = block(state, federation, KEY, length)
    results.append((state, metrics))
  chex.assert_trees_all_equal(*results)


def test_jit_equals_eager(model):
  federation, attack = make_federation(clients=1, samples=4)
  training = make_training(model, epochs=1, momentum=0.0)
  run = make_round(model, attack, training=training)
  state = make_state(model)
  with jax.disable_jit():
    eager, _ = run(state, federation, KEY)
  jitted, _ = jax.jit(run)(state, federation, KEY)
  _close(jitted.params, eager.params)


def test_fine_tuning_keeps_pruned_neurons_at_exactly_zero(model):
  """Also where the attacker sends an update that would revive them."""
  federation, attack = make_federation(gamma=3.0)

  def revive(updates, cohort, active):
    updates = attack.updates(updates, cohort, active)
    return jax.tree.map(lambda leaf: leaf + 0.1, updates)

  mask = jnp.asarray([True, False, True, True, False, True])
  state = make_state(model)
  state = state.replace(
    params=models.mask_neurons(model, state.params, mask), neuron_mask=mask
  )
  run = jax.jit(make_round(model, attack._replace(updates=revive)))
  for _ in range(3):
    state, _ = run(state, federation, KEY)
  images = federation.images[0]
  active = model.activations(state.params, model.stem(state.params, images))
  assert (active[..., ~mask] == 0).all()
  assert (active[..., mask] != 0).any()


@given(seed=st.integers(0, 999), clients=st.integers(1, 20), data=st.data())
def test_cohorts_are_sampled_without_replacement(seed, clients, data):
  size = data.draw(st.integers(1, clients))
  chosen = np.asarray(
    rounds.sample_cohort(jnp.arange(clients), size, jax.random.key(seed))
  )
  assert chosen.shape == (size,) == np.unique(chosen).shape
  assert chosen.min() >= 0 and chosen.max() < clients


def test_cohorts_differ_between_rounds_and_reach_everyone():
  ids = jnp.arange(10)
  sample = jax.jit(rounds.sample_cohort, static_argnums=1)
  counts = np.zeros(10)
  for index in range(300):
    counts[np.asarray(sample(ids, 3, jax.random.fold_in(KEY, index)))] += 1
  # Each is expected 90 times, with a standard deviation of 8.
  assert counts.min() > 55 and counts.max() < 125


def test_only_the_cohort_trains(model):
  federation, _ = make_federation(attackers=0)
  run = jax.jit(make_round(model, cohort_size=2))
  state = make_state(model)
  sample_key, _ = jax.random.split(jax.random.fold_in(KEY, 0))
  chosen = rounds.sample_cohort(federation.ids, 2, sample_key)
  before, _ = run(state, federation, KEY)
  others = ~jnp.isin(federation.ids, chosen)
  changed = jnp.where(
    others.reshape(-1, 1, 1, 1, 1), 255 - federation.images, federation.images
  )
  after, _ = run(state, federation.replace(images=changed), KEY)
  chex.assert_trees_all_equal(after.params, before.params)


def test_a_schedule_multiplies_the_local_steps_round_by_round(model):
  federation, attack = make_federation(gamma=2.0)

  def halves(done):
    return jnp.exp2(-done.astype(jnp.float32))

  scheduled = jax.jit(make_round(model, attack, schedule=halves))
  plain = jax.jit(make_round(model, attack))
  state = expected = make_state(model)
  for index in range(3):
    state, _ = scheduled(state, federation, KEY)
    slower = federation.replace(rate=federation.rate * 0.5**index)
    expected, _ = plain(expected, slower, KEY)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-6)


def test_the_first_bad_round_is_told(model):
  federation, _ = make_federation()

  def poison(updates, cohort, active):
    return jax.tree.map(lambda leaf: leaf * jnp.inf, updates)

  attack = make_federation(start=2)[1]

  def updates(values, cohort, active):
    bad = poison(values, cohort, active)
    return jax.tree.map(lambda a, b: jnp.where(active.any(), a, b), bad, values)

  federation = federation.replace(attack_start=jnp.full(4, 2, jnp.int32))
  block = rounds.make_block(
    model, make_round(model, attack._replace(updates=updates))
  )
  state, metrics = block(make_state(model), federation, KEY, 2)
  assert int(metrics.bad_round) == 0 and np.isfinite(metrics.loss)
  state, metrics = block(state, federation, KEY, 4)
  assert int(metrics.bad_round) == 3


@pytest.mark.parametrize(
  "aggregator",
  [aggregators.mean(), aggregators.median()],
  ids=["mean", "median"],
)
def test_the_loss_is_that_of_clients_with_samples(model, aggregator):
  federation, attack = make_federation(attackers=0)
  run = jax.jit(make_round(model, attack, aggregator=aggregator))
  alone = federation.replace(mask=federation.mask.at[1:].set(False))
  losses = []
  for client in range(4):
    only = federation.replace(
      mask=federation.mask & (jnp.arange(4) == client)[:, None]
    )
    losses.append(float(run(make_state(model), only, KEY)[1].loss))
  loss = float(run(make_state(model), federation, KEY)[1].loss)
  assert loss == pytest.approx(np.mean(losses), rel=1e-5)
  assert float(run(make_state(model), alone, KEY)[1].loss) == losses[0] > 0.5
  nobody = federation.replace(mask=jnp.zeros_like(federation.mask))
  state = make_state(model)
  after, metrics = run(state, nobody, KEY)
  assert float(metrics.loss) == 0 and int(metrics.bad_round) == 0
  chex.assert_trees_all_equal(after.params, state.params)


@pytest.mark.parametrize(
  "aggregator, stands",
  [(aggregators.mean(), False), (aggregators.trimmed_mean(0.25), True)],
  ids=["mean", "trimmed_mean"],
)
def test_a_robust_rule_withstands_a_client_that_diverges(
  model, aggregator, stands
):
  federation, attack = make_federation()
  # The attacker's own steps, so that its loss is not finite.
  rate = jnp.where(federation.attacker, 1e30, 1.0)
  federation = federation.replace(rate=federation.rate * rate)
  run = jax.jit(make_round(model, attack, aggregator=aggregator))
  state, metrics = run(make_state(model), federation, jax.random.key(3))
  assert (int(metrics.bad_round) == 0) == stands
  assert bool(jnp.isfinite(metrics.loss)) == stands
  finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]
  assert all(finite) == stands
  if stands:
    assert 0 < float(metrics.loss) < 10


def test_training_learns_the_task_and_the_backdoor(model):
  federation, attack = make_federation(samples=40, attackers=2, gamma=2.0)
  block = rounds.make_block(model, make_round(model, attack))
  state, metrics = block(make_state(model), federation, KEY, 40)
  images, labels = make_images(200, seed=5)
  clean = evaluate.accuracy(
    model, state.params, evaluate.batched(images, labels)
  )
  success = evaluate.accuracy(
    model,
    state.params,
    evaluate.backdoored(
      images,
      labels,
      trigger=triggers.from_pixels(TRIGGER, images.shape[1:]),
      victim_label=VICTIM,
      target_label=TARGET,
    ),
  )
  assert float(clean) > 0.95 and float(success) > 0.95
  assert float(metrics.loss) < 0.2


def test_a_block_donates_its_state(model):
  federation, attack = make_federation()
  block = rounds.make_block(model, make_round(model, attack))
  state = make_state(model)
  kept = copy(state)
  block(state, federation, KEY, 1)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept.params))
