"""What a server does alone with clean images: measure neurons, train.

Training is that of a client (`local`), for a client that is benign and the
only one.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any
from typing import TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from fljax import data
from fljax import errors
from fljax import evaluate
from fljax import execution
from fljax import federation as federations
from fljax import local
from fljax import models
from fljax import parallel
from fljax import triggers

Array = jax.Array

# Is told how many steps were run, and of how many.
OnSteps: TypeAlias = Callable[[int, int], None]


# One object per setting, so that calls share one compiled program.
@functools.cache
def sgd(
  learning_rate: float, gradient_clip: float = 0.0
) -> optax.GradientTransformation:
  """Plain SGD; the norm of a batch's gradient is limited, unless by 0."""
  if not gradient_clip:
    return optax.sgd(learning_rate)
  return optax.chain(
    optax.clip_by_global_norm(gradient_clip), optax.sgd(learning_rate)
  )


# The rate is this project's choice: enough for an epoch to unlearn a trigger
# from the MNIST networks, and half of what they are trained with.
SGD = sgd(0.1)


@functools.partial(jax.jit, static_argnums=0)
@execution.exact
def mean_activations(
  model: models.Model, params: models.Params, examples: evaluate.Examples
) -> Array:
  """The mean activation of every neuron.

  Over the examples that count and the channel's positions, after the ReLU:
  what `cleanse.reports.client_activations` is for one client.

  Args:
    model: the network.
    params: its parameters.
    examples: their labels do not matter.

  Returns:
    float32 [neurons]; 0 if no example counts.
  """

  def total(batch: evaluate.Examples) -> Array:
    return models.summed_activations(model, params, batch.images, batch.mask)

  sums = lax.map(total, examples).sum(axis=0)
  return sums / jnp.maximum(examples.mask.sum(), 1).astype(sums.dtype)


# Steps between two calls of `on_steps`: a fraction of a second of MNIST's
# network on two cores, some seconds of VGG11.
_TOLD_EVERY = 20

_STATIC = ("model", "optimizer", "epochs", "batch_size", "augmentation", "mesh")

# Of mini-batch gradients, or what makes it of arrays.
Optimizer: TypeAlias = (
  optax.GradientTransformation | Callable[..., optax.GradientTransformation]
)


def train(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  key: Array,
  optimizer: Optimizer,
  arguments: tuple[Any, ...] = (),
  epochs: int,
  batch_size: int,
  augmentation: str = "none",
  mesh: parallel.Mesh | None = None,
  on_steps: OnSteps | None = None,
) -> models.Params:
  """Trains on with pruned neurons held at zero.

  Guarantees: the result is unchanged by `models.mask_neurons`, after any
  number of steps and with any optimizer.

  Args:
    model: the network.
    params: where to start.
    neuron_mask: bool [neurons], False for pruned neurons.
    images: [samples, height, width, channels], uint8 or floating point in
      [0, 1].
    labels: int [samples].
    key: random key of the batches.
    optimizer: of mini-batch gradients, or a function that makes it of
      `arguments`: the same function with others is the same program. Its state
      starts afresh.
    arguments: arrays and numbers; empty for an optimizer that is none.
    epochs: passes over the samples; 0 only prunes.
    batch_size: samples per step; the last batch of an epoch may be smaller.
    augmentation: see `local.augment`.
    mesh: devices that every batch is spread over; None takes those that the
      model is on, each for the whole batch.
    on_steps: is told how many steps were run of how many, first 0 and then
      every few, and may end training by raising; where nothing is trained,
      nothing is told. It changes nothing about the result.

  Returns:
    The trained parameters.

  Raises:
    errors.ConfigError: there is no image to train on.
    errors.DataError: see `data.require_usable`.
  """
  params = models.mask_neurons(model, params, neuron_mask)
  if not epochs:
    return params
  if not len(labels):
    raise errors.ConfigError("no images were given to train on.")
  # Of several processes, none has all that lies on their devices.
  if getattr(images, "is_fully_addressable", True):
    data.require_usable(np.asarray(images), np.asarray(labels))
  arguments = jax.tree.map(jnp.asarray, arguments)
  params, neuron_mask, alone, arguments, key = parallel.replicate(
    (params, neuron_mask, _alone(model, images, labels), arguments, key), mesh
  )
  options: dict[str, Any] = {
    "model": model,
    "optimizer": optimizer,
    "epochs": epochs,
    "batch_size": batch_size,
    "augmentation": augmentation,
    "mesh": mesh,
  }
  carry, batches = _begin(params, alone, key, arguments, **options)
  steps = len(batches[0])
  at_once = steps if on_steps is None else _TOLD_EVERY
  for done in range(0, steps, at_once):
    if on_steps is not None:
      jax.block_until_ready(carry)
      on_steps(done, steps)
    carry = _advance(
      carry,
      batches,
      np.int32(done),
      np.int32(min(done + at_once, steps)),
      alone,
      neuron_mask,
      arguments,
      **options,
    )
  if on_steps is not None:
    jax.block_until_ready(carry)
    on_steps(steps, steps)
  return carry[0]


def _alone(
  model: models.Model, images: Array | np.ndarray, labels: Array | np.ndarray
) -> federations.Federation:
  """The server as the only client, which does not attack."""
  samples = len(labels)
  return federations.Federation(
    ids=jnp.zeros((), jnp.int32),
    images=jnp.asarray(images),
    labels=jnp.asarray(labels, jnp.int32),
    mask=jnp.ones(samples, bool),
    poisoned=jnp.zeros(samples, bool),
    attacker=jnp.zeros((), bool),
    attack_start=jnp.zeros((), jnp.int32),
    attack_end=jnp.zeros((), jnp.int32),
    scale=jnp.ones((), jnp.float32),
    rate=jnp.ones((), jnp.float32),
    attack_rate=jnp.ones((), jnp.float32),
    trigger=triggers.from_pixels([], model.image_shape),
  )


def _steps(
  model: models.Model,
  optimizer: Optimizer,
  arguments: tuple[Any, ...],
  **options: Any,
) -> local.Steps:
  if not isinstance(optimizer, optax.GradientTransformation):
    optimizer = optimizer(*arguments)
  return local.sgd_steps(model, optimizer, **options)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _begin(
  params: models.Params,
  alone: federations.Federation,
  key: Array,
  arguments: tuple[Any, ...],
  *,
  model: models.Model,
  optimizer: Optimizer,
  mesh: parallel.Mesh | None,
  **options: Any,
) -> tuple[Any, tuple[Array, Array]]:
  """What the first step takes up, and what all steps take."""
  steps = _steps(model, optimizer, arguments, **options)
  indices, keys = steps.batches(alone, alone.attacker, key)
  return steps.begin(params, alone.attacker), (
    parallel.spread_batches(indices, mesh, fill=len(alone.labels)),
    keys,
  )


@functools.partial(jax.jit, static_argnames=_STATIC)
def _advance(
  carry: Any,
  batches: tuple[Array, Array],
  first: Array,
  last: Array,
  alone: federations.Federation,
  neuron_mask: Array,
  arguments: tuple[Any, ...],
  *,
  model: models.Model,
  optimizer: Optimizer,
  mesh: parallel.Mesh | None,
  **options: Any,
) -> Any:
  """Runs the steps from `first` until before `last`."""
  steps = _steps(model, optimizer, arguments, **options)

  def step(index: Array, carry: Any) -> Any:
    batch = jax.tree.map(lambda leaf: leaf[index], batches)
    after, _ = steps.step(carry, batch, alone, neuron_mask, alone.attacker)
    return after

  # However the steps are cut into calls, it is one program: the same bits.
  return parallel.everywhere(lax.fori_loop(first, last, step, carry), mesh)
