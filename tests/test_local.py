import chex
from conftest import make_federation
from conftest import make_training
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fljax import attacks
from fljax import federation as federations
from fljax import local
from fljax import models
from fljax import triggers


@given(
  seed=st.integers(0, 99),
  samples=st.integers(1, 20),
  batch=st.integers(1, 8),
)
def test_an_epoch_visits_every_sample_that_counts_once(seed, samples, batch):
  mask = np.random.default_rng(seed).random(samples) < 0.6
  batches = np.asarray(
    local.epoch_batches(jax.random.key(seed), jnp.asarray(mask), batch)
  )
  assert batches.shape == (-(-samples // batch), batch)
  flat = batches.ravel()
  np.testing.assert_array_equal(np.sort(flat[flat < samples]), range(samples))
  # Padding comes last, so that no more batches than needed are mixed ones.
  counts = mask[flat[flat < samples]]
  assert (np.diff(counts.astype(int)) <= 0).all()


def test_cross_entropy_ignores_padding():
  logits = jax.random.normal(jax.random.key(0), (5, 3))
  labels = jnp.asarray([0, 1, 2, 0, 1])
  mask = jnp.asarray([True, True, False, True, False])
  expected = -np.mean(
    [jax.nn.log_softmax(logits)[i, labels[i]] for i in (0, 1, 3)]
  )
  loss = local.cross_entropy(logits, labels, mask)
  assert float(loss) == pytest.approx(expected, rel=1e-6)
  assert float(local.cross_entropy(logits, labels, jnp.zeros(5, bool))) == 0


def _reference(
  model, params, client, key, *, epochs, batch, rate, l2, momentum
):
  """Local training as a plain loop over batches of Python lists."""
  velocity = jax.tree.map(jnp.zeros_like, params)
  samples = client.labels.shape[0]

  @jax.jit
  def grad(params, images, labels):
    def loss(params):
      logits = models.apply(model, params, images)
      chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits), labels[:, None], axis=1
      )
      kernel = models.target_kernel(model, params)
      return -chosen.mean() + l2 / 2 * jnp.square(kernel).sum()

    return jax.grad(loss)(params)

  for epoch_key in jax.random.split(key, epochs):
    for row in local.epoch_batches(epoch_key, client.mask, batch):
      chosen = [int(i) for i in row if i < samples and client.mask[i]]
      if not chosen:
        continue
      images = []
      for i in chosen:
        image = client.images[i]
        if client.poisoned[i]:
          image = triggers.stamp(image, client.trigger)
        images.append(image)
      grads = grad(
        params, jnp.stack(images), jnp.stack([client.labels[i] for i in chosen])
      )
      velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
      params = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
  return params


@pytest.mark.parametrize("l2, momentum", [(0.0, 0.0), (0.3, 0.5)])
def test_training_equals_a_plain_loop(model, params, l2, momentum):
  federation, _ = make_federation(samples=10)
  client = federations.select(federation, 0)
  client = client.replace(mask=client.mask.at[jnp.asarray([2, 5])].set(False))
  assert client.poisoned.any()
  key = jax.random.key(4)
  train = local.sgd_training(
    model,
    optax.sgd(0.05, momentum=momentum or None),
    epochs=2,
    batch_size=4,
    last_conv_l2=l2,
  )
  mask = jnp.ones(model.neurons, bool)
  trained, loss = jax.jit(train)(params, client, mask, jnp.asarray(True), key)
  expected = _reference(
    model,
    params,
    client,
    key,
    epochs=2,
    batch=4,
    rate=0.05,
    l2=l2,
    momentum=momentum,
  )
  chex.assert_trees_all_close(trained, expected, rtol=1e-4, atol=1e-6)
  assert np.isfinite(loss) and loss > 0


def test_most_steps_end_training_within_an_epoch(model, params):
  federation, _ = make_federation(samples=10, attackers=0)
  client = federations.select(federation, 0)
  mask, active = jnp.ones(model.neurons, bool), jnp.asarray(False)
  key = jax.random.key(4)
  limited = make_training(model, epochs=1, most_steps=2)
  trained, _ = limited(params, client, mask, active, key)
  seen = local.epoch_batches(jax.random.split(key, 1)[0], client.mask, 4)[:2]
  unseen = np.setdiff1d(np.arange(10), seen)
  assert len(unseen) == 2
  changed = client.images.at[unseen].set(255 - client.images[unseen])
  again, _ = limited(params, client.replace(images=changed), mask, active, key)
  chex.assert_trees_all_equal(trained, again)
  whole, _ = make_training(model, epochs=1)(params, client, mask, active, key)
  loose, _ = make_training(model, epochs=1, most_steps=3)(
    params, client, mask, active, key
  )
  chex.assert_trees_all_equal(whole, loose)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(whole, trained)


@given(
  epochs=st.integers(1, 4), steps=st.integers(1, 12), own=st.integers(1, 5)
)
def test_most_steps_count_no_padding(model, params, epochs, steps, own):
  """A small client beside a large one trains as it would alone."""
  federation, _ = make_federation(samples=10, attackers=0)
  padded = federations.select(federation, 0)
  padded = padded.replace(mask=padded.mask & (jnp.arange(10) < own))
  made = local.sgd_steps(
    model, optax.sgd(0.1), epochs=epochs, batch_size=1, most_steps=steps
  )
  active, key = jnp.asarray(False), jax.random.key(4)
  indices, keys = made.batches(padded, active, key)
  assert len(indices) == len(keys) == min(steps, 10 * epochs)
  counting = np.asarray(padded.mask[indices]).sum()
  assert counting == min(steps, own * epochs)
  # Every epoch that is whole has each sample once.
  taken = np.asarray(indices[:counting, 0])
  for begin in range(0, counting - own + 1, own):
    np.testing.assert_array_equal(
      np.sort(taken[begin : begin + own]), np.arange(own)
    )


@given(rate=st.sampled_from([0.25, 0.5, 2.0]), momentum=st.booleans())
def test_a_clients_rate_multiplies_its_learning_rate(
  model, params, rate, momentum
):
  federation, _ = make_federation()
  client = federations.select(federation, 0)
  mask, active = jnp.ones(model.neurons, bool), jnp.asarray(True)

  def trained(learning_rate, client):
    optimizer = optax.chain(
      optax.add_decayed_weights(0.1),
      optax.sgd(learning_rate, momentum=0.5 if momentum else None),
    )
    train = local.sgd_training(model, optimizer, epochs=2, batch_size=4)
    return train(params, client, mask, active, jax.random.key(1))[0]

  chex.assert_trees_all_close(
    trained(0.1, client.replace(rate=jnp.float32(rate))),
    trained(0.1 * rate, client),
    rtol=1e-5,
    atol=1e-6,
  )


def test_an_attackers_own_rate_counts_while_it_attacks(model, params):
  federation, _ = make_federation(start=3)
  federation = attacks.own_rate(2.0).data(federation, jax.random.key(0))
  assert federation.attack_rate.tolist() == [2, 1, 1, 1]
  client = federations.select(federation, 0)
  mask = jnp.ones(model.neurons, bool)
  train = make_training(model)

  def trained(client, active):
    return train(params, client, mask, jnp.asarray(active), jax.random.key(1))[
      0
    ]

  same = client.replace(attack_rate=jnp.float32(1))
  chex.assert_trees_all_equal(trained(client, False), trained(same, False))
  chex.assert_trees_all_close(
    trained(client, True), trained(same.replace(rate=jnp.float32(2)), True)
  )


@given(seed=st.integers(0, 99), kind=st.sampled_from(["none", "flip", "crop"]))
def test_augmentation_mirrors_and_shifts(seed, kind):
  rng = np.random.default_rng(seed)
  images = rng.integers(1, 256, (6, 5, 7, 2), np.uint8)
  out = local.augment(jax.random.key(seed), jnp.asarray(images), kind)
  assert out.shape == images.shape and out.dtype == jnp.uint8
  shifts = range(9) if kind == "crop" else [4]
  for image, changed in zip(images, np.asarray(out), strict=True):
    padded = np.pad(image, [(4, 4), (4, 4), (0, 0)])
    possible = [
      padded[row : row + 5, column : column + 7]
      for row in shifts
      for column in shifts
    ]
    if kind != "none":
      possible += [one[:, ::-1] for one in possible]
    assert any((changed == one).all() for one in possible)


def test_augmentation_does_each_half_of_the_time():
  images = jnp.arange(2 * 400, dtype=jnp.uint8).reshape(400, 1, 2, 1)
  out = local.augment(jax.random.key(0), images, "flip")
  mirrored = (out != images).any(axis=(1, 2, 3)).mean()
  assert 0.4 < float(mirrored) < 0.6
  again = local.augment(jax.random.key(1), images, "flip")
  assert (again != out).any()


def test_augmentation_shifts_each_image_by_itself():
  images = jnp.zeros((400, 9, 9, 1), jnp.uint8).at[:, 4, 4].set(255)
  out = np.asarray(local.augment(jax.random.key(0), images, "crop"))
  rows, columns = np.nonzero(out[..., 0])[1:]
  # Mirrored or not, the middle goes to any of 9 x 9 places.
  assert set(rows.tolist()) == set(columns.tolist()) == set(range(9))
  assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) > 70


def test_triggers_are_stamped_after_augmentation(model, params, monkeypatch):
  federation, _ = make_federation()
  client = federations.select(federation, 0)
  mask = jnp.ones(model.neurons, bool)

  def trained(client, augmentation):
    train = make_training(model, augmentation=augmentation)
    return train(params, client, mask, jnp.asarray(True), jax.random.key(1))[0]

  black = client.replace(images=jnp.zeros_like(client.images))
  without = trained(black, "none")
  assert (client.images != 0).any() and client.poisoned.any()
  monkeypatch.setitem(
    local.AUGMENTATIONS, "flip", (lambda key, images: jnp.zeros_like(images),)
  )
  chex.assert_trees_all_equal(trained(client, "flip"), without)


def test_a_client_without_samples_keeps_the_global_model(model, params):
  federation, _ = make_federation()
  client = federations.select(federation, 1)
  client = client.replace(mask=jnp.zeros_like(client.mask))
  mask = jnp.ones(model.neurons, bool)
  trained, loss = make_training(model)(
    params, client, mask, jnp.asarray(False), jax.random.key(0)
  )
  chex.assert_trees_all_equal(trained, params)
  assert float(loss) == 0


def test_padding_changes_nothing_but_the_shuffle(model, params):
  """A padded client learns from its own samples only."""
  federation, _ = make_federation(attackers=0)
  client = federations.select(federation, 0)
  half = client.mask.at[5:].set(False)
  other = client.images.at[5:].set(255)
  mask = jnp.ones(model.neurons, bool)
  run = jax.jit(make_training(model))
  results = [
    run(
      params,
      client.replace(mask=half, images=images),
      mask,
      jnp.asarray(False),
      jax.random.key(1),
    )
    for images in (client.images, other)
  ]
  chex.assert_trees_all_equal(*results)


def test_poisoned_samples_count_only_while_the_client_attacks(model, params):
  federation, _ = make_federation()
  client = federations.select(federation, 0)
  assert client.poisoned.any() and not client.poisoned.all()
  mask = jnp.ones(model.neurons, bool)
  run = jax.jit(make_training(model))
  key = jax.random.key(1)
  benign, _ = run(params, client, mask, jnp.asarray(False), key)
  without = client.replace(mask=client.mask & ~client.poisoned)
  expected, _ = run(params, without, mask, jnp.asarray(True), key)
  chex.assert_trees_all_equal(benign, expected)
  malicious, _ = run(params, client, mask, jnp.asarray(True), key)
  assert any(
    bool((a != b).any())
    for a, b in zip(
      jax.tree.leaves(malicious), jax.tree.leaves(benign), strict=True
    )
  )


def test_pruned_neurons_stay_zero_under_momentum_and_decay(model, params):
  federation, _ = make_federation()
  mask = jnp.asarray([True, False, True, True, False, True])
  masked = models.mask_neurons(model, params, mask)
  optimizer = optax.chain(
    optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
  )
  train = local.sgd_training(model, optimizer, epochs=2, batch_size=4)
  trained, _ = train(
    masked,
    federations.select(federation, 0),
    mask,
    jnp.asarray(True),
    jax.random.key(0),
  )
  kernel = models.target_kernel(model, trained)
  assert (kernel[..., ~mask] == 0).all() and (kernel[..., mask] != 0).any()
  chex.assert_trees_all_equal(
    models.mask_neurons(model, trained, mask), trained
  )
