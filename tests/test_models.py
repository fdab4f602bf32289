import chex
from conftest import IMAGE_SHAPE
from conftest import NUM_CLASSES
from conftest import Head
from conftest import Stem
from conftest import Target
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import errors
from fljax import layers
from fljax import models
from fljax import networks

PAPERS = {
  "mnist_small": ((28, 28, 1), 16),
  "mnist_large": ((28, 28, 1), 50),
  "fashion_mnist": ((28, 28, 1), 64),
  "vgg11": ((32, 32, 3), 512),
  "vgg11_quarter": ((32, 32, 3), 128),
  "vgg11_bn": ((32, 32, 3), 512),
  "vgg11_bn_quarter": ((32, 32, 3), 128),
}


def _convolutions_and_dense(params):
  leaves = jax.tree.leaves(params)
  return [sum(leaf.ndim == ndim for leaf in leaves) for ndim in (4, 2)]


@pytest.mark.parametrize(
  "name, counts",
  [
    ("mnist_small", [2, 2]),
    ("mnist_large", [2, 2]),
    ("fashion_mnist", [3, 2]),
    ("vgg11", [8, 3]),
    ("vgg11_quarter", [8, 3]),
    ("vgg11_bn", [8, 1]),
    ("vgg11_bn_quarter", [8, 1]),
  ],
)
def test_the_papers_networks_have_their_layers(name, counts):
  shape, neurons = PAPERS[name]
  model = networks.build(name, image_shape=shape, num_classes=10)
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert _convolutions_and_dense(params) == counts
  assert model.neurons == neurons
  logits = jax.eval_shape(
    lambda p, x: models.apply(model, p, x),
    params,
    jax.ShapeDtypeStruct((2, *shape), jnp.uint8),
  )
  assert logits.shape == (2, 10) and logits.dtype == jnp.float32


def test_channels_of_the_mnist_networks():
  for name, first, last in (("mnist_small", 8, 16), ("mnist_large", 20, 50)):
    model = networks.build(name, image_shape=(28, 28, 1), num_classes=10)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert params["stem"]["Conv_0"]["kernel"].shape == (5, 5, 1, first)
    assert models.target_kernel(model, params).shape == (5, 5, first, last)


@pytest.mark.parametrize("name", ["mnist_small", "fashion_mnist"])
def test_forms_of_layers_do_not_change_a_network(name):
  key = jax.random.key(1)
  images = jax.random.uniform(key, (3, 28, 28, 1))
  outputs = []
  for forms in (
    layers.Forms("blocks", "reshape"),
    layers.Forms("slices", "reshape"),
    layers.Forms("lax", "lax"),
  ):
    model = networks.build(
      name, image_shape=(28, 28, 1), num_classes=10, forms=forms
    )

    @jax.jit
    def run(model=model):
      params = model.init(key)
      active = model.activations(params, model.stem(params, images))
      means = active.reshape(3, -1, model.neurons).mean(axis=1)
      return means, model.head(params, active)

    outputs.append(run())
  chex.assert_trees_all_close(*outputs, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 99))
def test_masking_is_idempotent_and_silences_exactly_the_removed(
  model, params, seed
):
  rng = np.random.default_rng(seed)
  mask = jnp.asarray(rng.random(model.neurons) < 0.5)
  images = jnp.asarray(rng.random((3, *IMAGE_SHAPE), np.float32))
  masked = models.mask_neurons(model, params, mask)
  chex.assert_trees_all_equal(models.mask_neurons(model, masked, mask), masked)
  before = model.activations(params, model.stem(params, images))
  after = model.activations(masked, model.stem(masked, images))
  assert (after[..., ~mask] == 0).all()
  np.testing.assert_array_equal(after[..., mask], before[..., mask])
  chex.assert_trees_all_equal(masked["stem"], params["stem"])
  chex.assert_trees_all_equal(masked["head"], params["head"])
  chex.assert_trees_all_equal_shapes_and_dtypes(masked, params)


def test_masking_equals_multiplying_activations(model, params):
  images = jnp.asarray(np.random.default_rng(0).random((3, *IMAGE_SHAPE)))
  images = images.astype(jnp.float32)
  mask = jnp.asarray([True, False, True, False, True, True])
  active = model.activations(params, model.stem(params, images))
  expected = model.head(params, jnp.where(mask, active, 0))
  actual = models.apply(model, models.mask_neurons(model, params, mask), images)
  chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_the_target_kernel_can_be_replaced(model, params):
  kernel = models.target_kernel(model, params)
  chex.assert_trees_all_equal(
    models.with_target_kernel(model, params, kernel), params
  )
  doubled = models.with_target_kernel(model, params, 2 * kernel)
  chex.assert_trees_all_equal(models.target_kernel(model, doubled), 2 * kernel)
  chex.assert_trees_all_equal(models.target_kernel(model, params), kernel)


def test_inputs_are_normalised_and_limited_to_their_range():
  images = jnp.asarray([[-3.0, 0.0, 0.5, 1.0, 7.0]]).reshape(1, 5, 1, 1)
  out = models.prepare(images, (0.5,), (0.25,))
  np.testing.assert_allclose(out.ravel(), [-2, -2, 0, 2, 2])
  integers = jnp.asarray([-5, 0, 255, 3000]).reshape(1, 4, 1, 1)
  out = models.prepare(integers, (0.5,), (0.25,))
  np.testing.assert_allclose(out.ravel(), [-2, -2, 2, 2])
  whole = jnp.asarray([0, 51, 255], jnp.uint8).reshape(1, 3, 1, 1)
  scaled = whole.astype(jnp.float32) / 255
  chex.assert_trees_all_close(
    models.prepare(whole, (0.1,), (0.3,)),
    models.prepare(scaled, (0.1,), (0.3,)),
  )


def test_extreme_inputs_cannot_reach_the_network(model, params):
  images = jnp.full((1, *IMAGE_SHAPE), 1e6)
  chex.assert_trees_all_equal(
    models.apply(model, params, images),
    models.apply(model, params, jnp.ones((1, *IMAGE_SHAPE))),
  )


# --- a user's own network ----------------------------------------------------


def _own(**changes):
  parts = {
    "stem": Stem(),
    "target": Target(),
    "head": Head(),
    "image_shape": IMAGE_SHAPE,
    "num_classes": NUM_CLASSES,
  }
  return models.from_flax(**{**parts, **changes})


def test_a_users_network_finds_its_kernel_and_bias():
  model = _own()
  assert model.kernel_path == ("Conv_0", "kernel")
  assert model.neuron_paths == (("Conv_0", "bias"),)
  assert model.neurons == 6


def test_a_target_may_be_the_first_layer_and_have_no_bias():
  class NoBias(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.relu(nn.Conv(5, (3, 3), use_bias=False)(x))

  model = _own(stem=None, target=NoBias())
  params = model.init(jax.random.key(0))
  assert model.neuron_paths == () and params["stem"] == {}
  masked = models.mask_neurons(model, params, jnp.zeros(5, bool))
  assert float(jnp.abs(models.target_kernel(model, masked)).sum()) == 0


class _Sigmoid(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.sigmoid(nn.Conv(5, (3, 3))(x))


class _Two(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Conv(5, (3, 3))(nn.Conv(5, (3, 3))(x)))


class _Gated(nn.Module):
  """Squeeze and excitation, whose gates large activations open for good."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(6, (3, 3))(x))
    gate = nn.relu(nn.Dense(3)(x.mean((1, 2), keepdims=True)))
    return x * nn.sigmoid(nn.Dense(6)(gate))


class _Norm(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.BatchNorm(use_running_average=False)(x)


class _Counter(nn.Module):
  @nn.compact
  def __call__(self, x):
    self.variable("count", "calls", lambda: jnp.zeros(()))
    return x


class _NoKernel(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(x)


class _Narrow(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Conv(2, (9, 9), padding="VALID")(x).reshape(len(x), 7)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"target": _Sigmoid()}, "φ"),
    ({"target": _Two()}, "2 kernels"),
    ({"target": _NoKernel()}, "0 kernels"),
    ({"target": Target(), "kernel": ("Dense_0", "kernel")}, "has no kernel"),
    ({"stem": _Norm()}, "train and mask are missing"),
    ({"stem": _Counter()}, "the model's stem keeps count"),
    ({"num_classes": 9}, r"must give\s+\(1, 9\)"),
    ({"head": _Narrow()}, "does not accept images"),
    ({"mean": (0.1, 0.2, 0.3)}, r"mean is \(0.1, 0.2, 0.3\); images of 1 chan"),
    ({"mean": 0.5}, "mean is 0.5; images of 1 channels"),
    ({"std": (0.0,)}, "std must be positive"),
    ({"target": _Gated(), "kernel": ("Conv_0", "kernel")}, "mixes its neurons"),
    ({"target": None, "stem": None}, r"target must be a flax\.linen\.Module"),
    (
      {"head": nnx.Linear(3, 3, rngs=nnx.Rngs(0))},
      r"head must be a flax\.linen\.Module, not Linear; .*ToLinen",
    ),
  ],
)
def test_what_is_no_model_is_refused(changes, message):
  with pytest.raises(errors.ConfigError, match=message):
    _own(**changes)


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("alexnet", {}, "unknown model 'alexnet'.*mnist_small"),
    ("mnist_small", {"initialisation": "magic"}, "unknown initialisation"),
    ("mnist_small", {"image_shape": (8, 8, 1)}, "too small"),
    ("vgg11", {"image_shape": (28, 28, 3)}, "too small"),
  ],
)
def test_what_cannot_be_built_is_refused(name, options, message):
  options = {"image_shape": (28, 28, 1), "num_classes": 10, **options}
  with pytest.raises(errors.ConfigError, match=message):
    networks.build(name, **options)
