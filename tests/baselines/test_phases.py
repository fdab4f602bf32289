import chex
from conftest import TARGET
from conftest import make_images
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from fljax import evaluate
from fljax import models
from fljax.baselines import neural_cleanse
from fljax.baselines import phases

MODEL, PARAMS = planted.model(), planted.params()
IMAGES, LABELS = make_images(400, seed=3)
CLEAN = evaluate.batched(IMAGES, LABELS, batch_size=25)
ALL = jnp.ones(MODEL.neurons, bool)
SETTINGS = neural_cleanse.Settings(batches_per_step=1, batch_size=100)
STAMPED = evaluate.backdoored(
  *make_images(60, seed=4),
  trigger=planted.TRIGGER,
  victim_label=0,
  target_label=TARGET,
  over="others",
  batch_size=25,
)
_measure = jax.jit(evaluate.accuracy, static_argnums=0)


def _success(params):
  return float(_measure(MODEL, params, STAMPED))


def _cleanse(by, params=PARAMS, settings=SETTINGS, **options):
  key = jax.random.key(0)
  suspects = phases.find_suspects(
    MODEL, params, CLEAN, key=key, settings=settings
  )
  return phases.cleanse(
    MODEL,
    params,
    ALL,
    CLEAN,
    suspects,
    by=by,
    key=key,
    **{"learning_rate": 0.5, "max_drop": 0.05, **options},
  )


def test_images_come_out_of_their_batches():
  images, labels = phases.server_images(CLEAN)
  np.testing.assert_array_equal(images, IMAGES)
  np.testing.assert_array_equal(labels, LABELS)


@given(number=st.integers(2, 40), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_what_is_set_aside_and_the_rest_are_all(number, share, seed):
  examples = evaluate.batched(*make_images(number), batch_size=7)
  parts = phases.set_aside(examples, share, seed)
  masks = [np.asarray(part.mask) for part in parts]
  assert not (masks[0] & masks[1]).any()
  np.testing.assert_array_equal(masks[0] | masks[1], examples.mask)
  assert min(mask.sum() for mask in masks) >= 1
  assert abs(masks[0].sum() - share * number) <= 1
  chex.assert_trees_all_equal(
    phases.set_aside(examples, share, seed)[0].mask, parts[0].mask
  )


@pytest.mark.parametrize("by", ["prune", "unlearn"])
def test_the_planted_backdoor_is_found_and_removed(by):
  assert _success(PARAMS) > 0.9
  told = []
  after = _cleanse(by, on_progress=lambda *steps: told.append(steps))
  # 400 images in batches of 50.
  unlearning = [(f"unlearning label {TARGET}", done, 8) for done in (0, 8)]
  assert told == (unlearning if by == "unlearn" else [])
  assert after.facts["flagged_labels"] == [TARGET]
  assert len(after.facts["trigger_norms"]) == 4
  assert _success(after.params) < 0.3
  assert float(_measure(MODEL, after.params, CLEAN)) > 0.9
  if by == "prune":
    assert after.facts["pruned_neurons"] == int((~after.neuron_mask).sum()) > 0
    assert not after.neuron_mask[planted.BACKDOOR]
  else:
    assert after.neuron_mask.all()


def test_without_a_suspect_the_model_stays():
  clean = models.mask_neurons(
    MODEL, PARAMS, ALL.at[planted.BACKDOOR].set(False)
  )
  after = _cleanse("unlearn", clean)
  assert after.facts["flagged_labels"] == []
  for one, other in zip(
    jax.tree.leaves(after.params), jax.tree.leaves(clean), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_the_oracle_takes_the_lowest_attack_success_of_what_it_tried():
  told = []
  after = phases.cleanse_as_oracle(
    MODEL,
    PARAMS,
    ALL,
    CLEAN,
    STAMPED,
    target=TARGET,
    key=jax.random.key(0),
    settings=SETTINGS._replace(steps=60),
    rates=(0.001, 0.2),
    learning_rate=0.5,
    max_drop=0.05,
    on_progress=lambda *steps: told.append(steps),
  )
  # One series after the other, also told from the midst of unlearning.
  reversal, removal = told[:13], told[13:]
  assert reversal == [("reversing triggers", n, 60) for n in range(0, 61, 5)]
  assert {(what, total) for what, _, total in removal} == {
    ("removing triggers", 4)
  }
  assert [done for _, done, _ in removal] == [1, 1, 1, 2, 3, 3, 3, 4]
  tried = after.facts["oracle_tried"]
  assert [(one["by"], one["nc_learning_rate"]) for one in tried] == [
    ("prune", 0.001),
    ("unlearn", 0.001),
    ("prune", 0.2),
    ("unlearn", 0.2),
  ]
  best = after.facts["oracle"]
  assert best in tried
  assert best["attack_success"] == min(one["attack_success"] for one in tried)
  # What is returned is the model that was told of.
  assert best["attack_success"] == pytest.approx(_success(after.params))
  assert best["attack_success"] < 0.3 < _success(PARAMS)
  assert best["test_accuracy"] == pytest.approx(
    float(_measure(MODEL, after.params, CLEAN))
  )


def test_fine_pruning_prunes_and_tunes():
  def tuned(neuron_mask, params):
    return phases.prune_and_tune(
      MODEL,
      params,
      neuron_mask,
      CLEAN,
      key=jax.random.key(0),
      learning_rate=0.05,
      max_drop=0.05,
      on_progress=lambda *steps: told.append(steps),
    )

  told = []
  after = tuned(ALL, PARAMS)
  assert told == [("tuning", done, 80) for done in range(0, 81, 20)]
  count = after.facts["pruned_neurons"]
  assert count == int((~after.neuron_mask).sum()) > 0
  # What was pruned before stays so, and is not counted again.
  pruned = models.mask_neurons(MODEL, PARAMS, after.neuron_mask)
  again = tuned(after.neuron_mask, pruned)
  assert not (again.neuron_mask & ~after.neuron_mask).any()
  assert (
    again.facts["pruned_neurons"] == int((~again.neuron_mask).sum()) - count
  )
  kernel = models.target_kernel(MODEL, after.params)
  assert not np.asarray(kernel)[..., ~np.asarray(after.neuron_mask)].any()
  assert float(_measure(MODEL, after.params, CLEAN)) > 0.9
