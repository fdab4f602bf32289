import chex
from conftest import IMAGE_SHAPE
from conftest import NUM_CLASSES
from conftest import TARGET
from conftest import make_images
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from fljax import errors
from fljax import evaluate
from fljax import models
from fljax import triggers
from fljax.baselines import neural_cleanse
from fljax.cleanse import pruning

MODEL, PARAMS = planted.model(), planted.params()
IMAGES, LABELS = make_images(60, seed=3)
CLEAN = evaluate.batched(IMAGES, LABELS, batch_size=25)
SETTINGS = neural_cleanse.Settings(batches_per_step=1, batch_size=60)
OTHERS = [label for label in range(NUM_CLASSES) if label != TARGET]
SEEDS = st.integers(0, 999)
_measure = jax.jit(evaluate.accuracy, static_argnums=0)


def _reverse(key=0, params=PARAMS, model=MODEL, images=IMAGES, **options):
  options.setdefault("settings", SETTINGS)
  return neural_cleanse.reverse_triggers(
    model, params, images, key=jax.random.key(key), **options
  )


def _accuracy(params, examples=CLEAN):
  return float(_measure(MODEL, params, examples))


def _success(params, mask, pattern, target=TARGET, examples=CLEAN):
  stamped = neural_cleanse.triggered(examples, mask, pattern, target=target)
  return _accuracy(params, stamped)


@pytest.fixture(scope="module")
def found():
  return _reverse()


@pytest.fixture(scope="module")
def planted_one(found):
  return found.masks[TARGET], found.patterns[TARGET]


def test_one_class_at_several_rates_is_one_program():
  brief = SETTINGS._replace(steps=20)
  rates = [0.05, 0.3]
  together = _reverse(
    targets=[TARGET, TARGET], learning_rates=rates, settings=brief
  )
  for position, rate in enumerate(rates):
    alone = _reverse(
      targets=[TARGET], settings=brief._replace(learning_rate=rate)
    )
    chex.assert_trees_all_close(
      jax.tree.map(lambda leaf, at=position: leaf[at], together),
      jax.tree.map(lambda leaf: leaf[0], alone),
      rtol=1e-4,
      atol=1e-4,
    )
  assert not np.allclose(together.masks[0], together.masks[1], atol=1e-2)


def test_who_is_told_of_the_steps_changes_nothing_and_may_end_them(found):
  told = []
  chex.assert_trees_all_equal(_reverse(on_steps=told.append), found)
  assert told[0] == 0 and sorted(set(told)) == told
  # The last class to stop ends it.
  last = int(found.steps.max())
  assert told[-2] < last <= told[-1] <= SETTINGS.steps

  class EnoughError(Exception):
    pass

  def enough(done):
    told.append(done)
    if done:
      raise EnoughError

  told.clear()
  with pytest.raises(EnoughError):
    _reverse(on_steps=enough)
  assert len(told) == 2 and told[1] < last


class _Memory:
  """Keeps everything, in memory; a process ends after so many steps."""

  def __init__(self, last=None):
    self.last, self.ended = last, False

  def load(self, like):
    if self.last is not None:
      chex.assert_trees_all_equal_shapes_and_dtypes(self.last, like)
    return self.last

  def keep(self, search, *, at_end):
    self.last, self.ended = search, at_end


def test_a_search_is_taken_up_where_it_was_kept(found):
  class EnoughError(Exception):
    pass

  def enough(done):
    told.append(done)
    if done == 20:
      raise EnoughError

  memory, told = _Memory(), []
  with pytest.raises(EnoughError):
    _reverse(on_steps=enough, memory=memory)
  # Kept before it is told.
  assert memory.last.step.max() == 20 and not memory.ended
  told.clear()
  again = _reverse(on_steps=told.append, memory=_Memory(memory.last))
  chex.assert_trees_all_equal(again, found)
  assert told[:2] == [20, 25]
  # Of a search at its end nothing is left to do.
  told.clear()
  memory = _Memory(memory.last)
  _reverse(memory=memory)
  assert memory.ended
  again = _reverse(on_steps=told.append, memory=_Memory(memory.last))
  chex.assert_trees_all_equal(again, found)
  assert len(told) == 1


def _random_trigger(seed):
  mask_key, pattern_key = jax.random.split(jax.random.key(seed))
  mask = jax.random.uniform(mask_key, IMAGE_SHAPE[:2])
  return mask, 255 * jax.random.uniform(pattern_key, IMAGE_SHAPE)


# --- triggers ----------------------------------------------------------------


@given(seed=SEEDS)
def test_a_trigger_is_a_blend_in_grey_values(seed):
  mask, pattern = _random_trigger(seed)
  images = jnp.asarray(IMAGES[:5])
  blended = neural_cleanse.apply_trigger(images, mask, pattern)
  m = np.asarray(mask, np.float64)[..., np.newaxis]
  expected = (1 - m) * IMAGES[:5] + m * np.asarray(pattern, np.float64)
  np.testing.assert_allclose(blended, expected / 255, atol=1e-6)
  assert blended.dtype == jnp.float32
  chex.assert_trees_all_close(
    neural_cleanse.apply_trigger(
      images.astype(jnp.float32) / 255, mask, pattern
    ),
    blended,
    atol=1e-6,
  )
  jitted = jax.jit(neural_cleanse.apply_trigger)(images, mask, pattern)
  chex.assert_trees_all_close(jitted, blended, atol=1e-6)
  one = neural_cleanse.apply_trigger(images[0], mask, pattern)
  chex.assert_trees_all_close(one, blended[0], atol=1e-6)


def test_a_mask_of_zeros_and_ones_stamps():
  trigger = planted.TRIGGER
  mask = trigger.mask[..., 0].astype(jnp.float32)
  blended = neural_cleanse.apply_trigger(
    jnp.asarray(IMAGES), mask, trigger.value * 255
  )
  stamped = triggers.stamp(jnp.asarray(IMAGES), trigger)
  np.testing.assert_allclose(
    blended * 255, stamped.astype(jnp.float32), atol=1e-4
  )


def test_success_does_not_count_images_of_the_target():
  mask, pattern = jnp.ones(IMAGE_SHAPE[:2]), jnp.zeros(IMAGE_SHAPE)
  stamped = neural_cleanse.triggered(CLEAN, mask, pattern, target=TARGET)
  assert int(stamped.mask.sum()) == (LABELS != TARGET).sum()
  assert (np.asarray(stamped.labels) == TARGET).all()
  assert float(stamped.images.max()) == 0
  nothing = jnp.zeros(IMAGE_SHAPE[:2])
  assert _success(PARAMS, nothing, pattern) == 0


# --- the cost ----------------------------------------------------------------


def _costs_by_hand(successes, patience, init=1e-3, up=2.0, down=2.0**1.5):
  """The published schedule as a loop: λ after each step, and both flags."""
  cost, setting, ups, downs = 0.0, 0, 0, 0
  rose = fell = False
  costs = []
  for success in successes:
    if cost == 0 and success:
      setting += 1
      if setting >= patience:
        cost, ups, downs, rose, fell = init, 0, 0, False, False
    else:
      setting = 0
    ups, downs = (ups + 1, 0) if success else (0, downs + 1)
    if ups >= patience:
      ups, cost, rose = 0, cost * up, True
    elif downs >= patience:
      downs, cost, fell = 0, cost / down, True
    costs.append((cost, rose, fell))
  return costs


@given(
  runs=st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=12),
  patience=st.integers(1, 6),
)
def test_the_cost_follows_the_published_schedule(runs, patience):
  successes = [success for success, length in runs for _ in range(length)]
  successes += [True] * (patience + 1)
  step = jax.jit(neural_cleanse.next_cost)
  options = neural_cleanse.Settings(patience=patience)
  cost = neural_cleanse.first_cost()
  expected = _costs_by_hand(successes, patience)
  for success, (value, rose, fell) in zip(successes, expected, strict=True):
    eager = neural_cleanse.next_cost(cost, jnp.asarray(success), options)
    cost = step(cost, jnp.asarray(success), options)
    chex.assert_trees_all_close(cost, eager)
    assert float(cost.value) == pytest.approx(value, rel=1e-5)
    assert (bool(cost.rose), bool(cost.fell)) == (rose, fell)
  assert float(cost.value) > 0


def test_the_mask_shrinks_as_the_cost_grows():
  # Multipliers of 1 hold λ where it is first set, and every step may be kept.
  norms = [
    np.asarray(
      _reverse(
        settings=SETTINGS._replace(
          init_cost=cost,
          cost_up=1.0,
          cost_down=1.0,
          success_threshold=0.0,
          steps=60,
        )
      ).norms
    )
    for cost in (1e-4, 1e-2, 1.0)
  ]
  assert (norms[0] > norms[1]).all() and (norms[1] > norms[2]).all()


# --- reversing ---------------------------------------------------------------


def test_the_planted_class_has_the_smallest_mask_and_is_flagged(found):
  assert found.reached.all()
  assert int(found.norms.argmin()) == TARGET
  assert float(found.norms[TARGET]) < 2
  assert float(found.norms[np.asarray(OTHERS)].min()) > 4
  suspects = neural_cleanse.outliers(found.norms)
  np.testing.assert_array_equal(np.flatnonzero(suspects.flagged), [TARGET])
  # It found the backdoor itself: most of the mask is where the trigger is.
  where = np.asarray(planted.TRIGGER.mask[..., 0])
  assert np.asarray(found.masks[TARGET])[where].sum() > 0.9 * float(
    found.norms[TARGET]
  )


def test_what_is_returned_is_in_range_and_does_what_it_says(found):
  np.testing.assert_array_equal(found.targets, range(NUM_CLASSES))
  assert found.masks.shape == (NUM_CLASSES, *IMAGE_SHAPE[:2])
  assert found.patterns.shape == (NUM_CLASSES, *IMAGE_SHAPE)
  assert float(found.masks.min()) >= 0 and float(found.masks.max()) <= 1
  assert float(found.patterns.min()) >= 0
  assert 200 < float(found.patterns.max()) <= 255
  np.testing.assert_allclose(
    found.norms, np.asarray(found.masks).sum(axis=(1, 2)), rtol=1e-5
  )
  for target in range(NUM_CLASSES):
    blended = neural_cleanse.apply_trigger(
      jnp.asarray(IMAGES), found.masks[target], found.patterns[target]
    )
    predicted = models.apply(MODEL, PARAMS, blended).argmax(axis=1)
    share = float((predicted == target).mean())
    # One mini-batch of all images per step: what counted is what is kept.
    assert share == pytest.approx(float(found.success[target])) and share > 0.98
  assert (np.asarray(found.steps) < SETTINGS.steps).all()
  assert (np.asarray(found.steps) > SETTINGS.early_stop_patience).all()


def test_a_class_depends_neither_on_the_others_nor_on_the_chunk():
  options = {"settings": SETTINGS._replace(steps=40)}
  everyone = _reverse(class_chunk=1, **options)
  some = _reverse(targets=[3, 0, 2], class_chunk=2, **options)
  expected = jax.tree.map(lambda leaf: leaf[np.asarray([3, 0, 2])], everyone)
  chex.assert_trees_all_close(some, expected, rtol=1e-3, atol=1e-3)


def test_trying_settings_compiles_nothing_anew():
  counted = MODEL._replace(
    stem=chex.assert_max_traces(lambda params, x: MODEL.stem(params, x), 3)
  )
  first, second = (
    _reverse(
      model=counted,
      targets=[2],
      settings=SETTINGS._replace(
        batches_per_step=3, batch_size=7, steps=5, learning_rate=rate
      ),
    )
    for rate in (0.1, 0.5)
  )
  assert not np.allclose(first.masks, second.masks)


def test_a_class_that_is_never_reached_keeps_its_best_step():
  start = _reverse(settings=SETTINGS._replace(steps=1))
  never = _reverse(settings=SETTINGS._replace(steps=60, success_threshold=2.0))
  assert not never.reached.any() and (np.asarray(never.steps) == 60).all()
  assert (np.asarray(never.success) >= np.asarray(start.success)).all()
  assert float(never.success[TARGET]) == 1 > float(start.success[TARGET])


@pytest.mark.parametrize(
  "bad, batches", [(np.nan, 1), (np.inf, 1), (np.nan, 2)]
)
def test_a_broken_model_gives_no_nan(bad, batches):
  broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, bad), PARAMS)
  options = SETTINGS._replace(steps=8, batches_per_step=batches)
  result = _reverse(params=broken, settings=options)
  chex.assert_tree_all_finite(result)
  assert not result.reached.any() and float(result.success.max()) == 0
  assert not neural_cleanse.outliers(result.norms).flagged.any()


def test_no_images_are_refused():
  with pytest.raises(errors.ConfigError, match="no images"):
    _reverse(images=IMAGES[:0])


@pytest.mark.parametrize(
  "options, message",
  [
    ({"targets": []}, "must be some of"),
    ({"targets": [0, 10]}, "must be some of"),
    ({"targets": [0, 1], "learning_rates": [0.1]}, "as many learning rates"),
  ],
)
def test_targets_are_classes_with_a_rate_each(options, message):
  with pytest.raises(errors.ConfigError, match=message):
    _reverse(**options)


# --- outliers ----------------------------------------------------------------

NORMS = hnp.arrays(
  np.float32,
  st.sampled_from([1, 4, 10]),
  elements=st.integers(1, 60).map(float),
)


@given(norms=NORMS)
def test_outliers_equal_the_formula(norms):
  result = neural_cleanse.outliers(norms)
  median = np.median(norms)
  mad = 1.4826 * np.median(np.abs(norms - median))
  for norm, index, flagged in zip(norms, *result, strict=True):
    if mad:
      expected = abs(norm - median) / mad
    else:
      expected = 0 if norm == median else np.inf
    assert float(index) == pytest.approx(expected, rel=1e-5)
    assert bool(flagged) == (expected > 2 and norm < median)
  chex.assert_trees_all_close(
    jax.jit(neural_cleanse.outliers)(norms), result, rtol=1e-6
  )


@given(norms=NORMS, scale=st.sampled_from([0.25, 4.0]))
def test_outliers_do_not_depend_on_the_unit(norms, scale):
  chex.assert_trees_all_close(
    neural_cleanse.outliers(scale * norms),
    neural_cleanse.outliers(norms),
    rtol=1e-5,
  )


def test_outliers_without_deviation_and_with_nan():
  index, flagged = neural_cleanse.outliers([5.0, 5, 5, 1, 9])
  np.testing.assert_array_equal(index, [0, 0, 0, np.inf, np.inf])
  np.testing.assert_array_equal(flagged, [False, False, False, True, False])
  known = [10.0, 11, 12, 13, 1]
  index, flagged = neural_cleanse.outliers([*known, np.nan])
  np.testing.assert_array_equal(index[:5], neural_cleanse.outliers(known)[0])
  np.testing.assert_array_equal(flagged, [False] * 4 + [True, False])


# --- mitigation --------------------------------------------------------------


def test_pruning_silences_the_reversed_trigger(planted_one):
  pruned = neural_cleanse.prune(
    MODEL, PARAMS, *planted_one, CLEAN, target=TARGET
  )
  assert pruned.order[0] == planted.BACKDOOR and pruned.num_pruned == 1
  assert _success(PARAMS, *planted_one) == pruned.successes[0] > 0.95
  assert _success(pruned.params, *planted_one) == pruned.successes[1] == 0
  assert _accuracy(pruned.params) == pruned.accuracies[1] == 1
  active = MODEL.activations(
    pruned.params, MODEL.stem(pruned.params, jnp.asarray(IMAGES))
  )
  assert (np.asarray(active)[..., planted.BACKDOOR] == 0).all()
  assert (np.asarray(active)[..., planted.READER] != 0).any()


def test_pruning_undoes_the_step_that_costs_too_much(found):
  """Another class's trigger speaks through the neuron that reads images."""
  target = OTHERS[-1]
  trigger = found.masks[target], found.patterns[target]
  pruned = neural_cleanse.prune(MODEL, PARAMS, *trigger, CLEAN, target=target)
  assert pruned.num_pruned == list(pruned.order).index(planted.READER)
  assert pruned.accuracies[pruned.num_pruned] == _accuracy(pruned.params) == 1
  assert pruned.accuracies[pruned.num_pruned + 1] < 0.5
  assert pruned.successes[pruned.num_pruned] > 0.9
  further = neural_cleanse.prune(
    MODEL, PARAMS, *trigger, CLEAN, target=target, max_drop=1.0
  )
  assert further.num_pruned > pruned.num_pruned
  assert _success(further.params, *trigger, target=target) < 0.05


@given(seed=SEEDS, silent=st.floats(0, 1), max_drop=st.floats(0, 1))
@settings(max_examples=6)
def test_pruning_stops_at_the_first_of_its_two_reasons(seed, silent, max_drop):
  """With random weights and triggers, against a reading step by step."""
  params = MODEL.init(jax.random.key(seed % 3))
  mask, pattern = _random_trigger(seed)
  pruned = neural_cleanse.prune(
    MODEL,
    params,
    mask,
    pattern,
    CLEAN,
    target=TARGET,
    silent_below=silent,
    max_drop=max_drop,
  )

  def at(count):
    stays = pruning.mask_without_first(jnp.asarray(pruned.order), count)
    return models.mask_neurons(MODEL, params, stays)

  images = jnp.asarray(IMAGES[LABELS != TARGET])
  means = [
    np.asarray(MODEL.activations(params, MODEL.stem(params, inputs))).mean(
      axis=(0, 1, 2)
    )
    for inputs in (
      neural_cleanse.apply_trigger(images, mask, pattern),
      images,
    )
  ]
  gap = (means[0] - means[1])[pruned.order]
  assert (np.diff(gap) <= 1e-6).all()
  count = 0
  while count < MODEL.neurons:
    if _success(at(count), mask, pattern) < silent:
      break
    if _accuracy(at(count + 1)) < _accuracy(params) - max_drop - 1e-6:
      break
    count += 1
  assert pruned.num_pruned == count
  chex.assert_trees_all_equal(pruned.params, at(count))


@pytest.mark.parametrize("share_of_data", [0.1, 1.0])
@pytest.mark.parametrize("share_triggered", [0.0, 0.2, 1.0])
def test_the_mixture_has_its_shares_and_correct_labels(
  share_of_data, share_triggered
):
  mask, pattern = _random_trigger(1)
  mixed = neural_cleanse.mixture(
    IMAGES,
    LABELS,
    mask,
    pattern,
    key=jax.random.key(5),
    share_of_data=share_of_data,
    share_triggered=share_triggered,
  )
  drawn = round(share_of_data * 60)
  assert len(mixed.labels) == len(mixed.images) == drawn
  assert len(set(mixed.chosen.tolist())) == drawn
  assert int(mixed.triggered.sum()) == round(share_triggered * drawn)
  np.testing.assert_array_equal(mixed.labels, LABELS[mixed.chosen])
  clean = IMAGES[np.asarray(mixed.chosen)]
  stamped = neural_cleanse.apply_trigger(jnp.asarray(clean), mask, pattern)
  chosen = np.asarray(mixed.triggered)
  np.testing.assert_allclose(mixed.images[chosen], stamped[chosen], atol=1e-6)
  np.testing.assert_allclose(
    mixed.images[~chosen], clean[~chosen].astype(np.float32) / 255, atol=1e-6
  )


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_what_is_no_share_is_refused(planted_one, share):
  with pytest.raises(errors.ConfigError, match="share_of_data"):
    neural_cleanse.unlearn(
      MODEL,
      PARAMS,
      IMAGES,
      LABELS,
      *planted_one,
      key=jax.random.key(0),
      share_of_data=share,
    )


def test_unlearning_lowers_success_and_keeps_accuracy(planted_one):
  fresh = evaluate.batched(*make_images(80, seed=9))
  whole = planted.TRIGGER.mask[..., 0].astype(jnp.float32)
  whole = (whole, planted.TRIGGER.value * 255)

  def after(trigger, share_triggered, **options):
    return neural_cleanse.unlearn(
      MODEL,
      PARAMS,
      IMAGES,
      LABELS,
      *trigger,
      key=jax.random.key(4),
      batch_size=5,
      share_triggered=share_triggered,
      **options,
    )

  for trigger in (planted_one, whole):
    unlearned = after(trigger, 0.2)
    assert _success(PARAMS, *trigger, examples=fresh) > 0.95
    assert _success(unlearned, *trigger, examples=fresh) < 0.1
    assert _accuracy(unlearned, fresh) > 0.95
  # Without the trigger, with all else the same, nothing is unlearned.
  assert _success(after(whole, 0.0), *whole, examples=fresh) > 0.95
  mask = jnp.asarray([True, True, False, True])
  held = after(whole, 0.2, neuron_mask=mask)
  chex.assert_trees_all_equal(models.mask_neurons(MODEL, held, mask), held)
