import chex
from conftest import NUM_CLASSES
from conftest import TARGET
from conftest import VICTIM
from conftest import make_images
import jax
import jax.numpy as jnp
import numpy as np
import optax
import planted
import pytest

from fljax import evaluate
from fljax import models
from fljax.baselines import fine_pruning
from fljax.baselines import server
from fljax.cleanse import pruning

MODEL, PARAMS = planted.model(), planted.params()
IMAGES, LABELS = make_images(60, seed=3)
CLEAN = evaluate.batched(IMAGES, LABELS, batch_size=25)


_measure = jax.jit(evaluate.accuracy, static_argnums=0)


def _accuracy(params, examples=CLEAN, model=MODEL):
  return float(_measure(model, params, examples))


def _stamped():
  return evaluate.backdoored(
    IMAGES,
    LABELS,
    trigger=planted.TRIGGER,
    victim_label=VICTIM,
    target_label=TARGET,
  )


def test_inactive_neurons_are_pruned_before_active_ones():
  pruned = fine_pruning.prune(MODEL, PARAMS, CLEAN, CLEAN)
  assert set(pruned.order[:2]) == {planted.BACKDOOR, planted.DEAD}
  assert list(pruned.order[2:]) == [planted.USELESS, planted.READER]
  assert pruned.num_pruned == 3
  np.testing.assert_array_equal(pruned.neuron_mask, [True, False, False, False])


def test_a_backdoor_that_clean_images_leave_dormant_is_gone():
  assert _accuracy(PARAMS) == _accuracy(PARAMS, _stamped()) == 1
  pruned = fine_pruning.prune(MODEL, PARAMS, CLEAN, CLEAN, max_drop=0.0)
  assert _accuracy(pruned.params) == 1
  assert _accuracy(pruned.params, _stamped()) == 0


@pytest.mark.parametrize("max_drop", [0.0, 0.1, 0.4, 1.0])
def test_the_step_that_falls_below_the_floor_is_undone(model, params, max_drop):
  tuned = server.train(
    model,
    params,
    jnp.ones(model.neurons, bool),
    IMAGES,
    jnp.asarray(LABELS),
    key=jax.random.key(0),
    optimizer=server.SGD,
    epochs=10,
    batch_size=10,
  )
  pruned = fine_pruning.prune(model, tuned, CLEAN, CLEAN, max_drop=max_drop)
  floor = _accuracy(tuned, model=model) - max_drop
  assert floor > 0.9 - max_drop
  assert _accuracy(pruned.params, model=model) >= floor - 1e-6
  if pruned.num_pruned < model.neurons:
    one_more = pruning.mask_without_first(
      jnp.asarray(pruned.order), pruned.num_pruned + 1
    )
    worse = models.mask_neurons(model, tuned, one_more)
    assert _accuracy(worse, model=model) < floor
  active = model.activations(
    pruned.params, model.stem(pruned.params, jnp.asarray(IMAGES))
  )
  assert (np.asarray(active)[..., ~np.asarray(pruned.neuron_mask)] == 0).all()


@pytest.mark.parametrize(
  "optimizer",
  [
    optax.sgd(0.1, momentum=0.9),
    optax.chain(optax.add_decayed_weights(0.01), optax.rmsprop(0.01)),
  ],
  ids=["momentum", "rmsprop"],
)
def test_fine_tuning_repairs_the_model_and_keeps_the_mask(
  model, params, optimizer
):
  """The mask is held exactly, whatever the optimizer remembers."""
  mask = jnp.asarray([True, False, True, True, False, True])
  tuned = fine_pruning.fine_tune(
    model,
    params,
    mask,
    IMAGES,
    LABELS,
    key=jax.random.key(1),
    optimizer=optimizer,
    epochs=8,
    batch_size=10,
  )
  chex.assert_trees_all_equal(models.mask_neurons(model, tuned, mask), tuned)
  kernel = np.asarray(models.target_kernel(model, tuned))
  assert (kernel[..., ~np.asarray(mask)] == 0).all()
  assert (kernel[..., np.asarray(mask)] != 0).all()
  fresh = evaluate.batched(*make_images(40, seed=8))
  assert _accuracy(params, fresh, model) < 0.6
  assert _accuracy(tuned, fresh, model) > 0.9
  chex.assert_tree_all_finite(tuned)


def test_no_epoch_only_prunes():
  mask = jnp.asarray([True, True, False, True])
  tuned = fine_pruning.fine_tune(
    MODEL, PARAMS, mask, IMAGES, LABELS, key=jax.random.key(1), epochs=0
  )
  chex.assert_trees_all_equal(tuned, models.mask_neurons(MODEL, PARAMS, mask))


def test_training_is_plain_gradient_descent():
  """One batch of everything: one step along the mean gradient."""
  start = MODEL.init(jax.random.key(2))

  @jax.jit
  @jax.grad
  def gradient(params):
    logits = models.apply(MODEL, params, jnp.asarray(IMAGES))
    chosen = jax.nn.log_softmax(logits) * jax.nn.one_hot(LABELS, NUM_CLASSES)
    return -chosen.sum(axis=1).mean()

  expected = jax.tree.map(
    lambda leaf, grad: leaf - 0.5 * grad, start, gradient(start)
  )
  trained = fine_pruning.fine_tune(
    MODEL,
    start,
    jnp.ones(4, bool),
    IMAGES,
    LABELS,
    key=jax.random.key(3),
    optimizer=optax.sgd(0.5),
    epochs=1,
    batch_size=len(LABELS),
  )
  chex.assert_trees_all_close(trained, expected, rtol=1e-4, atol=1e-6)
