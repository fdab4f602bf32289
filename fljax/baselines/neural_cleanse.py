"""Neural Cleanse: reverse a trigger per class, find outliers, remove them.

    found = reverse_triggers(model, params, images, key=key)
    suspects = outliers(found.norms)
    for position in np.flatnonzero(suspects.flagged):
      mask, pattern = found.masks[position], found.patterns[position]
      target = found.targets[position]
      pruned = prune(model, params, mask, pattern, clean, target=target)
      # or
      params = unlearn(model, params, images, labels, mask, pattern, key=key)

Functions see what they are given and nothing else: clean images, and triggers
that were reversed from the model with them. No true trigger, no stamped image
and no attack success enters here; whoever chooses a setting by those, or
passes test images, has an oracle and should call it one.

References:
  Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
  Networks (Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, 2019), and the
  settings of the code that its authors published.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple
from typing import Protocol

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from fljax import errors
from fljax import evaluate
from fljax import execution
from fljax import local
from fljax import models
from fljax import parallel
from fljax.baselines import server
from fljax.cleanse import pruning
from fljax.cleanse import selection

Array = jax.Array

# Keras' epsilon: the official code has it in Adam and in the change of
# variables, which keeps arctanh finite at masks of 0 and 1.
_EPSILON = 1e-7

# Steps of a reversal between two calls of `on_steps`: 4 s of MNIST's network on
# two cores, minutes of VGG11. Telling costs 2% of the time there, as devices
# wait for each other; after every step it would be 5%.
_TOLD_EVERY = 5


# --- triggers ----------------------------------------------------------------


def apply_trigger(images: Array, mask: Array, pattern: Array) -> Array:
  """Blends a trigger into images: (1 − m)·x + m·Δ.

  Not rounded to whole grey values, so that gradients pass; networks take it
  as it is.

  Args:
    images: [..., height, width, channels], uint8 in 0..255 or floating point
      in [0, 1].
    mask: m, float32 [height, width] in [0, 1], shared by the channels.
    pattern: Δ, float32 [height, width, channels] in 0..255, whatever the
      images' type.

  Returns:
    float32 in [0, 1], of the images' shape.

  References:
    The paper, Section IV, "Reverse Engineering Triggers".
  """
  scaled = images.astype(jnp.float32)
  if jnp.issubdtype(images.dtype, jnp.integer):
    scaled = scaled / 255
  leading = (1,) * (images.ndim - 3)
  mask = mask.reshape(*leading, *mask.shape, 1)
  pattern = pattern.reshape(*leading, *pattern.shape)
  return (1 - mask) * scaled + mask * (pattern / 255)


def triggered(
  examples: evaluate.Examples,
  mask: Array,
  pattern: Array,
  *,
  target: Array | int,
) -> evaluate.Examples:
  """What a reversed trigger's success is measured on, by `evaluate.accuracy`.

  Args:
    examples: clean images with their true labels.
    mask: float32 [height, width].
    pattern: float32 [height, width, channels] in 0..255.
    target: the class to which the trigger leads.

  Returns:
    The images with the trigger, float32 in [0, 1], labelled with the target;
    those of the target class do not count.
  """
  return evaluate.Examples(
    images=apply_trigger(examples.images, mask, pattern),
    labels=jnp.full_like(examples.labels, target),
    mask=examples.mask & (examples.labels != target),
  )


# --- reversing ---------------------------------------------------------------


class Settings(NamedTuple):
  """How triggers are reversed; the values are the official code's.

  A step is what that code calls one: `batches_per_step` mini-batches with an
  update each, after which success and mask norm, averaged over them, decide
  about the cost, the best mask and stopping. Its examples take 1000 images
  per step, 1000 // 32 = 31 mini-batches of 32. Where "1000 samples in each
  mini-batch" is meant literally, it is `batches_per_step=1,
  batch_size=1000`.

  What a step keeps is the mask that its last mini-batch was measured with;
  the official code keeps it one update later. With one mini-batch per step
  the success that counted is thus that of the mask itself; with several it is
  a mean over masks that were on their way.

  Only `batches_per_step` and `batch_size` are part of the compiled program:
  trying other values of the rest compiles nothing anew.

  Attributes:
    learning_rate: of Adam.
    betas: of Adam.
    steps: at most so many.
    batches_per_step: mini-batches, and updates, per step.
    batch_size: images per mini-batch.
    init_cost: λ, weight of the mask's L1 norm, from when on the attack has
      succeeded `patience` steps in a row; 0 before.
    success_threshold: share of images at the target from which on a step
      succeeds.
    patience: steps in a row that succeed, or fail, before λ changes.
    cost_up: λ is multiplied by it after successes.
    cost_down: λ is divided by it after failures.
    early_stop_patience: stops after so many steps without a smaller mask that
      succeeds, once λ has risen and fallen.
  """

  learning_rate: float = 0.1
  betas: tuple[float, float] = (0.5, 0.9)
  steps: int = 1000
  batches_per_step: int = 31
  batch_size: int = 32
  init_cost: float = 1e-3
  success_threshold: float = 0.99
  patience: int = 5
  cost_up: float = 2.0
  cost_down: float = 2.0**1.5
  early_stop_patience: int = 25


OFFICIAL = Settings()


class Reversed(struct.PyTreeNode):
  """One reversed trigger per class.

  Attributes:
    targets: int32 [classes], the classes, in the order of the rest.
    masks: float32 [classes, height, width] in [0, 1].
    patterns: float32 [classes, height, width, channels] in 0..255.
    success: float32 [classes], share of all given images, those of the class
      included, that the trigger leads to the class.
    norms: float32 [classes], L1 norm of the mask.
    reached: bool [classes], whether a step succeeded. If none did, mask and
      pattern are those of the step with the most success, and nothing made
      the mask small: its norm says little.
    steps: int32 [classes], how many were run.
  """

  targets: Array
  masks: Array
  patterns: Array
  success: Array
  norms: Array
  reached: Array
  steps: Array


class Cost(struct.PyTreeNode):
  """λ and what decides how it changes.

  Attributes:
    value: float32, λ.
    waited: int32, successes in a row while λ is 0.
    successes: int32, in a row.
    failures: int32, in a row.
    rose: bool, whether λ has risen since it was set.
    fell: bool, likewise.
  """

  value: Array
  waited: Array
  successes: Array
  failures: Array
  rose: Array
  fell: Array


def first_cost() -> Cost:
  """λ = 0: first of all the attack has to succeed."""
  zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
  return Cost(
    value=jnp.zeros((), jnp.float32),
    waited=zero,
    successes=zero,
    failures=zero,
    rose=no,
    fell=no,
  )


def next_cost(cost: Cost, success: Array, settings: Settings) -> Cost:
  """λ after a step.

  Args:
    cost: before it.
    success: bool, whether the step succeeded.
    settings: see `Settings`.

  Returns:
    λ raised, lowered, set for the first time, or as it was. The step that
    sets it counts as the first success under it.
  """
  waited = jnp.where((cost.value == 0) & success, cost.waited + 1, 0)
  is_set = waited >= settings.patience
  successes = jnp.where(is_set, 0, cost.successes)
  successes = jnp.where(success, successes + 1, 0)
  failures = jnp.where(success, 0, cost.failures + 1)
  rises = successes >= settings.patience
  falls = failures >= settings.patience
  value = jnp.where(is_set, settings.init_cost, cost.value)
  value = jnp.where(rises, value * settings.cost_up, value)
  value = jnp.where(falls, value / settings.cost_down, value)
  return Cost(
    value=value,
    waited=waited,
    successes=jnp.where(rises, 0, successes),
    failures=jnp.where(falls, 0, failures),
    rose=(cost.rose & ~is_set) | rises,
    fell=(cost.fell & ~is_set) | falls,
  )


class Memory(Protocol):
  """Keeps a search, so that another process takes it up."""

  def load(self, like: Search) -> Search | None:
    """What was kept last of this search, or None.

    Args:
      like: a search of the same classes, leaves [classes, ...].
    """

  def keep(self, search: Search, *, at_end: bool) -> None:
    """Is offered the search every few steps, and may keep it.

    Args:
      search: leaves [classes, ...], the same on all devices.
      at_end: whether it is complete.
    """


def reverse_triggers(
  model: models.Model,
  params: models.Params,
  images: Array | np.ndarray,
  *,
  key: Array,
  targets: Sequence[int] | Array | np.ndarray | None = None,
  settings: Settings = OFFICIAL,
  learning_rates: Sequence[float] | Array | np.ndarray | None = None,
  class_chunk: int | None = None,
  mesh: parallel.Mesh | None = None,
  on_steps: Callable[[int], None] | None = None,
  memory: Memory | None = None,
) -> Reversed:
  """Finds, for each class, a small trigger that leads images to it.

  Minimises cross-entropy towards the class + λ·|m|₁ over mask and pattern,
  both tanh(·)/(2 − ε) + 1/2 of free variables, which start at random; λ
  follows success (`next_cost`). Of the steps that succeed, the one with the
  smallest mask is kept.

  All classes are one program. What is found for a class depends on its number
  and the key, not on what other classes are asked for (but for rounding).

  Args:
    model: the network.
    params: the trained model.
    images: uint8 [samples, height, width, channels], clean, of any class.
    key: random key.
    targets: int [classes], which classes; None takes all. One may be asked for
      several times, with different learning rates.
    settings: see `Settings`.
    learning_rates: float [classes], one for each instead of the settings';
      None takes that for all.
    class_chunk: classes at once: 1 one after another, so that each stops when
      it is done, 0 all together, which run until the last is done; None takes
      the backend's choice for clients.
    mesh: devices that the classes are spread over; None takes the one that the
      model is on.
    on_steps: is told how many steps were run, first 0 and then every few, and
      may end the search by raising. It changes nothing about what is found.
    memory: where the search is taken up from, and kept before its steps are
      told; nor does that.

  Returns:
    The reversed triggers. Never NaN: with a model that is not finite nothing
    succeeds, and masks are those that the search started from.

  Raises:
    errors.ConfigError: there are no images, no targets, targets that are no
      classes, or another number of learning rates.

  References:
    The paper, Section IV, "Reverse Engineering Triggers".
  """
  if not len(images):
    raise errors.ConfigError("no images were given to reverse triggers with.")
  if targets is None:
    targets = range(model.num_classes)
  plan = execution.plan_for()
  chosen = np.asarray(targets, np.int32)
  classes = (chosen >= 0) & (chosen < model.num_classes)
  if not len(chosen) or not classes.all():
    raise errors.ConfigError(
      f"targets {chosen.tolist()} must be some of the {model.num_classes}"
      " classes, from 0."
    )
  if learning_rates is None:
    learning_rates = np.full(chosen.shape, settings.learning_rate)
  if np.shape(learning_rates) != chosen.shape:
    raise errors.ConfigError(
      f"{len(chosen)} targets need as many learning rates, not"
      f" {np.size(learning_rates)}."
    )
  params, given, columns, key = parallel.replicate(
    (
      params,
      jnp.asarray(images),
      (jnp.asarray(chosen), jnp.asarray(learning_rates, jnp.float32)),
      key,
    ),
    mesh,
  )
  chunk = plan.client_chunk if class_chunk is None else class_chunk
  batches_shape = (settings.batches_per_step, settings.batch_size)
  search = _begin(model.image_shape, columns[0], key)
  done, running = 0, True
  kept = None if memory is None else memory.load(search)
  if kept is not None:
    search = parallel.replicate(jax.tree.map(jnp.asarray, kept), mesh)
    done, running = int(kept.step.max()), not kept.stopped.all()
  at_once = settings.steps
  if on_steps is not None or memory is not None:
    at_once = _TOLD_EVERY
  if on_steps is not None:
    on_steps(done)
  while running and done < settings.steps:
    done = min(done + at_once, settings.steps)
    search, still = _advance(
      model,
      batches_shape,
      chunk,
      mesh,
      params,
      given,
      *columns,
      search,
      key,
      done,
      settings,
    )
    if at_once < settings.steps:
      running = bool(still)
    if memory is not None:
      at_end = not running or done == settings.steps
      memory.keep(search, at_end=at_end)
    if on_steps is not None:
      on_steps(done)
  return _found(
    model,
    min(plan.evaluation_batch, len(images)),
    chunk,
    mesh,
    params,
    given,
    columns[0],
    search,
  )


class Search(struct.PyTreeNode):
  """The search for one class, after a step.

  Attributes:
    trigger: mask [height, width] and pattern [height, width, channels] before
      the tanh.
    optimizer: Adam's state.
    cost: λ.
    kept: what is returned if no better step comes, likewise before the tanh.
    reached: whether a step succeeded.
    norm: that of the best step that succeeded, infinity before.
    success: that of the best step while none succeeded.
    stale: steps since `norm` became smaller.
    stopped: whether to stop early.
    step: how many steps were run.
  """

  trigger: dict[str, Array]
  optimizer: Any
  cost: Cost
  kept: dict[str, Array]
  reached: Array
  norm: Array
  success: Array
  stale: Array
  stopped: Array
  step: Array


def _visible(hidden: Array) -> Array:
  return jnp.tanh(hidden) / (2 - _EPSILON) + 0.5


def _hidden(visible: Array) -> Array:
  return jnp.arctanh((visible - 0.5) * (2 - _EPSILON))


def _shown(trigger: dict[str, Array]) -> tuple[Array, Array]:
  """Mask in [0, 1] and pattern in 0..255, up to ε."""
  return _visible(trigger["mask"]), _visible(trigger["pattern"]) * 255


def _of_class(key: Array, target: Array) -> tuple[Array, Array]:
  """Keys of a class: of where its search starts, and of its batches."""
  start_key, batch_key = jax.random.split(jax.random.fold_in(key, target))
  return start_key, batch_key


def _adam(
  learning_rate: float | Array, betas: tuple[float, float]
) -> optax.GradientTransformation:
  return optax.adam(learning_rate, *betas, eps=_EPSILON)


@functools.partial(jax.jit, static_argnums=0)
def _begin(image_shape: tuple[int, ...], targets: Array, key: Array) -> Search:
  """Where the search for each class starts, leaves [classes, ...]."""

  def one_class(target: Array) -> Search:
    mask_key, pattern_key = jax.random.split(_of_class(key, target)[0])
    trigger = {
      "mask": _hidden(
        jax.random.uniform(mask_key, image_shape[:2], jnp.float32)
      ),
      "pattern": _hidden(
        jax.random.uniform(pattern_key, image_shape, jnp.float32)
      ),
    }
    return Search(
      trigger=trigger,
      # Adam's state does not depend on its settings.
      optimizer=_adam(0.0, OFFICIAL.betas).init(trigger),
      cost=first_cost(),
      kept=trigger,
      reached=jnp.zeros((), bool),
      norm=jnp.full((), jnp.inf, jnp.float32),
      success=jnp.full((), -1, jnp.float32),
      stale=jnp.zeros((), jnp.int32),
      stopped=jnp.zeros((), bool),
      step=jnp.zeros((), jnp.int32),
    )

  return jax.vmap(one_class)(targets)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
@execution.exact
def _advance(
  model: models.Model,
  batches_shape: tuple[int, int],
  chunk: int,
  mesh: parallel.Mesh | None,
  params: models.Params,
  images: Array,
  targets: Array,
  learning_rates: Array,
  search: Search,
  key: Array,
  until: Array | int,
  settings: Settings,
) -> tuple[Search, Array]:
  """Runs every search to a step, and says whether one is not at its end."""

  def one_class(
    common: Any, target: Array, learning_rate: Array, search: Search
  ) -> Search:
    params, images, key, until, settings = common
    batch_key = _of_class(key, target)[1]
    after: Search = lax.while_loop(
      lambda search: (search.step < until) & ~search.stopped,
      lambda search: _step(
        model,
        batches_shape,
        params,
        images,
        target,
        batch_key,
        settings._replace(learning_rate=learning_rate),
        search,
      ),
      search,
    )
    return after

  search = parallel.map_rows(
    one_class,
    (params, images, key, until, settings),
    targets,
    learning_rates,
    search,
    mesh=mesh,
    chunk=chunk,
  )
  # Small, and the next call wants it as this one did.
  search = parallel.everywhere(search, mesh)
  return search, (~search.stopped).any()


def _hits(logits: Array, target: Array, mask: Array) -> Array:
  """How many examples that count are taken for the target."""
  labels = jnp.full(mask.shape, target, jnp.int32)
  return evaluate.right(logits, labels, mask).sum()


def _step(
  model: models.Model,
  batches_shape: tuple[int, int],
  params: models.Params,
  images: Array,
  target: Array,
  batch_key: Array,
  settings: Settings,
  search: Search,
) -> Search:
  """A step of the search for one class: updates, then what they decide."""
  optimizer = _adam(settings.learning_rate, settings.betas)

  def loss_fn(
    trigger: dict[str, Array], chosen: Array
  ) -> tuple[Array, tuple[Array, Array]]:
    mask, pattern = _shown(trigger)
    logits = models.apply(
      model, params, apply_trigger(images[chosen], mask, pattern)
    )
    everyone = jnp.ones(chosen.shape, bool)
    labels = jnp.full(chosen.shape, target, jnp.int32)
    norm = jnp.abs(mask).sum()
    loss = local.cross_entropy(logits, labels, everyone)
    loss = loss + search.cost.value * norm
    return loss, (_hits(logits, target, everyone), norm)

  def one_batch(carry: Any, chosen: Array) -> tuple[Any, tuple[Array, Array]]:
    trigger, _, state = carry
    grads, measures = jax.grad(loss_fn, has_aux=True)(trigger, chosen)
    # optax raises a float to an integer's power, which strict promotion
    # refuses.
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state, trigger)
    updated = optax.apply_updates(trigger, updates)
    return (updated, trigger, state), measures

  # Every image as often as any other, or once.
  order = jax.random.permutation(
    jax.random.fold_in(batch_key, search.step), len(images)
  )
  places = jnp.arange(batches_shape[0] * batches_shape[1]) % len(images)
  rows = order[places].reshape(batches_shape)
  (trigger, last, state), (right, norms) = lax.scan(
    one_batch, (search.trigger, search.trigger, search.optimizer), rows
  )
  success = right.sum().astype(jnp.float32) / rows.size
  norm = norms.mean()
  succeeds = success >= settings.success_threshold
  finite = jax.tree.reduce(
    jnp.logical_and,
    jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), last),
  )
  smaller = finite & succeeds & (norm < search.norm)
  reached = search.reached | smaller
  closer = finite & ~reached & (success > search.success)
  better = smaller | closer
  stale = jnp.where(smaller | ~reached, 0, search.stale + 1)
  return Search(
    trigger=trigger,
    optimizer=state,
    cost=next_cost(search.cost, succeeds, settings),
    kept=jax.tree.map(
      lambda new, old: jnp.where(better, new, old), last, search.kept
    ),
    reached=reached,
    norm=jnp.where(smaller, norm, search.norm),
    success=jnp.where(better, success, search.success),
    stale=stale,
    stopped=(
      (stale >= settings.early_stop_patience)
      & search.cost.rose
      & search.cost.fell
    ),
    step=search.step + 1,
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
@execution.exact
def _found(
  model: models.Model,
  evaluation_batch: int,
  chunk: int,
  mesh: parallel.Mesh | None,
  params: models.Params,
  images: Array,
  targets: Array,
  search: Search,
) -> Reversed:
  """What the searches kept, and its success on all images."""
  samples = len(images)

  def one_class(common: Any, target: Array, search: Search) -> Reversed:
    params, images = common
    mask, pattern = _shown(search.kept)
    mask, pattern = jnp.clip(mask, 0, 1), jnp.clip(pattern, 0, 255)

    def one_batch(start: Array) -> Array:
      places = start + jnp.arange(evaluation_batch)
      chosen = images[jnp.minimum(places, samples - 1)]
      logits = models.apply(model, params, apply_trigger(chosen, mask, pattern))
      return _hits(logits, target, places < samples)

    right = lax.map(one_batch, jnp.arange(0, samples, evaluation_batch)).sum()
    return Reversed(
      targets=target,
      masks=mask,
      patterns=pattern,
      success=right.astype(jnp.float32) / samples,
      norms=mask.sum(),
      reached=search.reached,
      steps=search.step,
    )

  found: Reversed = parallel.map_rows(
    one_class, (params, images), targets, search, mesh=mesh, chunk=chunk
  )
  return parallel.everywhere(found, mesh)


# --- outliers ----------------------------------------------------------------


class Outliers(NamedTuple):
  """Which classes have a trigger that is too small to be natural.

  Attributes:
    anomaly: float32 [classes], the anomaly index.
    flagged: bool [classes].
  """

  anomaly: Array
  flagged: Array


def outliers(norms: Array | np.ndarray, *, threshold: float = 2.0) -> Outliers:
  """Finds masks that are outlying in being small.

  A norm that is larger than the median, or NaN, is not flagged, whatever its
  index (`selection.anomaly_index`).

  Args:
    norms: [classes], L1 norms of the reversed masks.
    threshold: an index above it is an anomaly.

  Returns:
    Index and flags.

  References:
    The paper, Section IV, "Detect Backdoor via Outlier Detection".
  """
  norms = jnp.asarray(norms, jnp.float32)
  index = selection.anomaly_index(norms)
  small = norms < jnp.nanmedian(norms)
  return Outliers(index, (index > threshold) & small)


# --- mitigation --------------------------------------------------------------


class Pruned(NamedTuple):
  """Outcome of pruning the neurons that a reversed trigger activates.

  Attributes:
    params: the pruned model.
    neuron_mask: bool [neurons], True for neurons that stay.
    order: int [neurons], the pruning sequence.
    accuracies: float [neurons + 1], on the clean images along the sequence.
    successes: float [neurons + 1], the reversed trigger's; at `num_pruned` it
      tells whether the trigger is silent or the accuracy ended the pruning.
    num_pruned: how many neurons were pruned.
  """

  params: models.Params
  neuron_mask: Array
  order: np.ndarray
  accuracies: np.ndarray
  successes: np.ndarray
  num_pruned: int


def prune(
  model: models.Model,
  params: models.Params,
  mask: Array,
  pattern: Array,
  validation: evaluate.Examples,
  *,
  target: Array | int,
  silent_below: float = 0.05,
  max_drop: float = 0.01,
) -> Pruned:
  """Prunes the neurons that the reversed trigger activates, one by one.

  Those whose mean activation the trigger raises most go first, until the
  trigger no longer works, or the next one would cost too much accuracy. (The
  paper prunes the second to last layer; here, as everywhere in this library,
  neurons are the target convolution's channels.)

  Args:
    model: the network.
    params: the trained model.
    mask: float32 [height, width] of the reversed trigger.
    pattern: float32 [height, width, channels] in 0..255.
    validation: clean images with their labels.
    target: the class to which the trigger leads.
    silent_below: success on images of other classes below which the trigger
      counts as silent.
    max_drop: the floor lies this far below the unpruned model's accuracy.

  Returns:
    The pruned model and how it came about. Without any image of another class
    the trigger is never silent, and the accuracy alone decides.

  References:
    The paper, Section VI, "Patching DNN via Neuron Pruning".
  """
  stamped = triggered(validation, mask, pattern, target=target)
  # The same images with and without, so that only the trigger differs.
  same = validation.replace(mask=stamped.mask)
  gap = server.mean_activations(
    model, params, stamped
  ) - server.mean_activations(model, params, same)
  order = pruning.pruning_order(gap)
  accuracies, successes = (
    np.asarray(pruning.pruning_curve(model, params, order, on), np.float64)
    for on in (validation, stamped)
  )
  count = selection.last_above(accuracies, accuracies[0] - max_drop)
  silent = np.flatnonzero(successes < silent_below)
  if silent.size:
    count = min(count, int(silent[0]))
  neuron_mask = pruning.mask_without_first(order, count)
  return Pruned(
    params=models.mask_neurons(model, params, neuron_mask),
    neuron_mask=neuron_mask,
    order=np.asarray(order),
    accuracies=accuracies,
    successes=successes,
    num_pruned=count,
  )


class Mixture(NamedTuple):
  """What unlearning trains on.

  Attributes:
    images: float32 [samples, height, width, channels] in [0, 1].
    labels: int [samples], all correct.
    chosen: int32 [samples], which of the given images they are.
    triggered: bool [samples], which carry the reversed trigger.
  """

  images: Array
  labels: Array
  chosen: Array
  triggered: Array


def mixture(
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  mask: Array,
  pattern: Array,
  *,
  key: Array,
  share_of_data: float,
  share_triggered: float,
) -> Mixture:
  """Draws clean images and adds the reversed trigger to some.

  Args:
    images: uint8 [n, height, width, channels].
    labels: int [n].
    mask: float32 [height, width].
    pattern: float32 [height, width, channels] in 0..255.
    key: random key.
    share_of_data: of the images are drawn, without replacement.
    share_triggered: of those get the trigger; their labels stay.

  Returns:
    round(share_of_data · n) images, at least one.

  Raises:
    errors.ConfigError: there are no images, or a share is not one.
  """
  total = len(labels)
  if not total:
    raise errors.ConfigError("no images were given to unlearn a trigger with.")
  if not (0 < share_of_data <= 1 and 0 <= share_triggered <= 1):
    raise errors.ConfigError(
      f"share_of_data={share_of_data} and share_triggered={share_triggered}:"
      " both are shares, from 0 to 1, and the first is not 0."
    )
  drawn = max(round(share_of_data * total), 1)
  chosen = jax.random.permutation(key, total)[:drawn]
  with_trigger = jnp.arange(drawn) < round(share_triggered * drawn)
  clean = jnp.asarray(images)[chosen]
  nowhere = jnp.zeros_like(mask)
  return Mixture(
    images=jnp.where(
      with_trigger.reshape(-1, 1, 1, 1),
      apply_trigger(clean, mask, pattern),
      apply_trigger(clean, nowhere, pattern),
    ),
    labels=jnp.asarray(labels)[chosen],
    chosen=chosen,
    triggered=with_trigger,
  )


def unlearn(
  model: models.Model,
  params: models.Params,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  mask: Array,
  pattern: Array,
  *,
  key: Array,
  optimizer: optax.GradientTransformation = server.SGD,
  epochs: int = 1,
  batch_size: int = 50,
  share_of_data: float = 1.0,
  share_triggered: float = 0.2,
  neuron_mask: Array | None = None,
  mesh: parallel.Mesh | None = None,
  on_steps: server.OnSteps | None = None,
) -> models.Params:
  """Trains the model to see through the reversed trigger.

  Args:
    model: the network.
    params: the trained model.
    images: uint8 [n, height, width, channels], clean.
    labels: int [n], true labels; images with the trigger keep theirs.
    mask: float32 [height, width] of the reversed trigger.
    pattern: float32 [height, width, channels] in 0..255.
    key: random key.
    optimizer: plain SGD if none is given.
    epochs: passes over the images drawn.
    batch_size: images per step.
    share_of_data: how many of the images are drawn. The paper takes a tenth
      of the *training* images; a server's own, held out, are rarely more than
      that, so all are used unless told otherwise.
    share_triggered: how many of those drawn get the trigger.
    neuron_mask: bool [neurons], False for neurons pruned before, which stay
      at zero; None has none.
    mesh: devices that every batch is spread over.
    on_steps: see `server.train`.

  Returns:
    The parameters after unlearning.

  Raises:
    errors.ConfigError: see `mixture`.

  References:
    The paper, Section VI, "Patching DNNs via Unlearning".
  """
  draw_key, train_key = jax.random.split(key)
  mixed = mixture(
    images,
    labels,
    mask,
    pattern,
    key=draw_key,
    share_of_data=share_of_data,
    share_triggered=share_triggered,
  )
  if neuron_mask is None:
    neuron_mask = jnp.ones(model.neurons, bool)
  return server.train(
    model,
    params,
    neuron_mask,
    mixed.images,
    mixed.labels,
    key=train_key,
    optimizer=optimizer,
    epochs=epochs,
    batch_size=batch_size,
    mesh=mesh,
    on_steps=on_steps,
  )
