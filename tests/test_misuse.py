"""What a caller gets wrong from Python is one sentence, or does not matter."""

from conftest import IMAGE_SHAPE
from conftest import NUM_CLASSES
from conftest import TARGET
from conftest import TRIGGER
from conftest import VICTIM
from conftest import make_dealt
from conftest import make_federation
from conftest import make_round
from conftest import make_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fljax import aggregators
from fljax import attacks
from fljax import errors
from fljax import evaluate
from fljax import federation as federations
from fljax import local
from fljax import models
from fljax import population as populations
from fljax import rounds
from fljax import triggers
from fljax.baselines import server
from fljax.cleanse import pipeline
from fljax.cleanse import weights

IMAGES, LABELS, PARTITION = make_dealt(4, 10)
KEY = jax.random.key(0)


def _train_server(images, model, params):
  return server.train(
    model,
    params,
    jnp.ones(model.neurons, bool),
    images,
    LABELS,
    key=KEY,
    optimizer=optax.sgd(0.1),
    epochs=1,
    batch_size=10,
  )


# Who takes images, by name.
TAKERS = {
  "create": lambda images, *_: federations.create(images, LABELS, PARTITION),
  "population": lambda images, *_: populations.Population(
    images, LABELS, PARTITION, poison=lambda clients: clients
  ),
  "batched": lambda images, *_: evaluate.batched(images, LABELS),
  "backdoored": lambda images, *_: _backdoored(images),
  "server": _train_server,
}


def _backdoored(images=IMAGES, labels=LABELS, **options):
  return evaluate.backdoored(
    images,
    labels,
    trigger=triggers.from_pixels(TRIGGER, IMAGE_SHAPE),
    victim_label=VICTIM,
    target_label=TARGET,
    **options,
  )


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(
  "images, message",
  [
    (IMAGES.astype(np.uint16) * 257, r"integer images must be in 0\.\.255"),
    (IMAGES.astype(np.int32) - 1, r"integer images must be in 0\.\.255"),
    (IMAGES.astype(np.float32), r"floating point images must be in \[0, 1\]"),
    (np.full(IMAGES.shape, np.nan, np.float32), "floating point"),
    (IMAGES[..., 0], r"images must be \[n, height, width, channels\]"),
    (IMAGES[:-1], "labels of 39 images must be as many integers"),
  ],
  ids=["uint16", "negative", "float255", "nan", "3d", "fewer"],
)
def test_images_of_another_range_or_shape_are_refused(
  taker, images, message, model, params
):
  with pytest.raises(errors.DataError, match=message):
    TAKERS[taker](images, model, params)


@pytest.mark.parametrize(
  "images",
  [
    IMAGES.astype(np.int64),
    IMAGES.astype(np.float32) / 255,
    jnp.asarray(IMAGES / 255, jnp.bfloat16),
    IMAGES > 100,
  ],
  ids=["int64", "float32", "bfloat16", "bool"],
)
def test_images_of_the_range_are_taken(images):
  assert evaluate.batched(images, LABELS).mask.sum() == len(LABELS)


@pytest.mark.parametrize(
  "labels, message",
  [
    (LABELS + 0.7, "must be as many integers; these are float"),
    (np.eye(NUM_CLASSES, dtype=int)[LABELS], "must be as many integers"),
    (LABELS - 1, "label -1 is none"),
  ],
  ids=["fractions", "one-hot", "negative"],
)
def test_labels_that_are_none_are_refused(labels, message):
  for take in (
    lambda: federations.create(IMAGES, labels, PARTITION),
    lambda: evaluate.batched(IMAGES, labels),
    lambda: _backdoored(labels=labels),
  ):
    with pytest.raises(errors.DataError, match=message):
      take()


def test_labels_may_be_a_list_and_nothing_may_be_there():
  assert int(_backdoored(labels=LABELS.tolist()).mask.sum()) == int(
    (LABELS == VICTIM).sum()
  )
  none = _backdoored(IMAGES[:0], LABELS[:0])
  assert int(none.mask.sum()) == 0


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m, p: _backdoored(over="victims"), "'victims': .*victim, others"),
    (lambda m, p: aggregators.build("mode", trim=0.1), "'mode': .*median"),
    (lambda m, p: local.augment(KEY, IMAGES, "flips"), "'flips': .*crop"),
    (
      lambda m, p: weights.statistics(
        models.target_kernel(m, p), jnp.ones(m.neurons, bool), "survivors"
      ),
      "'survivors': choose one of surviving, all",
    ),
    (
      lambda m, p: pipeline.prune(
        m, p, jnp.ones((4, m.neurons)), lambda *_: [], method="vote"
      ),
      "unknown method 'vote': choose one of rap, mvp",
    ),
    (
      lambda m, p: pipeline.prune(
        m, p, jnp.ones((4, m.neurons)), lambda *_: [], drop_of="sum"
      ),
      "unknown drop_of 'sum'",
    ),
    (lambda m, p: weights.delta_steps(3, 0), "both must be positive"),
    (lambda m, p: weights.delta_steps(3, -1), "both must be positive"),
    (
      lambda m, p: federations.create(
        IMAGES, LABELS, PARTITION, num_attackers=5
      ),
      "5 attackers are more than the 4 clients",
    ),
    (
      lambda m, p: make_round(m, attacks.Attack(), client_chunk=-1),
      "client_chunk=-1",
    ),
    (
      lambda m, p: make_round(m, attacks.Attack(), cohort_size=5)(
        make_state(m), make_federation()[0], KEY
      ),
      "cohort of 5 clients is more than the 4",
    ),
    (
      lambda m, p: make_round(m, attacks.neurotoxin(0.1))(
        make_state(m), make_federation()[0], KEY
      ),
      "made without the attack, which remembers",
    ),
    (
      lambda m, p: rounds.make_streamed_block(
        m, make_round(m, attacks.Attack()), 5
      )(
        make_state(m),
        populations.Population(
          IMAGES, LABELS, PARTITION, poison=lambda clients: clients
        ),
        KEY,
        1,
      ),
      "cohort of 5 clients is more than the 4",
    ),
    (
      lambda m, p: triggers.stamp(
        jnp.asarray(IMAGES),
        triggers.Trigger(
          mask=jnp.ones(IMAGE_SHAPE[:2], bool), value=jnp.ones(IMAGE_SHAPE)
        ),
      ),
      r"its mask of \(\d+, \d+\)",
    ),
  ],
)
def test_a_wrong_argument_is_one_sentence(call, message, model, params):
  with pytest.raises(errors.ConfigError, match=message):
    call(model, params)
