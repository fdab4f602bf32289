import chex
from conftest import TARGET
from conftest import VICTIM
from conftest import make_federation
from conftest import make_images
from conftest import make_round
from conftest import make_state
from conftest import make_training
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import planted
import pytest

from fljax import errors
from fljax import evaluate
from fljax import federation as federations
from fljax import local
from fljax import models
from fljax import rounds
from fljax.baselines import feature_shift
from fljax.baselines import phases

IMAGES, LABELS = make_images(60, seed=3)
KEY = jax.random.key(0)


def _kernel(model, params):
  return models.head_leaf(params, models.classifier_path(model, params))


def _tune(model, params, mask=None, **options):
  keep = jnp.ones(model.neurons, bool) if mask is None else mask
  return feature_shift.tune(
    model, params, keep, IMAGES, LABELS, key=KEY, **options
  )


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"weight": 0.0},
    {"weight": 5.0, "epochs": 3},
    {"batch_size": 7, "epochs": 2, "learning_rate": 1.0},
    {"gradient_clip": 0.1, "epochs": 1},
  ],
  ids=str,
)
def test_the_last_layer_keeps_its_norm_and_pruned_neurons_stay(
  model, params, options
):
  mask = jnp.asarray([i != 1 for i in range(model.neurons)])
  tuned = _tune(model, params, mask, **options)
  chex.assert_trees_all_close(
    jnp.linalg.norm(_kernel(model, tuned)),
    jnp.linalg.norm(_kernel(model, params)),
    rtol=1e-5,
  )
  chex.assert_trees_all_equal(tuned, models.mask_neurons(model, tuned, mask))
  chex.assert_tree_all_finite(tuned)


def test_a_step_descends_the_loss_with_its_penalty(model, params):
  weight, rate = 0.7, 0.2
  path = models.classifier_path(model, params)
  before = _kernel(model, params)
  # At a rate of nothing the start is seen, but for its norm: every kernel of
  # the same direction ends alike.
  options = {"epochs": 1, "batch_size": len(LABELS), "weight": weight}
  kernel_key, _, _ = jax.random.split(KEY, 3)
  bound = before.shape[0] ** -0.5
  drawn = jax.random.uniform(
    kernel_key, before.shape, minval=-bound, maxval=bound
  )
  start = _tune(model, params, learning_rate=0.0, **options)
  start = models.with_head_leaf(start, path, drawn)

  def loss(params):
    logits = models.apply(model, params, jnp.asarray(IMAGES))
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    return entropy.mean() + weight * jnp.vdot(
      models.head_leaf(params, path), before
    )

  gradient = jax.grad(loss)(start)
  expected = jax.tree.map(lambda p, g: p - rate * g, start, gradient)
  kernel = models.head_leaf(expected, path)
  kernel *= jnp.linalg.norm(before) / jnp.linalg.norm(kernel)
  expected = models.with_head_leaf(expected, path, kernel)
  tuned = _tune(model, params, learning_rate=rate, **options)
  chex.assert_trees_all_close(tuned, expected, atol=1e-5)


def test_the_penalty_turns_the_last_layer_away(model, params):
  before = _kernel(model, params)
  products = [
    float(jnp.vdot(_kernel(model, _tune(model, params, weight=w)), before))
    for w in (0.0, 0.1, 1.0)
  ]
  assert products[0] > products[1] > products[2]


def test_the_planted_backdoor_is_gone():
  model, params = planted.model(), planted.params()
  images, labels = make_images(400, seed=3)
  stamped = evaluate.backdoored(
    *make_images(60, seed=4),
    trigger=planted.TRIGGER,
    victim_label=0,
    target_label=TARGET,
    over="others",
    batch_size=25,
  )
  clean = evaluate.batched(*make_images(60, seed=4), batch_size=25)
  assert evaluate.measure(model, params, stamped) > 0.9
  after = phases.shift_features(
    model,
    params,
    jnp.ones(model.neurons, bool),
    evaluate.batched(images, labels, batch_size=25),
    key=KEY,
    learning_rate=0.1,
    gradient_clip=0.0,
    weight=0.1,
    epochs=20,
    augmentation="none",
  )
  assert evaluate.measure(model, after.params, stamped) < 0.1
  assert evaluate.measure(model, after.params, clean) > 0.9
  assert after.neuron_mask.all() and not after.facts


def _of_clients(model, params, federation, *, attacking, extra, told=()):
  """What the first client makes of a model in a round."""
  train = make_training(model, extra=extra)
  client = federations.select(federation, 0)
  own = {"told": told} if extra is not None else {}
  stay = jnp.ones(model.neurons, bool)
  return train(params, client, stay, jnp.asarray(attacking), KEY, **own)[0]


def test_clients_do_what_the_server_does_in_its_steps(model, params):
  start, before = feature_shift.redrawn(model, params, *jax.random.split(KEY))
  path = models.classifier_path(model, params)
  chex.assert_trees_all_equal(before, _kernel(model, params))
  federation, _ = make_federation(attackers=0)
  extra = feature_shift.by_clients(model)
  found = _of_clients(
    model, start, federation, attacking=False, extra=extra, told=(before, 0.3)
  )
  steps = local.sgd_training(
    model,
    optax.chain(
      feature_shift._pulled(path, 0.3 * before),
      optax.sgd(0.05, momentum=0.5),
      feature_shift._of_norm(path, jnp.linalg.norm(before)),
    ),
    epochs=2,
    batch_size=4,
  )
  expected, _ = steps(
    start,
    federations.select(federation, 0),
    jnp.ones(model.neurons, bool),
    jnp.asarray(False),
    KEY,
  )
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
  # All but the last layer is what it was before it was drawn anew.
  kept = models.with_head_leaf(start, path, before)
  bias = models.classifier_bias_path(params, path)
  kept = models.with_head_leaf(kept, bias, models.head_leaf(params, bias))
  chex.assert_trees_all_equal(kept, params)
  assert (models.head_leaf(start, bias) != models.head_leaf(params, bias)).all()


def test_attackers_do_not_follow(model, params):
  federation, _ = make_federation(attackers=1)
  extra = feature_shift.by_clients(model)
  start, told = feature_shift.redrawn(model, params, *jax.random.split(KEY))
  free = _of_clients(model, start, federation, attacking=True, extra=None)
  asked = _of_clients(
    model, start, federation, attacking=True, extra=extra, told=(told, 5.0)
  )
  chex.assert_trees_all_equal(free, asked)
  follows = _of_clients(
    model, start, federation, attacking=False, extra=extra, told=(told, 5.0)
  )
  away = [float(jnp.vdot(_kernel(model, one), told)) for one in (follows, free)]
  assert away[0] < min(away[1], 0)


@pytest.mark.parametrize("follow", [True, False])
def test_clients_take_a_planted_backdoor_out(follow):
  """By the plain mean, one of ten teaching it, if the others follow."""
  model, params = planted.model(), planted.params()
  federation, attack = make_federation(clients=10, samples=40)
  federation = federation.replace(
    # The attacker's own trigger is what was planted.
    trigger=jax.tree.map(lambda leaf: jnp.stack([leaf] * 10), planted.TRIGGER)
  )
  stamped = evaluate.backdoored(
    *make_images(60, seed=4),
    trigger=planted.TRIGGER,
    victim_label=VICTIM,
    target_label=TARGET,
    batch_size=25,
  )
  clean = evaluate.batched(*make_images(60, seed=4), batch_size=25)
  assert evaluate.measure(model, params, stamped) > 0.9
  start, before = feature_shift.redrawn(model, params, *jax.random.split(KEY))
  extra = feature_shift.by_clients(model) if follow else None
  training = make_training(model, extra=extra, **attack.in_steps)
  block = rounds.make_block(model, make_round(model, attack, training=training))
  state = make_state(model).replace(params=start)
  if follow:
    state = state.replace(told=(before, jnp.float32(0.5)))
  tuned, _ = block(state, federation, KEY, 20)
  left = evaluate.measure(model, tuned.params, stamped)
  assert left < 0.2 if follow else left > 0.3
  assert evaluate.measure(model, tuned.params, clean) > 0.9


class _Head(nn.Module):
  """So many linear layers of ten, then one of `last`."""

  layers: int
  last: int

  @nn.compact
  def __call__(self, x):
    x = x.reshape(len(x), -1)
    for _ in range(self.layers):
      x = nn.Dense(10)(x)
    return nn.Dense(self.last)(x)[:, :10]


class _Target(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Conv(2, (3, 3))(x))


def _with_head(head):
  model = models.from_flax(
    stem=None,
    target=_Target(),
    head=head,
    image_shape=(4, 4, 1),
    num_classes=10,
  )
  return model, model.init(KEY)


def test_the_classifier_is_the_last_layer_of_as_many_as_classes():
  model, params = _with_head(_Head(11, 10))
  path = models.classifier_path(model, params)
  assert path == ("Dense_11", "kernel")
  assert models.classifier_bias_path(params, path) == ("Dense_11", "bias")
  params = {"head": {"Dense_11": {"kernel": params["head"]["Dense_11"]}}}
  assert models.classifier_bias_path(params, path) is None
  with pytest.raises(errors.ConfigError, match="has no linear layer"):
    models.classifier_path(*_with_head(_Head(0, 11)))


class _Bottleneck(nn.Module):
  """Flax numbers layers as they are made, not as they are used."""

  @nn.compact
  def __call__(self, x):
    logits = nn.Dense(10)
    return logits(nn.relu(nn.Dense(10)(x.reshape(len(x), -1))))


class _Convolution(nn.Module):
  """What gives the logits is no matrix."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(10)(x)
    return nn.Conv(10, x.shape[1:3], padding="VALID")(x).reshape(len(x), -1)


def test_the_classifier_is_known_by_what_it_does():
  model, params = _with_head(_Bottleneck())
  assert models.classifier_path(model, params) == ("Dense_0", "kernel")
  assert params["head"]["Dense_0"]["kernel"].shape == (10, 10)
  # Where attacks ask, there are shapes alone, and a trace.
  paths = []

  @jax.jit
  def ask(params):
    paths.append(models.classifier_path(model, params))
    return 0

  ask(params)
  assert paths == [("Dense_0", "kernel")]
  with pytest.raises(errors.ConfigError, match="has no linear layer"):
    models.classifier_path(*_with_head(_Convolution()))


@pytest.mark.parametrize("images, epochs", [(0, 3), (9, 0)])
def test_a_new_layer_is_not_left_untaught(model, params, images, epochs):
  with pytest.raises(errors.ConfigError, match="teach a new last layer"):
    feature_shift.tune(
      model,
      params,
      jnp.ones(model.neurons, bool),
      *make_images(9)[:1],
      np.zeros(images, int),
      key=KEY,
      epochs=epochs,
    )


def test_the_gradient_with_its_penalty_is_limited(model, params):
  rate, clip = 0.5, 1e-3

  def step(**options):
    """How far everything but the last kernel, which has its norm, goes."""
    options |= {"epochs": 1, "batch_size": len(LABELS)}
    ends = [
      _tune(model, params, learning_rate=r, **options) for r in (0.0, rate)
    ]
    steps = jax.tree.map(jnp.subtract, *ends)
    path = models.classifier_path(model, params)
    steps = models.with_head_leaf(steps, path, jnp.zeros(()))
    return sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(steps)) ** 0.5

  limited, pulled = (step(gradient_clip=clip, weight=w) for w in (0.0, 3.0))
  assert step(weight=0.0) > rate * clip >= 0.99 * limited
  # The pull takes its share of the limit.
  assert 0 < pulled < limited / 2


def test_a_kernel_of_zeros_does_no_harm(model, params):
  path = models.classifier_path(model, params)
  zero = models.with_head_leaf(
    params, path, jnp.zeros_like(_kernel(model, params))
  )
  tuned = _tune(model, zero)
  chex.assert_tree_all_finite(tuned)
  np.testing.assert_array_equal(_kernel(model, tuned), 0)
