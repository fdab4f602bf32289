"""One client's training: a pure function, made for mapping over clients."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax
from jax import lax
import jax.numpy as jnp
import optax

from fljax import errors
from fljax import execution
from fljax import federation as federations
from fljax import models
from fljax import triggers

Array = jax.Array
Params = models.Params


class LocalTraining(Protocol):
  """Trains one client from the global model."""

  def __call__(
    self,
    params: Params,
    client: federations.Federation,
    neuron_mask: Array,
    active: Array,
    key: Array,
    *memory: Any,
    told: Any = (),
  ) -> tuple[Params, Array]:
    """Runs the client's local epochs.

    Args:
      params: the global model.
      client: one client's data, without the clients axis.
      neuron_mask: bool [neurons]; pruned neurons stay at zero.
      active: bool scalar, whether the client attacks in this round.
      key: random key of this client in this round.
      *memory: where attackers remember (`attacks.RememberHook`), what.
      told: what the server tells clients beside the model, if it does
        (`rounds.ServerState`).

    Returns:
      The client's model and its mean training loss, a scalar.
    """


def cross_entropy(logits: Array, labels: Array, mask: Array) -> Array:
  """Mean cross-entropy over the samples that count.

  Args:
    logits: [batch, classes].
    labels: int32 [batch].
    mask: bool [batch].

  Returns:
    Scalar; 0 if no sample counts.
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  weights = mask.astype(losses.dtype)
  return (losses * weights).sum() / jnp.maximum(weights.sum(), 1)


def epoch_batches(key: Array, mask: Array, batch_size: int) -> Array:
  """Shuffles the samples that count into batches, padding last.

  Args:
    key: random key.
    mask: bool [samples].
    batch_size: samples per batch.

  Returns:
    int32 [ceil(samples / batch_size), batch_size], indices of samples. Those
    that count come first, each once; indices of the others (and `samples`,
    out of range, in the last batch) follow.
  """
  samples = mask.shape[0]
  order = jnp.argsort(jnp.where(mask, jax.random.uniform(key, (samples,)), 2.0))
  padding = -samples % batch_size
  order = jnp.pad(
    order.astype(jnp.int32), (0, padding), constant_values=samples
  )
  return order.reshape(-1, batch_size)


# Of an attacker's loss; other numbers are augmentation's.
_LOSS_KEY = 1000
# How far "crop" shifts an image at most, in pixels.
_SHIFT = 4


def _mirrored(key: Array, images: Array) -> Array:
  chosen = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
  return jnp.where(chosen, images[:, :, ::-1], images)


def _shifted(key: Array, images: Array) -> Array:
  sides = [(0, 0), (_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0)]
  padded = jnp.pad(images, sides)
  places = jax.random.randint(key, (images.shape[0], 2), 0, 2 * _SHIFT + 1)
  return jax.vmap(
    lambda image, place: lax.dynamic_slice(
      image, (place[0], place[1], 0), images.shape[1:]
    )
  )(padded, places)


# By name, in the order in which they are applied.
AUGMENTATIONS: dict[str, tuple[Callable[[Array, Array], Array], ...]] = {
  "none": (),
  "flip": (_mirrored,),
  "crop": (_shifted, _mirrored),
}


def augment(key: Array, images: Array, kind: str) -> Array:
  """Changes training images at random, each by itself.

  Args:
    key: random key of this batch.
    images: [batch, height, width, channels].
    kind: "none"; "flip", which mirrors half of them left to right; or "crop",
      which also shifts by up to 4 pixels each way, black coming in.

  Returns:
    Images of the same shape and type.

  Raises:
    errors.ConfigError: there is no such kind.

  References:
    The usual ones for CIFAR-10, from Deep Residual Learning for Image
    Recognition (He, Zhang, Ren, Sun), Section 4.2.
  """
  errors.require_choice("augmentation", kind, AUGMENTATIONS)
  for index, change in enumerate(AUGMENTATIONS[kind]):
    images = change(jax.random.fold_in(key, index), images)
  return images


def _where(condition: Array, new: Params, old: Params) -> Params:
  return jax.tree.map(functools.partial(jnp.where, condition), new, old)


class Extra(NamedTuple):
  """What clients do in each step beside descending, if they do not attack.

  Both are given what the server tells clients.

  Attributes:
    gradients: (gradients, told) -> gradients, before the optimizer.
    hold: (params, told) -> params, after the step.
  """

  gradients: Callable[[Params, Any], Params]
  hold: Callable[[Params, Any], Params]


class Steps(NamedTuple):
  """A client's training in steps, for whoever runs the loop over them.

  What steps hand on are the parameters and the optimizer's state.

  Attributes:
    batches: (client, active, key) -> what each step takes: int32 [steps, batch]
      indices of samples, where one of `samples` or more is none, and keys
      [steps]. Batches may be filled up with such indices.
    begin: (params, active) -> what the first step takes up.
    step: (what was handed on, a step's indices and key, client, neuron_mask,
      active, the model that the first step began with, and what attackers
      remember, at which only their hooks look; told, what the server tells
      clients) -> what it hands on, and (the sum of the losses of its samples,
      how many they are), two scalars.
  """

  batches: Callable[[federations.Federation, Array, Array], tuple[Array, Array]]
  begin: Callable[[Params, Array], tuple[Params, Any]]
  step: Callable[..., tuple[tuple[Params, Any], tuple[Array, Array]]]


def sgd_steps(
  model: models.Model,
  optimizer: optax.GradientTransformation,
  *,
  epochs: int,
  batch_size: int,
  most_steps: int = 0,
  last_conv_l2: float = 0.0,
  precision: str = "default",
  augmentation: str = "none",
  attackers_hook: Callable[..., Params] | None = None,
  attackers_start: Callable[[Params], Params] | None = None,
  attackers_loss: Callable[..., Array] | None = None,
  extra: Extra | None = None,
) -> Steps:
  """The steps that `sgd_training` is made of.

  Args:
    model: the network.
    optimizer: applied to the masked mean gradient of each batch.
    epochs: passes over the client's data.
    batch_size: samples per step; the last batch of an epoch may be smaller.
    most_steps: training ends after so many steps, if the epochs have more; a
      client then sees a random part of its data. 0 sets no limit.
    last_conv_l2: λ of the penalty (λ/2)·Σw² on the target convolution's
      kernel (Section VI-A).
    precision: of matrix products and convolutions, forward and backward: one
      of `execution.PRECISIONS`. Parameters, their gradients and updates, and
      the loss are float32 at all of them.
    augmentation: see `augment`; a trigger is stamped after it, where it lies
      in test images too.
    attackers_hook: applied to an active attacker's model after each step, and
      given the global model that the round began with, and what attackers
      remember, if they do.
    attackers_start: applied to an active attacker's model before the first.
    attackers_loss: of parameters, activations, labels, which samples are
      poisoned, which count, a key, and the global model that the round began
      with; added to an active attacker's loss in each step, but not to the
      loss that is returned.
    extra: what a client that does not attack does in each step besides; it
      needs the server to tell clients something.

  Returns:
    The steps.
  """
  dtype = execution.compute_dtype(precision)

  def loss_fn(
    params: Params,
    images: Array,
    labels: Array,
    poisoned: Array,
    mask: Array,
    active: Array,
    key: Array,
    start: Params | None,
  ) -> tuple[Array, tuple[Array, models.RunningStatistics]]:
    rounded = models.as_type(params, dtype)
    activations, statistics = models.in_training(model, rounded, images, mask)
    logits = model.head(rounded, activations).astype(jnp.float32)
    loss = cross_entropy(logits, labels, mask)
    kernel = models.target_kernel(model, params)
    total = loss + last_conv_l2 / 2 * jnp.square(kernel).sum()
    if attackers_loss is not None:
      added = attackers_loss(
        rounded, activations, labels, poisoned, mask, key, start
      )
      total += jnp.where(active, added, 0.0)
    return total, (loss, statistics)

  def batches(
    client: federations.Federation, active: Array, key: Array
  ) -> tuple[Array, Array]:
    counts = federations.training_mask(client, active)
    size = min(batch_size, counts.shape[0])
    indices = jax.vmap(lambda k: epoch_batches(k, counts, size))(
      jax.random.split(key, epochs)
    ).reshape(-1, size)
    if most_steps:
      if epochs > 1:
        # A smaller client's padding, at the end of each epoch, is no step.
        counting = jnp.append(counts, False)[indices].any(axis=1)
        indices = indices[jnp.argsort(~counting, stable=True)]
      indices = indices[:most_steps]
    # Not among those that shuffle: without augmentation nothing changes.
    keys = jax.random.split(jax.random.fold_in(key, epochs), len(indices))
    return indices, keys

  def begin(params: Params, active: Array) -> tuple[Params, Any]:
    if attackers_start is not None:
      params = _where(active, attackers_start(params), params)
    return params, optimizer.init(params)

  @execution.at_precision(precision)
  def step(
    carry: tuple[Params, Any],
    batch: tuple[Array, Array],
    client: federations.Federation,
    neuron_mask: Array,
    active: Array,
    start: Params | None = None,
    *memory: Any,
    told: Any = (),
  ) -> tuple[tuple[Params, Any], tuple[Array, Array]]:
    params, opt_state = carry
    indices, step_key = batch
    counts = federations.training_mask(client, active)
    rate = client.rate * jnp.where(active, client.attack_rate, 1.0)
    samples = counts.shape[0]
    valid = indices < samples
    indices = jnp.minimum(indices, samples - 1)
    mask = valid & counts[indices]
    images = augment(step_key, client.images[indices], augmentation)
    stamped = triggers.stamp(images, client.trigger)
    poisoned = client.poisoned[indices]
    images = jnp.where(poisoned.reshape(-1, 1, 1, 1), stamped, images)
    grads, (loss, statistics) = jax.grad(loss_fn, has_aux=True)(
      params,
      images,
      client.labels[indices],
      poisoned,
      mask,
      active,
      jax.random.fold_in(step_key, _LOSS_KEY),
      start,
    )
    if extra is not None:
      grads = _where(active, grads, extra.gradients(grads, told))
    updates, new_state = optimizer.update(grads, opt_state, params)
    updates = jax.tree.map(lambda leaf: rate * leaf, updates)
    new = optax.apply_updates(params, updates)
    # Also undoes what the optimizer did to them: weight decay, for example.
    new = models.with_running_statistics(new, statistics)
    if extra is not None:
      new = _where(active, new, extra.hold(new, told))
    if attackers_hook is not None:
      new = _where(active, attackers_hook(new, start, *memory), new)
    new = models.mask_neurons(model, new, neuron_mask)
    count = mask.sum().astype(jnp.float32)
    carry = jax.tree.map(
      lambda new, old: jnp.where(count > 0, new, old),
      (new, new_state),
      (params, opt_state),
    )
    return carry, (loss * count, count)

  return Steps(batches, begin, step)


def sgd_training(
  model: models.Model, optimizer: optax.GradientTransformation, **options: Any
) -> LocalTraining:
  """Local epochs of mini-batch gradient descent.

  The optimizer's state starts afresh in every round. A batch without any
  sample that counts changes nothing, so clients of unequal size train
  together under one shape.

  Args:
    model: the network.
    optimizer: applied to the masked mean gradient of each batch.
    **options: see `sgd_steps`.

  Returns:
    The training function.
  """
  steps = sgd_steps(model, optimizer, **options)

  def train(
    params: Params,
    client: federations.Federation,
    neuron_mask: Array,
    active: Array,
    key: Array,
    *memory: Any,
    told: Any = (),
  ) -> tuple[Params, Array]:
    (after, _), (losses, numbers) = lax.scan(
      lambda carry, batch: steps.step(
        carry, batch, client, neuron_mask, active, params, *memory, told=told
      ),
      steps.begin(params, active),
      steps.batches(client, active, key),
    )
    return after, losses.sum() / jnp.maximum(numbers.sum(), 1)

  return train
