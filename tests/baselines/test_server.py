import chex
from conftest import make_images
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fljax import evaluate
from fljax.baselines import server

IMAGES, LABELS = make_images(60, seed=3)


@pytest.mark.parametrize("count", [3, 9])
def test_mean_activations_are_those_of_the_images_that_count(
  model, params, count
):
  images, labels = make_images(count, seed=count)
  examples = evaluate.batched(images, labels, batch_size=4, at_least=12)
  # Padding must not count, whatever stands there.
  noise = np.where(examples.mask[..., None, None, None], examples.images, 255)
  examples = examples.replace(images=jnp.asarray(noise, jnp.uint8))
  active = model.activations(params, model.stem(params, jnp.asarray(images)))
  means = server.mean_activations(model, params, examples)
  chex.assert_trees_all_close(means, active.mean(axis=(0, 1, 2)), rtol=1e-5)


def _train(model, params, **options):
  return server.train(
    model,
    params,
    jnp.arange(model.neurons) != 1,
    IMAGES,
    LABELS,
    key=jax.random.key(5),
    **{"epochs": 4, "batch_size": 7, "augmentation": "crop", **options},
  )


def test_telling_of_steps_changes_nothing(model, params):
  """36 steps, in one call or in blocks of 20."""
  optimizer, told = optax.sgd(0.1, momentum=0.9), []
  one = _train(model, params, optimizer=optimizer)
  other = _train(
    model,
    params,
    optimizer=optimizer,
    on_steps=lambda *steps: told.append(steps),
  )
  chex.assert_trees_all_equal(one, other)
  assert told == [(0, 36), (20, 36), (36, 36)]


def test_training_ends_where_it_is_told_of_a_step(model, params):
  class EnoughError(Exception):
    pass

  told = []

  def enough(done, total):
    told.append(done)
    if done:
      raise EnoughError

  with pytest.raises(EnoughError):
    _train(model, params, optimizer=optax.sgd(0.1), on_steps=enough)
  assert told == [0, 20]


def test_an_optimizer_of_arguments_is_one_program(model, params):
  def make(rates):
    made.append(rates)
    return optax.sgd(rates["all"])

  made, counts = [], []
  for rate in (0.1, 0.3):
    one = _train(model, params, optimizer=optax.sgd(rate))
    other = _train(model, params, optimizer=make, arguments=({"all": rate},))
    chex.assert_trees_all_close(one, other, atol=1e-6)
    counts.append(len(made))
  assert 0 < counts[0] == counts[1]
