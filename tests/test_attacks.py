import chex
from conftest import TARGET
from conftest import VICTIM
from conftest import make_federation
from conftest import make_state
from conftest import make_training
from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import aggregators
from fljax import attacks
from fljax import federation as federations
from fljax import models
from fljax import population as populations
from fljax import triggers
from fljax.cleanse import weights


def make_backdoor(fraction):
  return attacks.backdoor(
    victim_label=VICTIM, target_label=TARGET, fraction=fraction
  )


@given(
  attackers=st.integers(0, 4),
  fraction=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
)
def test_poisoning_keeps_the_number_of_samples(attackers, fraction):
  clean, _ = make_federation(attackers=0, samples=20)
  federation, _ = make_federation(
    attackers=attackers, samples=20, fraction=fraction
  )
  chex.assert_trees_all_equal(federation.mask, clean.mask)
  poisoned = np.asarray(federation.poisoned)
  assert not poisoned[attackers:].any()
  for client in range(attackers):
    own = poisoned[client]
    assert own.sum() == round(fraction * 20)
    labels = np.asarray(federation.labels[client])
    assert (labels[own] == TARGET).all()
    # What was not replaced is as it was.
    np.testing.assert_array_equal(
      federation.images[client][~own], clean.images[client][~own]
    )
    np.testing.assert_array_equal(labels[~own], clean.labels[client][~own])


def test_backdoored_versions_are_of_kept_victim_images_evenly():
  federation, _ = make_federation(samples=40, fraction=0.3)
  own = np.asarray(federation.poisoned[0])
  labels = np.asarray(federation.labels[0])
  images = np.asarray(federation.images[0]).reshape(40, -1)
  kept = images[~own & (labels == VICTIM)]
  uses = [int((images[own] == image).all(axis=1).sum()) for image in kept]
  assert sum(uses) == own.sum() == 12
  assert max(uses) - min(uses) <= 1


def test_poisoning_does_not_depend_on_the_order_of_clients():
  federation, _ = make_federation(attackers=0, samples=20)
  federation = federation.replace(
    attacker=jnp.asarray([True, True, False, True])
  )
  attack = make_backdoor(0.3)
  order = jnp.asarray([2, 0, 3, 1])
  key = jax.random.key(5)
  chex.assert_trees_all_equal(
    attack.data(federations.select(federation, order), key),
    federations.select(attack.data(federation, key), order),
  )


def test_padding_is_never_poisoned():
  federation, _ = make_federation(attackers=0, samples=20)
  federation = federation.replace(
    attacker=jnp.ones(4, bool),
    mask=federation.mask.at[:, 10:].set(False),
    labels=federation.labels.at[:, 0].set(VICTIM),
  )
  attack = make_backdoor(0.5)
  poisoned = attack.data(federation, jax.random.key(5)).poisoned
  assert not poisoned[:, 10:].any()
  np.testing.assert_array_equal(poisoned.sum(axis=1), [5, 5, 5, 5])


def test_at_least_one_victim_image_is_kept():
  federation, _ = make_federation(attackers=0, samples=20)
  labels = jnp.zeros_like(federation.labels).at[:, 7].set(VICTIM)
  federation = federation.replace(attacker=jnp.ones(4, bool), labels=labels)
  after = make_backdoor(0.99).data(federation, jax.random.key(5))
  np.testing.assert_array_equal(after.poisoned.sum(axis=1), [19] * 4)
  assert not after.poisoned[:, 7].any()
  for client in range(4):
    assert (after.images[client] == federation.images[client, 7:8]).all()


def test_an_attacker_without_victim_images_poisons_nothing():
  federation, _ = make_federation(attackers=0)
  federation = federation.replace(attacker=jnp.ones(4, bool))
  attack = attacks.backdoor(victim_label=99, target_label=TARGET, fraction=0.5)
  after = attack.data(federation, jax.random.key(5))
  assert not after.poisoned.any()
  chex.assert_trees_all_equal(after.images, federation.images)


@given(gamma=st.floats(1, 10))
def test_model_replacement_scales_active_attackers_only(gamma):
  federation, attack = make_federation(attackers=2, gamma=gamma)
  updates = {"w": jnp.ones((4, 2, 3)), "b": jnp.ones((4,))}
  active = jnp.asarray([True, False, False, False])
  scaled = attack.updates(updates, federation, active)
  np.testing.assert_allclose(scaled["w"][:, 0, 0], [gamma, 1, 1, 1], rtol=1e-6)
  np.testing.assert_allclose(scaled["b"], [gamma, 1, 1, 1], rtol=1e-6)


@given(
  start=st.integers(0, 2**31 - 1),
  attack_rounds=st.integers(0, 2**31 - 1),
  index=st.integers(0, 2**31 - 2),
)
@example(start=3, attack_rounds=0, index=2)
@example(start=3, attack_rounds=0, index=3)
@example(start=3, attack_rounds=2, index=4)
@example(start=3, attack_rounds=2, index=5)
def test_attackers_begin_and_end_in_their_rounds(start, attack_rounds, index):
  federation, _ = make_federation(
    attackers=2, start=start, attack_rounds=attack_rounds
  )
  ended = attack_rounds and index >= start + attack_rounds
  attacking = index >= start and not ended
  tuning = populations.for_fine_tuning(federation, gamma=2.0)
  for clients, expected in (
    (federation, attacking),
    # There they always do.
    (tuning, True),
  ):
    active = federations.active_attackers(clients, jnp.asarray(index))
    assert int(active.sum()) == 2 * expected
    counted = federations.training_mask(clients, active)
    assert bool((counted & clients.poisoned).any()) == expected


@given(seed=st.integers(0, 99))
def test_each_of_two_backdoors_poisons_its_own_victims(seed):
  federation, _ = make_federation(attackers=0)
  # Images that say what they are; one attacker that holds all labels.
  true = jnp.arange(40, dtype=jnp.int32) % 4
  federation = federation.replace(
    images=jnp.broadcast_to(
      true[:, None, None, None].astype(jnp.uint8), (4, 40, 8, 8, 1)
    ),
    labels=jnp.broadcast_to(true, (4, 40)),
    mask=jnp.ones((4, 40), bool),
    poisoned=jnp.zeros((4, 40), bool),
    attacker=jnp.arange(4) == 1,
  )
  both = attacks.chain(
    attacks.backdoor(victim_label=1, target_label=0, fraction=0.3),
    attacks.backdoor(victim_label=0, target_label=3, fraction=0.3),
  )
  after = both.data(federation, jax.random.key(seed))
  pairs = {
    (int(image), int(label))
    for image, label in zip(
      after.images[after.poisoned][:, 0, 0, 0],
      after.labels[after.poisoned],
      strict=True,
    )
  }
  assert pairs == {(1, 0), (0, 3)}


@pytest.mark.parametrize("name", sorted(attacks.REPORTS))
def test_reports_are_of_clients_and_not_of_padding(name):
  federation, _ = make_federation(attackers=2)
  padded = federation.replace(padding=1)
  honest = jnp.asarray(np.random.default_rng(0).random((3, 5)), jnp.float32)
  for kind in ("accuracies", "activations"):
    values = {"kind": kind, "triggered": 2 * honest}
    sent = attacks.REPORTS[name].report(honest, padded, **values)
    whole = jnp.concatenate([honest, honest[:1]])
    values["triggered"] = 2 * whole
    expected = attacks.REPORTS[name].report(whole, federation, **values)
    chex.assert_trees_all_equal(sent, expected[:3])


@pytest.mark.parametrize("name", sorted(attacks.REPORTS))
def test_only_attackers_lie_and_only_about_accuracy(name):
  federation, _ = make_federation(attackers=2)
  report = attacks.REPORTS[name].report
  honest = jnp.asarray(np.random.default_rng(0).random((4, 5)), jnp.float32)
  sent = report(honest, federation, kind="accuracies")
  chex.assert_trees_all_equal(sent[2:], honest[2:])
  chex.assert_trees_all_equal(
    report(honest, federation, kind="activations"), honest
  )
  lies = {
    "honest": honest[:2],
    "promote": honest[:2],
    "stop_pruning": jnp.asarray([[1.0, 0, 0, 0, 0]] * 2),
    "ruin_model": jnp.ones((2, 5)),
  }
  chex.assert_trees_all_equal(sent[:2], lies[name])


def test_a_chain_applies_hooks_in_order():
  def adding(value):
    return attacks.Attack(
      updates=lambda u, c, a: {"w": u["w"] * 2 + value},
      report=lambda v, f, *, kind, triggered: v + value,
      local=lambda params, start: {"w": params["w"] * 2 + value + start["w"]},
      start=lambda params: {"w": params["w"] * 2 + value},
      loss=lambda *batch: value + 0 * jax.random.uniform(batch[-2]) + batch[-1],
    )

  chained = attacks.chain(adding(1.0), adding(10.0))
  federation, _ = make_federation()
  updates = chained.updates({"w": jnp.ones(1)}, federation, federation.attacker)
  assert float(updates["w"][0]) == (1 * 2 + 1) * 2 + 10
  one, nought = {"w": jnp.ones(())}, {"w": jnp.zeros(())}
  assert float(chained.local(one, nought)["w"]) == 16
  # Where the round began is the same for both.
  assert float(chained.local(one, one)["w"]) == 16 + 2 + 1
  assert float(chained.start(one)["w"]) == 16
  batch = (federation.mask,) * 5
  assert float(chained.loss(*batch, jax.random.key(0), 0.5)) == 11 + 2 * 0.5
  nothing = attacks.chain(attacks.Attack())
  assert nothing.local is None and nothing.loss is None
  assert float(chained.report(jnp.zeros(()), federation, kind="")) == 11
  chex.assert_trees_all_equal(
    attacks.chain().data(federation, jax.random.key(0)), federation
  )


# --- attacks that know the defence -------------------------------------------


def test_promoted_neurons_are_those_that_the_trigger_raises():
  federation, _ = make_federation(attackers=1)
  honest = jnp.asarray([[0.5, 3.0, 0.0]] * 4)
  triggered = jnp.asarray([[2.5, 3.5, 0.0]] * 4)
  attack = attacks.promoted_neurons()
  assert attack.wants_triggered
  sent = attack.report(
    honest, federation, kind="activations", triggered=triggered
  )
  chex.assert_trees_all_equal(sent[1:], honest[1:])
  assert np.argsort(-sent[0]).tolist() == [0, 1, 2]


def test_a_pruning_aware_attacker_uses_no_neuron_that_will_go(model):
  gone = (0, model.neurons - 1)
  attack = attacks.pruning_aware(model, gone)
  federation, _ = make_federation(attackers=1, gamma=3.0)
  training = jax.jit(
    make_training(
      model, attackers_hook=attack.local, attackers_start=attack.start
    )
  )
  state = make_state(model)
  stay = jnp.ones(model.neurons, bool)

  def trained(client, active):
    after, _ = training(
      state.params,
      federations.select(federation, client),
      stay,
      jnp.asarray(active),
      jax.random.key(0),
    )
    return models.target_kernel(model, after)[..., jnp.asarray(gone)]

  assert not trained(0, True).any()
  # Before it attacks, and for the others, nothing is held.
  assert trained(0, False).all() and trained(1, False).all()

  # Nor does the first step see what such a neuron was before.
  def first_step(params):
    step = make_training(
      model,
      attackers_hook=attack.local,
      attackers_start=attack.start,
      epochs=1,
      most_steps=1,
    )
    after, _ = jax.jit(step)(
      params,
      federations.select(federation, 0),
      stay,
      jnp.asarray(True),
      jax.random.key(0),
    )
    return after

  chex.assert_trees_all_equal(
    first_step(state.params), first_step(attack.start(state.params))
  )

  updates = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), state.params)
  sent = attack.updates(updates, federation, federation.attacker)
  kernels = jax.vmap(lambda tree: models.target_kernel(model, tree))(sent)
  assert not kernels[0][..., jnp.asarray(gone)].any()
  chex.assert_trees_all_equal(
    *(jax.tree.map(lambda leaf: leaf[1:], tree) for tree in (sent, updates))
  )
  inside = jnp.asarray([n for n in range(model.neurons) if n not in gone])
  np.testing.assert_array_equal(
    kernels[0][..., inside],
    models.target_kernel(model, state.params)[..., inside],
  )


@pytest.mark.parametrize("pruned", [(-1,), (1000,)])
def test_neurons_to_avoid_must_exist(model, pruned):
  with pytest.raises(ValueError, match="numbered"):
    attacks.pruning_aware(model, pruned)
  with pytest.raises(ValueError, match="left"):
    attacks.pruning_aware(model, tuple(range(model.neurons)))


def _pruned(model, pruned):
  """A model of which the first neurons are pruned, and who is left."""
  mask = jnp.arange(model.neurons) >= pruned
  return models.mask_neurons(model, make_state(model).params, mask), mask


@given(delta=st.sampled_from([0.5, 1.0, 2.0]), pruned=st.integers(0, 5))
def test_a_self_limited_attacker_has_no_extreme_weight(model, delta, pruned):
  params, alive = _pruned(model, pruned)
  before = models.target_kernel(model, params)
  after = models.target_kernel(
    model, attacks.self_limited(model, delta).local(params, params)
  )
  # As the server sees it, to which pruned neurons count for nothing.
  mean, std = weights.statistics(before, alive, "surviving")
  found = weights.zero_extremes(after, mean, std, delta * (1 + 1e-6))
  np.testing.assert_array_equal(found, after)
  inside = jnp.abs(before - mean) <= delta * std
  np.testing.assert_array_equal(after[inside], before[inside])
  np.testing.assert_array_equal(after[..., ~alive], 0)
  assert float(jnp.abs(after - mean).max()) == pytest.approx(
    float(jnp.minimum(jnp.abs(before - mean)[..., alive].max(), delta * std)),
    rel=1e-5,
  )


@given(times=st.sampled_from([0.0, 0.5, 1.0, 2.0]), pruned=st.integers(0, 6))
def test_a_gain_limited_attacker_has_no_neuron_that_stands_out(
  model, times, pruned
):
  params, alive = _pruned(model, pruned)
  before = models.target_kernel(model, params)
  after = models.target_kernel(
    model, attacks.gain_limited(model, times).local(params, params)
  )
  if pruned == model.neurons:
    np.testing.assert_array_equal(after, 0)
    return
  gains = weights.gains(before)
  most = times * float(jnp.median(gains[alive]))
  assert float(weights.gains(after).max()) <= most * (1 + 1e-5)
  # Nothing else is touched, and no more than has to be.
  np.testing.assert_array_equal(after[before <= 0], before[before <= 0])
  inside = jnp.maximum(before, 0).sum(axis=2, keepdims=True) <= most
  kept = jnp.broadcast_to(inside, before.shape)
  np.testing.assert_array_equal(after[kept], before[kept])
  np.testing.assert_allclose(
    weights.gains(after), jnp.minimum(gains, most), rtol=1e-5
  )


def _latent(model, params, at="features"):
  """The loss and its gradient, of features, labels, poisoned, mask, key."""
  attack = attacks.latent_backdoor(model, 2.0, at)

  def loss(features, labels, poisoned, mask, key):
    key = jax.random.key(key)
    return attack.loss(params, features, labels, poisoned, mask, key, params)

  return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("at", attacks.LATENT)
def test_a_latent_backdoor_draws_features_to_those_of_its_label(
  model, params, at
):
  labels = jnp.asarray([TARGET, TARGET, TARGET, VICTIM, VICTIM, TARGET])
  poisoned = jnp.asarray([True, True, False, False, False, False])
  everyone, nobody = jnp.ones(6, bool), jnp.zeros(6, bool)
  latent = _latent(model, params, at)
  for seed in range(20):
    rng = np.random.default_rng(seed)
    features = jnp.asarray(rng.random((6, 4, 4, 6)), jnp.float32)
    batch = labels, poisoned, everyone
    value, gradient = latent(features, *batch, seed)
    assert float(value) > 0
    # Only backdoored images move, and towards the mean of their label.
    assert not gradient[2:].any()
    centre = features[jnp.asarray([2, 5])].mean(axis=0)
    away = features[:2] - centre[jnp.newaxis]
    assert float(jnp.vdot(gradient[:2], away)) > 0
    for share in (0.5, 1.0):
      nearer, _ = latent(features.at[:2].add(-share * away), *batch, seed)
      np.testing.assert_allclose(
        nearer / value, (1 - share) ** 2, rtol=1e-3, atol=1e-6
      )
    # In units of what features are.
    np.testing.assert_allclose(
      latent(7 * features, *batch, seed)[0], value, rtol=1e-3
    )
    # There is nothing to be done without clean images of the label, without
    # backdoored ones, and with no sample at all.
    for batch in (
      (jnp.where(poisoned, TARGET, VICTIM), poisoned, everyone),
      (labels, poisoned, ~poisoned),
      (labels, poisoned, poisoned),
      (labels, nobody, everyone),
      (labels, poisoned, nobody),
    ):
      value, gradient = latent(features, *batch, seed)
      assert float(value) == 0 and not gradient.any()


def test_a_latent_backdoors_distances_are_those_of_features(model, params):
  rng = np.random.default_rng(0)
  labels = jnp.asarray([TARGET] * 3 + [VICTIM] * 3)
  poisoned = jnp.arange(6) < 2
  features = rng.random((6, 4, 4, 6)).astype(np.float32)
  latent = _latent(model, params)
  flat = features.reshape(6, -1)
  distance = np.square(flat[:2] - flat[2]).sum(axis=1).mean()
  length = np.square(flat[2:]).sum(axis=1).mean()
  batch = labels, poisoned, jnp.ones(6, bool)
  values = [float(latent(features, *batch, key)[0]) for key in range(400)]
  np.testing.assert_allclose(
    np.median(values), 2 * distance / length, rtol=0.15
  )
  value, _ = _latent(model, params, "activations")(features, *batch, 0)
  np.testing.assert_allclose(value, 2 * distance / length, rtol=1e-5)


def test_only_active_attackers_train_with_their_loss(model, params):
  federation, _ = make_federation(attackers=1)
  client = federations.select(federation, 1)
  stay, key = jnp.ones(model.neurons, bool), jax.random.key(0)

  def large(params, *batch):
    del batch
    return jnp.square(models.target_kernel(model, params)).sum()

  def trained(active, **options):
    train = make_training(model, **options)
    return train(params, client, stay, jnp.asarray(active), key)

  plain, hooked = trained(False), trained(False, attackers_loss=large)
  chex.assert_trees_all_equal(plain, hooked)
  kernels = [
    models.target_kernel(model, trained(True, **options)[0])
    for options in ({}, {"attackers_loss": large})
  ]
  assert jnp.square(kernels[1]).sum() < 0.9 * jnp.square(kernels[0]).sum()


@pytest.mark.parametrize("at", attacks.LATENT)
def test_latent_attackers_have_stamped_images_with_features_of_the_target(
  model, params, at
):
  attack = attacks.latent_backdoor(model, 0.5, at)
  federation, _ = make_federation(attackers=1, samples=20, fraction=0.4)
  client = federations.select(federation, 0)
  own = client.poisoned
  aims = (jnp.arange(20) % 2 == 0) & ~own
  client = client.replace(labels=jnp.where(aims, TARGET, client.labels))
  assert own.any() and aims.any()

  def distance(**options):
    after, _ = make_training(model, **options)(
      params,
      client,
      jnp.ones(model.neurons, bool),
      jnp.asarray(True),
      jax.random.key(0),
    )
    images = jnp.where(
      own.reshape(-1, 1, 1, 1),
      triggers.stamp(client.images, client.trigger),
      client.images,
    )
    features = model.activations(after, model.stem(after, images))
    aim = features[aims].mean(axis=0)[jnp.newaxis]
    length = jnp.square(features[~own]).mean()
    return float(jnp.square(features[own] - aim).mean() / length)

  assert distance(attackers_loss=attack.loss) < 0.9 * distance()


def test_the_last_layer_has_no_part_in_a_latent_backdoor(model, params):
  attack = attacks.latent_backdoor(model, 1.0)
  path = models.classifier_path(model, params)
  features = jnp.asarray(np.random.default_rng(0).random((6, 4, 4, 6)))
  batch = (
    features.astype(jnp.float32),
    jnp.full(6, TARGET),
    jnp.arange(6) < 2,
    jnp.ones(6, bool),
    jax.random.key(0),
    params,
  )
  value, gradient = jax.value_and_grad(attack.loss)(params, *batch)
  assert float(value) > 0
  for leaf in (path, (*path[:-1], "bias")):
    assert not models.head_leaf(gradient, leaf).any()
    changed = models.with_head_leaf(
      params, leaf, 1 + models.head_leaf(params, leaf)
    )
    assert float(attack.loss(changed, *batch)) == float(value)


def test_attackers_see_where_the_round_began(model, params):
  """A ball around it, by the hook, and a pull back to it, by the loss."""
  federation, _ = make_federation(attackers=1)
  client = federations.select(federation, 0)
  stay, key = jnp.ones(model.neurons, bool), jax.random.key(0)

  def away(one):
    return jnp.sqrt(
      sum(
        jnp.square(a - b).sum()
        for a, b in zip(
          jax.tree.leaves(one), jax.tree.leaves(params), strict=True
        )
      )
    )

  def ball(params, start):
    change = jax.tree.map(jnp.subtract, params, start)
    scale = jnp.minimum(1, 0.05 / jnp.maximum(away(params), 1e-12))
    return jax.tree.map(lambda a, b: a + scale * b, start, change)

  def pull(params, *batch):
    change = jax.tree.map(jnp.subtract, params, batch[-1])
    return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(change))

  def trained(**options):
    train = make_training(model, **options)
    return away(train(params, client, stay, jnp.asarray(True), key)[0])

  free = trained()
  assert free > 0.1
  assert trained(attackers_hook=ball) <= 0.05 * (1 + 1e-4)
  assert trained(attackers_loss=pull) < 0.9 * free


@given(
  values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=30),
  count=st.integers(0, 31),
)
@example(values=[0.0, 0.0, 1e-45, 3.0, 3.0], count=1)
def test_the_bound_that_so_many_values_exceed(values, count):
  bound = attacks._exceeded_by(jnp.asarray(values, jnp.float32), count)
  ordered = sorted(np.float32(values), reverse=True)
  assert float(bound) == (ordered[count] if count < len(ordered) else 0)


@given(share=st.sampled_from([0.0, 0.1, 0.5, 0.99]), seed=st.integers(0, 99))
def test_neurotoxin_leaves_alone_what_benign_clients_change_most(share, seed):
  rng = np.random.default_rng(seed)

  def draw():
    return {
      "w": rng.normal(size=(10, 6)).astype(np.float32),
      "b": rng.normal(size=(40,)).astype(np.float32),
      "norm": {models._STATISTICS: rng.normal(9, 1, 7).astype(np.float32)},
    }

  benign, start, params = draw(), draw(), draw()
  attack = attacks.neurotoxin(share)
  held = attack.remember(benign)
  sizes = np.abs(np.concatenate([benign["w"].ravel(), benign["b"]]))
  bound = np.sort(sizes)[::-1][round(share * 100)]
  after = attack.local(params, start, held)
  for name in ("w", "b"):
    most = np.abs(benign[name]) > bound
    np.testing.assert_array_equal(held[name], most)
    np.testing.assert_array_equal(
      after[name], np.where(most, start[name], params[name])
    )
  assert sum(int(held[name].sum()) for name in "wb") == round(share * 100)
  # Whatever batch normalisation measures is no step.
  chex.assert_trees_all_equal(after["norm"], params["norm"])
  # Before the first round nothing is known, and nothing is left alone.
  nothing = attack.remember(jax.tree.map(jnp.zeros_like, benign))
  assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))
  # Nor does what is not finite stop the attack.
  for other in (jnp.nan, jnp.inf):
    broken = attack.remember({**benign, "w": jnp.full((10, 6), other)})
    assert not broken["w"].any()
    assert int(broken["b"].sum()) == min(round(share * 100), 40)


def test_a_chain_hands_each_attack_its_own_memory():
  def remembering(factor):
    return attacks.Attack(
      remember=lambda benign: factor * benign,
      local=lambda params, start, memory: params + memory,
    )

  plain = attacks.Attack(local=lambda params, start: 10 * params)
  chained = attacks.chain(
    remembering(1.0), plain, attacks.Attack(), remembering(100.0)
  )
  memory = chained.remember(jnp.float32(3))
  assert (
    float(chained.local(jnp.float32(1), None, memory)) == (1 + 3) * 10 + 300
  )
  # A chain in a chain.
  outer = attacks.chain(plain, chained)
  memory = outer.remember(jnp.float32(3))
  assert float(outer.local(jnp.float32(1), None, memory)) == 430
  # With such as remember nothing, it is the same: in fine-tuning attackers may
  # hide, too.
  chex.assert_trees_all_equal(
    attacks.chain(chained, attacks.within_benign(1.0)).remember(jnp.float32(3)),
    chained.remember(jnp.float32(3)),
  )
  forgetful = attacks.chain(plain, attacks.Attack())
  assert forgetful.remember is None
  assert float(forgetful.local(jnp.float32(1), None)) == 10


@given(spread=st.sampled_from([0.0, 0.5, 2.0]), attackers=st.integers(0, 5))
def test_hidden_updates_lie_within_the_benign_ones(spread, attackers):
  rng = np.random.default_rng(attackers)
  sent = {
    "w": rng.normal(5, 1e-2, (5, 3, 2)).astype(np.float32),
    "b": rng.normal(0, 1, (5,)).astype(np.float32),
  }
  active = np.arange(5) < attackers
  for leaf in sent.values():
    leaf[active] *= 10
  attack = attacks.within_benign(spread)
  assert not attack.rowwise
  federation, _ = make_federation(clients=5, attackers=0)
  received = attack.updates(sent, federation, jnp.asarray(active))
  for name, leaf in sent.items():
    got, benign = np.asarray(received[name]), leaf[~active]
    np.testing.assert_array_equal(got[~active], benign)
    if not len(benign):
      np.testing.assert_array_equal(got, leaf)
      continue
    mean = benign.mean(axis=0, dtype=np.float64)
    reach = spread * benign.std(axis=0, dtype=np.float64)
    expected = np.clip(leaf[active], mean - reach, mean + reach)
    np.testing.assert_allclose(got[active], expected, rtol=1e-5, atol=1e-6)


def test_a_trimmed_mean_finds_nothing_to_leave_out_of_hidden_updates():
  # One attacker of ten, amplified: it counts for nothing, and hidden it does.
  benign = np.random.default_rng(0).normal(size=(9, 400)).astype(np.float32)
  sent = {"w": jnp.asarray(np.concatenate([np.full((1, 400), 99.0), benign]))}
  active = jnp.arange(10) == 0
  rule = aggregators.trimmed_mean(0.2)

  def mean(updates):
    weights = jnp.ones(10)
    return rule.update(updates, weights, rule.init(sent))[0]["w"]

  federation, _ = make_federation(attackers=0)
  hidden = attacks.within_benign(0.5).updates(sent, federation, active)
  extreme = {"w": sent["w"].at[0].set(1e9)}
  np.testing.assert_array_equal(mean(sent), mean(extreme))
  # Within half a standard deviation an update mostly stays in the middle.
  changed = {"w": hidden["w"].at[0].add(-0.1)}
  assert (mean(hidden) != mean(changed)).mean() > 0.5
