"""What a server does alone with clean images: measure neurons, train.

Training is that of a client (`local`), for a client that is benign and the
only one.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
import jax.numpy as jnp
import optax

from fljax import evaluate
from fljax import execution
from fljax import federation as federations
from fljax import local
from fljax import models
from fljax import triggers

Array = jax.Array


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
    active = model.activations(params, model.stem(params, batch.images))
    means = active.reshape(len(batch.mask), -1, model.neurons).mean(axis=1)
    return jnp.where(batch.mask[:, jnp.newaxis], means, 0).sum(axis=0)

  sums = lax.map(total, examples).sum(axis=0)
  return sums / jnp.maximum(examples.mask.sum(), 1).astype(sums.dtype)


def train(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  images: Array,
  labels: Array,
  *,
  key: Array,
  optimizer: optax.GradientTransformation,
  epochs: int,
  batch_size: int,
  augmentation: str = "none",
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
    optimizer: of mini-batch gradients; its state starts afresh.
    epochs: passes over the samples; 0 only prunes.
    batch_size: samples per step; the last batch of an epoch may be smaller.
    augmentation: see `local.augment`.

  Returns:
    The trained parameters.
  """
  params = models.mask_neurons(model, params, neuron_mask)
  if not epochs:
    return params
  samples = len(labels)
  alone = federations.Federation(
    ids=jnp.zeros((), jnp.int32),
    images=images,
    labels=labels.astype(jnp.int32),
    mask=jnp.ones(samples, bool),
    poisoned=jnp.zeros(samples, bool),
    attacker=jnp.zeros((), bool),
    attack_start=jnp.zeros((), jnp.int32),
    scale=jnp.ones((), jnp.float32),
    rate=jnp.ones((), jnp.float32),
    attack_rate=jnp.ones((), jnp.float32),
    trigger=triggers.from_pixels([], model.image_shape),
  )
  training = local.sgd_training(
    model,
    optimizer,
    epochs=epochs,
    batch_size=batch_size,
    augmentation=augmentation,
  )
  trained, _ = training(params, alone, neuron_mask, alone.attacker, key)
  return trained


# An optimizer that holds traced arrays takes `train` itself.
compiled_train = jax.jit(
  train,
  static_argnames=(
    "model",
    "optimizer",
    "epochs",
    "batch_size",
    "augmentation",
  ),
)
