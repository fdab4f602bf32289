import re

from conftest import from_flax
from conftest import make_federation
from conftest import make_round
from conftest import make_state
from conftest import make_training
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import evaluate
from fljax import execution
from fljax import federation as federations
from fljax import layers
from fljax import models
from fljax import networks
from fljax.cleanse import pruning
from fljax.cleanse import reports
from fljax.cleanse import weights


def test_every_backend_has_a_plan():
  for backend in (*execution.PLANS, "another"):
    plan = execution.plan_for(backend)
    assert plan.forms.conv in layers.CONV_FORMS
    assert plan.forms.pooling in layers.POOLING_FORMS
    assert plan.client_chunk >= 0 < plan.evaluation_batch
    assert plan.sweep in ("vmap", "map")
  assert execution.plan_for() == execution.plan_for(jax.default_backend())


# --- precision ---------------------------------------------------------------


def precisions(function, *args):
  """The precisions of a jitted function's products, as lowered."""
  text = function.lower(*args).as_text()
  products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
  assert products
  return {
    found
    for product in products
    for found in re.findall(
      r"DEFAULT|HIGHEST|HIGH", product.split("precision", 1)[-1]
    )
  }


def built():
  return networks.build(
    "mnist_small",
    image_shape=(16, 16, 1),
    num_classes=4,
    forms=execution.PLANS["tpu"].forms,
  )


@pytest.fixture(scope="module")
def federation():
  """Shapes only: nothing here is run."""
  return jax.eval_shape(lambda: make_federation()[0])


def with_images_of(shape, federation):
  """The same clients with images of another shape."""
  height, width, channels = shape

  def swap(leaf):
    rows = leaf.shape[:-3]
    shape = (*rows, height, width, 1 if leaf.dtype == bool else channels)
    return jax.ShapeDtypeStruct(shape, leaf.dtype)

  return federation.replace(
    images=swap(federation.images),
    trigger=jax.tree.map(swap, federation.trigger),
  )


@pytest.mark.parametrize("make_model", [from_flax, built])
def test_what_decides_is_computed_in_float32(make_model, federation):
  """Whatever is set outside; shapes suffice."""
  model = make_model()
  params = jax.eval_shape(model.init, jax.random.key(0))
  federation = with_images_of(model.image_shape, federation)
  images = np.zeros((8, *model.image_shape), np.uint8)
  examples = evaluate.batched(images, np.zeros(8, np.int32), batch_size=4)
  order = jax.ShapeDtypeStruct((model.neurons,), jnp.int32)
  one, three = (
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (3,))
  )
  kernel = models.target_kernel(model, params)
  cached = jax.eval_shape(
    lambda p, e: weights.cache_stem(model, p, e), params, examples
  )
  accuracy = jax.jit(evaluate.accuracy, static_argnums=0)
  with jax.default_matmul_precision("default"):
    for function, *args in (
      (accuracy, params, examples),
      (reports.client_activations, params, federation),
      (pruning.pruning_curve, params, order, examples),
      (pruning.client_curves, params, order, federation),
      (weights.cache_stem, params, examples),
      (weights.accuracy_from_stem, params, kernel, cached),
      (weights.client_curves, params, one, one, three, federation),
    ):
      assert precisions(function, model, *args) == {"HIGHEST"}


@pytest.mark.parametrize("precision", execution.PRECISIONS)
def test_the_precision_of_training_is_a_setting(model, precision, federation):
  training = make_training(model, precision=precision)
  state, key = jax.eval_shape(lambda: (make_state(model), jax.random.key(0)))
  client = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), federation
  )
  found = precisions(
    jax.jit(training), state.params, client, state.neuron_mask, True, key
  )
  # Products of bfloat16 factors have nothing to be rounded.
  expected = "default" if precision == "bfloat16" else precision
  assert found == {expected.upper()}


# In this type "winograd" is blocks and slices.
@pytest.mark.parametrize("conv", ["winograd", "lax"])
def test_all_products_of_training_have_bfloat16_factors(conv, federation):
  network = networks.build(
    "mnist_small",
    image_shape=(20, 20, 1),
    num_classes=4,
    forms=layers.Forms(conv=conv, pooling="reshape"),
  )
  clients = with_images_of((20, 20, 1), federation)
  client = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), clients
  )
  state, key = jax.eval_shape(lambda: (make_state(network), jax.random.key(0)))
  training = jax.jit(make_training(network, precision="bfloat16"))
  text = training.lower(
    state.params, client, state.neuron_mask, True, key
  ).as_text()
  products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
  assert products
  for product in products:
    operands = product.rsplit(" : (", 1)[-1].split(")")[0]
    assert operands.count("bf16") == 2, product


def test_training_at_bfloat16_goes_the_same_way_in_float32(model, params):
  client = federations.select(make_federation()[0], 1)
  mask, active = jnp.ones(model.neurons, bool), jnp.asarray(False)
  args = (params, client, mask, active, jax.random.key(1))
  full, full_loss = make_training(model)(*args)
  low, low_loss = make_training(model, precision="bfloat16")(*args)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low))
  assert low_loss.dtype == jnp.float32
  assert float(low_loss) == pytest.approx(float(full_loss), rel=0.02)
  step, rounded = (
    np.concatenate(
      [
        np.ravel(after - before)
        for after, before in zip(
          jax.tree.leaves(tree), jax.tree.leaves(params), strict=True
        )
      ]
    )
    for tree in (full, low)
  )
  cosine = step @ rounded / np.linalg.norm(step) / np.linalg.norm(rounded)
  assert 0.98 < cosine < 1 - 1e-7


def test_updates_are_averaged_in_float32(model, federation):
  """A round's only products outside of training are the aggregation's."""
  training = make_training(model, precision="high")
  run = jax.jit(make_round(model, training=training))
  state, key = jax.eval_shape(lambda: (make_state(model), jax.random.key(0)))
  assert precisions(run, state, federation, key) == {"HIGH", "HIGHEST"}
