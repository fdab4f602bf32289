"""Extreme weights: those beyond μ ± Δσ become zero. Gains of neurons."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fljax import errors
from fljax import evaluate
from fljax import execution
from fljax import federation as federations
from fljax import models
from fljax.cleanse import reports

Array = jax.Array


def statistics(
  kernel: Array, neuron_mask: Array, over: str
) -> tuple[Array, Array]:
  """Mean and standard deviation of a layer's weights.

  Args:
    kernel: [..., neurons].
    neuron_mask: bool [neurons], False for pruned neurons.
    over: "surviving" leaves the weights of pruned neurons out, "all" counts
      their zeros. The paper leaves this open; with "all", σ shrinks with
      every pruned neuron.

  Returns:
    μ and σ (of the population), scalars; 0 if no neuron survives.

  Raises:
    errors.ConfigError: over is neither.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section IV-C.
  """
  errors.require_choice("statistics", over, STATISTICS)
  keep = neuron_mask | (over == "all")
  keep = keep.reshape((1,) * (kernel.ndim - 1) + (-1,))
  counted = jnp.broadcast_to(keep, kernel.shape).astype(kernel.dtype)
  count = jnp.maximum(counted.sum(), 1)
  mean = (kernel * counted).sum() / count
  return mean, jnp.sqrt((jnp.square(kernel - mean) * counted).sum() / count)


STATISTICS = ("surviving", "all")


def living(kernel: Array) -> Array:
  """Which neurons have any weight: who sees a model sees what was pruned.

  Args:
    kernel: [..., neurons].

  Returns:
    bool [neurons].
  """
  return (kernel != 0).any(axis=tuple(range(kernel.ndim - 1)))


def gains(kernel: Array) -> Array:
  """How far a single cell of the input can raise each neuron.

  A trigger is small: what the last convolution of a shallow network sees of it
  is a cell or two of its input, never negative after a ReLU. A neuron that
  answers to it gathers positive weight at one place of its kernel, also where
  each weight is limited; others spread theirs over all that they look at. Who
  limits these sums as well (`attacks.gain_limited`) is not found.

  Args:
    kernel: [height, width, channels, neurons].

  Returns:
    [neurons], the largest of the sums of positive weights at one place: the
    most that a neuron rises, before its activation function, by what lies in
    one cell of an input in [0, 1]. Without batch normalisation, that is.

  References:
    Weights alone, by another norm and of whole kernels: Data-free Backdoor
    Removal based on Channel Lipschitzness (Zheng et al., ECCV 2022).
  """
  sums = jnp.maximum(kernel, 0).sum(axis=-2)
  return sums.max(axis=tuple(range(sums.ndim - 1)))


def zero_extremes(
  kernel: Array,
  mean: Array | float,
  std: Array | float,
  delta: Array | float,
) -> Array:
  """Zeroes the weights outside [μ − Δσ, μ + Δσ].

  Guarantees: for fixed μ and σ it is idempotent, and monotone: a smaller Δ
  zeroes a superset. Weights on the boundary stay. With μ = 0 it commutes with
  a change of sign.

  Args:
    kernel: any shape.
    mean: μ, scalar.
    std: σ, scalar.
    delta: Δ, scalar; infinity changes nothing.

  Returns:
    The adjusted kernel, of the same shape and dtype.

  References:
    The paper, Section IV-C and Algorithm 1, "Adjusting Weights".
  """
  # Of an infinite Δ and a σ of zero, infinity wins: no change.
  reach = jnp.where(jnp.isinf(delta), jnp.inf, delta * std)
  inside = (kernel >= mean - reach) & (kernel <= mean + reach)
  return jnp.where(inside, kernel, jnp.zeros_like(kernel))


def delta_steps(start: float, step: float) -> np.ndarray:
  """The thresholds of the search: start, start − ε, ..., down to above 0.

  Args:
    start: the first Δ, positive.
    step: ε, positive.

  Returns:
    float64 [steps], decreasing.

  Raises:
    errors.ConfigError: one is not positive.
  """
  if not (start > 0 and step > 0):
    raise errors.ConfigError(
      f"Δ falls from {start:g} by {step:g}: both must be positive."
    )
  count = int(np.ceil(start / step - 1e-9))
  return np.round(start - step * np.arange(count), 9)


@functools.partial(jax.jit, static_argnums=0)
@execution.exact
def cache_stem(
  model: models.Model, params: models.Params, examples: evaluate.Examples
) -> evaluate.Examples:
  """The examples with the stem's output in place of images.

  Weight adjusting touches the target kernel only, so a whole search needs the
  stem once.

  Args:
    model: the network.
    params: its parameters.
    examples: in batches.

  Returns:
    The same examples; `images` is now [batches, batch, ...].
  """
  hidden = lax.map(lambda images: model.stem(params, images), examples.images)
  return examples.replace(images=hidden)


@functools.partial(jax.jit, static_argnums=0)
@execution.exact
def accuracy_from_stem(
  model: models.Model,
  params: models.Params,
  kernel: Array,
  cached: evaluate.Examples,
) -> Array:
  """Accuracy with another target kernel.

  Args:
    model: the network.
    params: its parameters.
    kernel: the target kernel to use.
    cached: from `cache_stem`.

  Returns:
    float32 scalar.
  """
  params = models.with_target_kernel(model, params, kernel)

  def hits(batch: evaluate.Examples) -> Array:
    active = model.activations(params, batch.images)
    logits = model.head(params, active)
    return evaluate.right(logits, batch.labels, batch.mask)

  return evaluate.share(lax.map(hits, cached).sum(), cached.mask)


@functools.partial(jax.jit, static_argnums=0)
def client_curves(
  model: models.Model,
  params: models.Params,
  mean: Array,
  std: Array,
  deltas: Array,
  federation: federations.Federation,
) -> Array:
  """The accuracies that clients report when the server cannot validate.

  Each client measures the model at every Δ on samples of its own.

  Args:
    model: the network.
    params: the model to adjust.
    mean: μ, scalar.
    std: σ, scalar.
    deltas: float32 [steps].
    federation: all clients.

  Returns:
    float32 [clients, steps].
  """

  def total(common: Any, images: Array, labels: Array, mask: Array) -> Array:
    params, mean, std, deltas = common
    kernel = models.target_kernel(model, params)
    hidden = model.stem(params, images)

    def one_step(delta: Array) -> Array:
      adjusted = models.with_target_kernel(
        model, params, zero_extremes(kernel, mean, std, delta)
      )
      logits = model.head(adjusted, model.activations(adjusted, hidden))
      return evaluate.right(logits, labels, mask).sum()

    return lax.map(one_step, deltas)

  return reports.client_mean(total, (params, mean, std, deltas), federation)
