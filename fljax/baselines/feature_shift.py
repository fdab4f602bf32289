"""Feature Shift Tuning: the classifier learns anew, away from what it was.

    params = tune(model, params, neuron_mask, images, labels, key=key)

All data are the server's own clean images; no client takes part then, so that
it does not matter how many of them attack. Or the clients tune, in federated
rounds, attackers among them, and the server needs no image: `redrawn` is what
it sends, `by_clients` what they do.

References:
  Towards Stable Backdoor Purification through Feature Shift Tuning (Min, Qin,
  Shen, Cheng, NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from fljax import errors
from fljax import local
from fljax import models
from fljax import parallel
from fljax.baselines import server

Array = jax.Array
Params = models.Params


def tune(
  model: models.Model,
  params: Params,
  neuron_mask: Array,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  key: Array,
  learning_rate: float | Array = 0.1,
  gradient_clip: float | Array = jnp.inf,
  weight: float | Array = 0.1,
  epochs: int = 10,
  batch_size: int = 50,
  augmentation: str = "none",
  mesh: parallel.Mesh | None = None,
  on_steps: server.OnSteps | None = None,
) -> Params:
  """Draws the last layer anew and trains everything, that layer away from w₀.

  The loss is cross-entropy + α⟨w, w₀⟩ with the last layer's kernel w and its
  trained one w₀; after every step w has w₀'s norm.

  Args:
    model: the network.
    params: the trained model.
    neuron_mask: bool [neurons], False for neurons that stay pruned.
    images: uint8 [samples, height, width, channels], the server's own.
    labels: int [samples].
    key: random key of the new weights and of the batches.
    learning_rate: of plain SGD; it falls to 0 along half a cosine. The
      official code has 0.01 with a momentum of 0.9, which goes as far.
    gradient_clip: largest norm of a batch's gradient.
    weight: α.
    epochs: passes over the images, at least one.
    batch_size: images per step.
    augmentation: see `local.augment`.
    mesh: devices that every batch is spread over.
    on_steps: see `server.train`.

  Returns:
    The tuned parameters.

  Raises:
    errors.ConfigError: the model has no such layer, or nothing would teach
      the new one.

  References:
    Towards Stable Backdoor Purification through Feature Shift Tuning (Min,
    Qin, Shen, Cheng, NeurIPS 2023), and its official code.
  """
  if epochs < 1 or not len(labels):
    raise errors.ConfigError(
      f"{len(labels)} images {epochs} times over teach a new last layer"
      " nothing."
    )
  path = models.classifier_path(model, params)
  kernel_key, bias_key, train_key = jax.random.split(key, 3)
  start, before = redrawn(model, params, kernel_key, bias_key)
  return server.train(
    model,
    start,
    neuron_mask,
    images,
    labels,
    key=train_key,
    optimizer=_optimizer(path, epochs * -(-len(labels) // batch_size)),
    arguments=(before, weight, learning_rate, gradient_clip),
    epochs=epochs,
    batch_size=batch_size,
    augmentation=augmentation,
    mesh=mesh,
    on_steps=on_steps,
  )


def redrawn(
  model: models.Model, params: Params, kernel_key: Array, bias_key: Array
) -> tuple[Params, Array]:
  """The model with its last layer drawn anew.

  Args:
    model: the network.
    params: the trained model.
    kernel_key: random key of the new weights, uniform in ±1/sqrt(fan_in).
    bias_key: that of the new biases, of the same distribution, if there are.

  Returns:
    The parameters, and the kernel that they had, w₀ [features, classes].

  Raises:
    errors.ConfigError: the model has no such layer.
  """
  path = models.classifier_path(model, params)
  before = models.head_leaf(params, path)
  bound = 1 / np.sqrt(before.shape[0])

  def drawn(key: Array, like: Array) -> Array:
    return jax.random.uniform(key, like.shape, like.dtype, -bound, bound)

  start = models.with_head_leaf(params, path, drawn(kernel_key, before))
  bias_path = models.classifier_bias_path(params, path)
  if bias_path is not None:
    bias = models.head_leaf(params, bias_path)
    start = models.with_head_leaf(start, bias_path, drawn(bias_key, bias))
  return start, before


def by_clients(model: models.Model) -> local.Extra:
  """What clients do in each step of federated Feature Shift Tuning.

  The server tells them w₀ (`redrawn`) and α: to the gradient of their loss they
  add that of α⟨w, w₀⟩, and after each step the kernel w of their own last layer
  has w₀'s norm; that of their mean is smaller. Attackers need not.

  Args:
    model: the network.

  Returns:
    For `local.sgd_steps`.

  Raises:
    errors.ConfigError: the model has no such layer.
  """
  path = models.classifier_path(
    model, jax.eval_shape(model.init, jax.random.key(0))
  )

  def gradients(gradients: Params, told: tuple[Array, Array]) -> Params:
    before, weight = told
    leaf = models.head_leaf(gradients, path)
    return models.with_head_leaf(gradients, path, leaf + weight * before)

  def hold(params: Params, told: tuple[Array, Array]) -> Params:
    before, _ = told
    kernel = models.head_leaf(params, path)
    norm = jnp.linalg.norm(before)
    return models.with_head_leaf(params, path, _scaled_to(norm, kernel))

  return local.Extra(gradients, hold)


def _scaled_to(norm: Array, kernel: Array) -> Array:
  # A kernel of zeros has no direction to be kept.
  least = jnp.maximum(jnp.square(kernel).sum(), 1e-30)
  return kernel * (norm * lax.rsqrt(least))


# One function per path and number of steps, so that calls share one program.
@functools.cache
def _optimizer(
  path: tuple[str, ...], steps: int
) -> Callable[..., optax.GradientTransformation]:
  """What makes the optimizer: of w₀, α, the rate and the gradients' limit."""

  def make(
    before: Array, weight: Array, learning_rate: Array, gradient_clip: Array
  ) -> optax.GradientTransformation:
    return optax.chain(
      _pulled(path, weight * before),
      _sgd(steps, learning_rate, gradient_clip),
      _of_norm(path, jnp.linalg.norm(before)),
    )

  return make


def _sgd(
  steps: int, learning_rate: Array, gradient_clip: Array
) -> optax.GradientTransformation:
  def rate(count: Array) -> Array:
    done = count.astype(jnp.float32) / steps
    return learning_rate * (1 + jnp.cos(jnp.pi * done)) / 2

  return optax.chain(optax.clip_by_global_norm(gradient_clip), optax.sgd(rate))


def _pulled(
  path: tuple[str, ...], gradient: Array
) -> optax.GradientTransformation:
  """Adds what a linear term of the loss has as its gradient."""

  def update(
    gradients: Params, state: optax.EmptyState, params: Params | None = None
  ) -> tuple[Params, optax.EmptyState]:
    del params
    leaf = models.head_leaf(gradients, path)
    return models.with_head_leaf(gradients, path, leaf + gradient), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _of_norm(
  path: tuple[str, ...], norm: Array
) -> optax.GradientTransformation:
  """Changes an update so that a kernel has this norm after it."""

  def update(
    updates: Params, state: optax.EmptyState, params: Params | None = None
  ) -> tuple[Params, optax.EmptyState]:
    assert params is not None
    before = models.head_leaf(params, path)
    after = _scaled_to(norm, before + models.head_leaf(updates, path))
    return models.with_head_leaf(updates, path, after - before), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
