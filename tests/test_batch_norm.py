"""Batch normalisation: what trains, what is averaged, what is pruned."""

import chex
from conftest import IMAGE_SHAPE
from conftest import NUM_CLASSES
from conftest import TINY
from conftest import Head
from conftest import Stem
from conftest import Target
from conftest import make_federation
from conftest import make_round
from conftest import make_state
from conftest import make_training
from flax import linen as nn
from flax import traverse_util
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fljax import aggregators
from fljax import attacks
from fljax import errors
from fljax import federation as federations
from fljax import layers
from fljax import local
from fljax import models
from fljax import networks
from fljax.cleanse import pipeline

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.integers(0, 256, (6, *IMAGE_SHAPE), np.uint8))
ALL = jnp.ones(6, bool)


def build(forms=None):
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(networks.NETWORKS, "tiny_bn", TINY._replace(norm=True))
    return networks.build(
      "tiny_bn", image_shape=IMAGE_SHAPE, num_classes=NUM_CLASSES, forms=forms
    )


@pytest.fixture(scope="module")
def model():
  return build()


@pytest.fixture(scope="module")
def params(model):
  """As after some training: no leaf is what it began as."""
  leaves, tree = jax.tree.flatten(model.init(KEY))
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return tree.unflatten(
    leaf + jax.random.uniform(key, leaf.shape, minval=0.1, maxval=0.5)
    for leaf, key in zip(leaves, keys, strict=True)
  )


def statistics(params):
  """By path, the running statistics."""
  leaves = traverse_util.flatten_dict(params)
  return {path: leaf for path, leaf in leaves.items() if "batch_stats" in path}


def test_every_convolution_has_its_statistics(model, params):
  names = sorted("/".join(path) for path in statistics(params))
  assert names == [
    f"{part}/batch_stats/BatchNorm_0/norm/{name}"
    for part in ("stem", "target")
    for name in ("mean", "var")
  ]
  # Bias, scale, shift, mean and variance.
  assert len(model.neuron_paths) == len(set(model.neuron_paths)) == 5


def test_inference_does_not_look_at_the_rest_of_the_batch(model, params):
  together = models.apply(model, params, IMAGES)
  alone = jnp.concatenate(
    [models.apply(model, params, image[jnp.newaxis]) for image in IMAGES]
  )
  chex.assert_trees_all_close(together, alone, rtol=1e-5)


def test_training_normalises_by_the_batch():
  inputs = jax.random.normal(KEY, (5, 3, 3, 2)) * 4 + 7
  module = layers.BatchNorm()
  variables = module.init(KEY, inputs)
  outputs, changed = module.apply(
    variables, inputs, train=True, mutable=["batch_stats"]
  )
  axes = (0, 1, 2)
  mean, var = inputs.mean(axis=axes), inputs.var(axis=axes)
  expected = (np.asarray(inputs) - np.asarray(mean)) / np.sqrt(
    np.asarray(var) + 1e-5
  )
  np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
  moved = changed["batch_stats"]["norm"]
  # From 0 and 1.
  chex.assert_trees_all_close(moved["mean"], 0.1 * mean, rtol=1e-5)
  chex.assert_trees_all_close(moved["var"], 0.9 + 0.1 * var, rtol=1e-5)


@settings(max_examples=8)
@given(seed=st.integers(0, 99), counted=st.integers(1, 5))
def test_samples_that_do_not_count_change_nothing(model, params, seed, counted):
  rng = np.random.default_rng(seed)
  other = jnp.asarray(rng.integers(0, 256, IMAGES.shape, np.uint8))
  mask = jnp.arange(6) < counted
  padded = jnp.where(mask.reshape(-1, 1, 1, 1), IMAGES, other)
  learn = jax.jit(models.in_training, static_argnums=0)
  active, moved = learn(model, params, padded, mask)
  expected, expected_moved = learn(
    model, params, IMAGES[:counted], jnp.ones(counted, bool)
  )
  chex.assert_trees_all_close(active[:counted], expected, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(moved, expected_moved, rtol=1e-4)


@settings(max_examples=8)
@given(seed=st.integers(0, 99))
def test_removed_neurons_are_silent_at_inference_and_in_training(
  model, params, seed
):
  stays = jnp.asarray(np.random.default_rng(seed).random(model.neurons) < 0.5)
  masked = models.mask_neurons(model, params, stays)
  before = model.activations(params, model.stem(params, IMAGES))
  after = model.activations(masked, model.stem(masked, IMAGES))
  assert (after[..., ~stays] == 0).all()
  chex.assert_trees_all_equal(after[..., stays], before[..., stays])
  active, _ = models.in_training(model, masked, IMAGES, ALL)
  assert (active[..., ~stays] == 0).all()


def train(model, params, stays=None, *, mask=None, precision="default"):
  optimizer = optax.chain(
    optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
  )
  training = local.sgd_training(
    model, optimizer, epochs=1, batch_size=6, precision=precision
  )
  client = federations.select(make_federation(attackers=0)[0], 0)
  client = client.replace(
    images=IMAGES,
    labels=jnp.arange(6, dtype=jnp.int32) % NUM_CLASSES,
    mask=ALL if mask is None else mask,
    poisoned=jnp.zeros(6, bool),
  )
  stays = jnp.ones(model.neurons, bool) if stays is None else stays
  return jax.jit(training)(params, client, stays, jnp.asarray(False), KEY)


@pytest.mark.parametrize("precision", ["default", "bfloat16"])
def test_a_step_moves_statistics_by_the_batch_and_not_by_decay(
  model, params, precision
):
  trained, _ = train(model, params, precision=precision)
  found = statistics(trained)
  _, moved = models.in_training(model, params, IMAGES, ALL)
  expected = statistics(models.with_running_statistics(params, moved))
  close = 1e-4 if precision == "default" else 0.02
  for path, leaf in found.items():
    assert leaf.dtype == jnp.float32
    np.testing.assert_allclose(leaf, expected[path], rtol=close, atol=close)
  assert not np.allclose(
    models.target_kernel(model, trained), models.target_kernel(model, params)
  )


def test_bfloat16_does_not_round_what_is_kept_of_statistics(model, params):
  rounded = models.as_type(params, jnp.dtype(jnp.bfloat16))
  chex.assert_trees_all_equal(statistics(rounded), statistics(params))
  assert models.target_kernel(model, rounded).dtype == jnp.bfloat16


def test_a_batch_of_padding_alone_changes_nothing(model, params):
  trained, loss = train(model, params, mask=jnp.zeros(6, bool))
  chex.assert_trees_all_equal(trained, params)
  assert float(loss) == 0


def test_pruned_neurons_stay_removed_in_training(model, params):
  stays = jnp.arange(model.neurons) % 2 == 0
  masked = models.mask_neurons(model, params, stays)
  trained, loss = train(model, masked, stays)
  assert np.isfinite(float(loss))
  chex.assert_trees_all_equal(
    models.mask_neurons(model, trained, stays), trained
  )
  active = model.activations(trained, model.stem(trained, IMAGES))
  assert (active[..., ~stays] == 0).all()


def test_the_server_averages_statistics_like_weights(model):
  """Section III-A: the mean of what all clients send, of every number."""
  federation, attack = make_federation(attackers=0)
  state = make_state(model)
  training = make_training(model, epochs=1, momentum=0.0)
  run = jax.jit(make_round(model, attack, training=training))
  after, _ = run(state, federation, KEY)
  alone = []
  for client in range(federation.num_clients):
    one = jax.tree.map(lambda leaf: leaf[client : client + 1], federation)  # noqa: B023
    alone.append(run(state, one, KEY)[0].params)
  mean = jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(axis=0), *alone)
  chex.assert_trees_all_close(after.params, mean, rtol=1e-4, atol=1e-6)
  before = statistics(state.params)
  for path, leaf in statistics(after.params).items():
    assert not np.allclose(leaf, before[path])


@settings(max_examples=4)
@given(below=st.floats(-100, 0))
def test_a_variance_below_zero_counts_as_zero(model, params, below):
  """What an amplified update may leave behind."""

  def with_variance(value):
    leaves = traverse_util.flatten_dict(params)
    changed = {
      path: jnp.full_like(leaf, value) if path[-1] == "var" else leaf
      for path, leaf in leaves.items()
    }
    return traverse_util.unflatten_dict(changed)

  outputs = models.apply(model, with_variance(below), IMAGES)
  assert jnp.isfinite(outputs).all()
  chex.assert_trees_all_equal(
    outputs, models.apply(model, with_variance(0.0), IMAGES)
  )


def test_a_liar_about_statistics_does_not_move_a_trimmed_mean(model):
  """One of four that sends statistics a thousand off: a rule of all leaves."""
  federation, attack = make_federation(attackers=0)
  state = make_state(model)
  lies = jnp.arange(4) == 2

  def lying(updates, cohort, active):
    updates = attack.updates(updates, cohort, active)

    def lie(path, leaf):
      away = jnp.where(lies, 1000.0, 0.0)
      away = away.reshape((-1,) + (1,) * (leaf.ndim - 1))
      return leaf + away if "batch_stats" in str(path) else leaf

    return jax.tree_util.tree_map_with_path(lie, updates)

  def after(sent, rule):
    run = make_round(model, sent, aggregator=rule)
    return statistics(jax.jit(run)(state, federation, KEY)[0].params)

  honest = after(attack, aggregators.mean())
  liar = attack._replace(updates=lying, rowwise=False)
  trimmed = after(liar, aggregators.trimmed_mean(0.25))
  mean = after(liar, aggregators.mean())
  for path, leaf in honest.items():
    assert float(jnp.abs(mean[path] - leaf).min()) > 200
    assert float(jnp.abs(trimmed[path] - leaf).max()) < 5


def test_an_attacker_that_avoids_neurons_sends_nothing_of_theirs(model):
  """Section VI-B, attack 2: neither weights nor statistics."""
  federation, attack = make_federation(attackers=1)
  state = make_state(model)
  one = jax.tree.map(lambda leaf: leaf[:1], federation)
  chained = attacks.chain(attack, attacks.pruning_aware(model, [1, 4]))
  training = make_training(model, attackers_hook=chained.local)
  run = jax.jit(make_round(model, chained, training=training))
  after, _ = run(state, one, KEY)
  before = state.params["target"]
  for path in (model.kernel_path, *model.neuron_paths):
    old, new = (
      np.asarray(traverse_util.flatten_dict(tree)[path])
      for tree in (before, after.params["target"])
    )
    np.testing.assert_array_equal(new[..., [1, 4]], old[..., [1, 4]])
    assert path[-1] == "bias" or (new[..., 0] != old[..., 0]).any()


@pytest.mark.parametrize("conv", ["winograd", "slices", "lax"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_do_not_depend_on_the_form(params, conv, dtype):
  """Pooling follows a normalisation that XLA may compute twice."""
  rounded = models.as_type(params, jnp.dtype(dtype))
  found = []
  for forms in (layers.Forms(conv, "reshape"), layers.Forms("lax", "lax")):
    network = build(forms)

    def loss(params, network=network):
      active, moved = models.in_training(network, params, IMAGES, ALL)
      logits = network.head(params, active).astype(jnp.float32)
      return jnp.square(logits).sum(), moved

    found.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(rounded))
  (value, moved), grads = found[0]
  (expected, expected_moved), expected_grads = found[1]
  close = 1e-3 if dtype == jnp.float32 else 0.1
  assert float(value) == pytest.approx(float(expected), rel=close)
  chex.assert_trees_all_close(moved, expected_moved, rtol=close, atol=close)
  leaves, others = (
    traverse_util.flatten_dict(tree) for tree in (grads, expected_grads)
  )
  for path in leaves:
    # A bias before a normalisation has no gradient but rounding.
    if "batch_stats" not in path and path[1:] != ("Conv_0", "bias"):
      one, other = (
        np.ravel(tree[path]).astype(np.float64) for tree in (leaves, others)
      )
      # Of eight bits many are equal, which forms share in ways of their own.
      size = np.linalg.norm(one) * np.linalg.norm(other)
      assert one @ other > (1 - close / 2) * size


def test_what_goes_by_weights_alone_refuses_a_normalised_target(model, params):
  with pytest.raises(errors.ConfigError, match="for models without"):
    pipeline.prune_outliers(model, params)
  with pytest.raises(errors.ConfigError, match="for models without"):
    attacks.gain_limited(model, 1.0)


# --- a user's own network ----------------------------------------------------


class NormStem(nn.Module):
  @nn.compact
  def __call__(self, x, train=False, mask=None):
    x = nn.Conv(3, (3, 3), strides=2)(x)
    if mask is not None:
      mask = mask.reshape(-1, 1, 1, 1)
    return nn.relu(nn.BatchNorm(use_running_average=not train)(x, mask=mask))


class NormTarget(nn.Module):
  """Without a scale, as ReLU would undo it."""

  @nn.compact
  def __call__(self, x, train=False, mask=None):
    x = nn.Conv(6, (3, 3))(x)
    if mask is not None:
      mask = mask.reshape(-1, 1, 1, 1)
    norm = nn.BatchNorm(use_running_average=not train, use_scale=False)
    return nn.relu(norm(x, mask=mask))


class NormFirst(nn.Module):
  """As many channels before the convolution as after it."""

  @nn.compact
  def __call__(self, x, train=False, mask=None):
    if mask is not None:
      mask = mask.reshape(-1, 1, 1, 1)
    norm = nn.BatchNorm(use_running_average=not train)
    return nn.relu(nn.Conv(3, (3, 3))(norm(x, mask=mask)))


class Grouped(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.GroupNorm(num_groups=2)(nn.Conv(6, (3, 3))(x)))


class FlatMask(nn.Module):
  @nn.compact
  def __call__(self, x, train=False, mask=None):
    return nn.BatchNorm(use_running_average=not train)(x, mask=mask)


class NoMask(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.BatchNorm(use_running_average=not train)(x)


class NormHead(nn.Module):
  @nn.compact
  def __call__(self, x, train=False, mask=None):
    del mask
    x = nn.Dense(NUM_CLASSES)(x.reshape(x.shape[0], -1))
    return nn.BatchNorm(use_running_average=not train)(x)


def own(**parts):
  parts = {"stem": Stem(), "target": Target(), "head": Head(), **parts}
  return models.from_flax(
    **parts, image_shape=IMAGE_SHAPE, num_classes=NUM_CLASSES
  )


@pytest.mark.parametrize(
  "parts", [{"stem": NormStem()}, {"target": NormTarget()}], ids=lambda p: [*p]
)
def test_a_users_network_may_normalise_batches(parts):
  model = own(**parts)
  params = model.init(KEY)
  trained, _ = train(model, params)
  before = statistics(params)
  assert len(before) == 2
  for path, leaf in statistics(trained).items():
    assert not np.allclose(leaf, before[path])
  stays = jnp.arange(6) < 3
  masked = models.mask_neurons(model, trained, stays)
  active = model.activations(masked, model.stem(masked, IMAGES))
  assert (active[..., ~stays] == 0).all() and (active[..., stays] > 0).any()


@pytest.mark.parametrize(
  "parts, message",
  [
    ({"stem": NoMask()}, r"train=False and mask=None.*; mask is missing"),
    ({"head": NormHead()}, "the model's head keeps batch_stats"),
    ({"stem": FlatMask()}, "does not accept images"),
    ({"target": NormFirst()}, "mixes its neurons"),
    ({"target": Grouped()}, "value other than zero"),
  ],
)
def test_what_cannot_be_normalised_is_refused(parts, message):
  with pytest.raises(errors.ConfigError, match=message):
    own(**parts)
