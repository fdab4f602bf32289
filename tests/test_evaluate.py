from conftest import IMAGE_SHAPE
from conftest import NUM_CLASSES
from conftest import TARGET
from conftest import VICTIM
from conftest import make_images
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import evaluate
from fljax import models
from fljax import triggers

TRIGGER = triggers.from_pixels([(-1, -1), (0, 3)], IMAGE_SHAPE)


@given(
  count=st.integers(1, 40),
  batch=st.integers(1, 50),
  at_least=st.integers(0, 60),
)
def test_batches_hold_every_example_once(count, batch, at_least):
  images, labels = make_images(count)
  examples = evaluate.batched(
    images, labels, batch_size=batch, at_least=at_least
  )
  mask = np.asarray(examples.mask)
  assert mask.sum() == count and mask.size >= max(count, at_least)
  np.testing.assert_array_equal(np.asarray(examples.images)[mask], images)
  np.testing.assert_array_equal(np.asarray(examples.labels)[mask], labels)


@pytest.mark.parametrize("count, batch", [(40, 16), (7, 50), (33, 33)])
def test_accuracy_is_the_share_of_right_predictions(
  model, params, count, batch
):
  images, labels = make_images(count)
  logits = models.apply(model, params, jnp.asarray(images))
  expected = float(np.mean(np.argmax(logits, axis=1) == labels))
  examples = evaluate.batched(images, labels, batch_size=batch, at_least=45)
  for function in (
    evaluate.accuracy,
    jax.jit(evaluate.accuracy, static_argnums=0),
  ):
    actual = function(model, params, examples)
    assert float(actual) == pytest.approx(expected, abs=1e-6)


def _flat(examples):
  mask = np.asarray(examples.mask)
  return np.asarray(examples.images)[mask], np.asarray(examples.labels)[mask]


def _backdoored(labels, images, over):
  return evaluate.backdoored(
    images,
    labels,
    trigger=TRIGGER,
    victim_label=VICTIM,
    target_label=TARGET,
    over=over,
  )


def test_attack_success_is_over_stamped_images_of_the_victim():
  images, labels = make_images(40)
  stamped, targets = _flat(_backdoored(labels, images, "victim"))
  expected = triggers.stamp(jnp.asarray(images[labels == VICTIM]), TRIGGER)
  np.testing.assert_array_equal(stamped, expected)
  assert (targets == TARGET).all()


def test_attack_success_may_be_over_all_but_the_target():
  images, labels = make_images(40)
  stamped, targets = _flat(_backdoored(labels, images, "others"))
  assert len(stamped) == (labels != TARGET).sum()
  assert (targets == TARGET).all()


@pytest.mark.parametrize("over", ["victim", "others"])
def test_all_victims_share_one_shape(over):
  images, labels = make_images(41)
  shapes = {
    evaluate.backdoored(
      images,
      labels,
      trigger=TRIGGER,
      victim_label=victim,
      target_label=(victim + 1) % NUM_CLASSES,
      over=over,
    ).images.shape
    for victim in range(NUM_CLASSES)
  }
  assert len(shapes) == 1


def test_logits_that_are_not_finite_are_wrong():
  logits = jnp.asarray([[jnp.nan, 0.0], [jnp.inf, 0.0], [1.0, 0.0], [0.0, 1.0]])
  labels = jnp.zeros(4, jnp.int32)
  right = evaluate.right(logits, labels, jnp.ones(4, bool))
  assert int(right.sum()) == 1
