"""What each client measures on its own data.

Clients keep their data; the server sees the ranks, votes or accuracies that
are made of these means.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from fljax import evaluate
from fljax import execution
from fljax import federation as federations
from fljax import models
from fljax import parallel
from fljax import triggers

Array = jax.Array


@execution.exact
def client_mean(
  total: Callable[[Any, Array, Array, Array], Array],
  common: Any,
  federation: federations.Federation,
  *,
  batch_size: int = 100,
) -> Array:
  """Averages something over every client's samples.

  Args:
    total: (common, images [batch, height, width, channels], labels [batch],
      mask [batch]) -> the sum of it over the samples that count, any shape.
    common: the same for all clients, such as the model's parameters.
    federation: all clients, with what they train on or what they keep out of
      it. An attacker's training samples include its backdoored ones, stamped.
    batch_size: samples per step.

  Returns:
    float32 [clients, ...]; NaN for a client without samples, which has nothing
    to say.
  """
  samples = federation.mask.shape[1]
  batch_size = min(batch_size, samples)
  starts = jnp.arange(0, samples, batch_size)

  def one_client(common: Any, client: federations.Federation) -> Array:
    def one_batch(start: Array) -> Array:
      indices = start + jnp.arange(batch_size)
      inside = indices < samples
      indices = jnp.minimum(indices, samples - 1)
      images = client.images[indices]
      poisoned = client.poisoned[indices].reshape(-1, 1, 1, 1)
      stamped = triggers.stamp(images, client.trigger)
      images = jnp.where(poisoned, stamped, images)
      counts = inside & client.mask[indices]
      return total(common, images, client.labels[indices], counts)

    sums = lax.map(one_batch, starts).sum(axis=0).astype(jnp.float32)
    count = client.mask.sum().astype(jnp.float32)
    return jnp.where(count > 0, sums / jnp.maximum(count, 1), jnp.nan)

  means = parallel.map_clients(one_client, common, federation)
  return parallel.everywhere(means, federation.mesh)


@functools.partial(jax.jit, static_argnums=0)
def client_activations(
  model: models.Model,
  params: models.Params,
  federation: federations.Federation,
) -> Array:
  """Each client's mean activation of every neuron.

  a_i = (1/n)·Σ_j a_{i,j} over the client's n training samples, and over the
  channel's positions, after the ReLU.

  Args:
    model: the network.
    params: the global model.
    federation: all clients.

  Returns:
    float32 [clients, neurons]; NaN for a client without samples.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section IV-A, equation of a_i.
  """

  def total(
    params: models.Params, images: Array, labels: Array, mask: Array
  ) -> Array:
    del labels
    return models.summed_activations(model, params, images, mask)

  return client_mean(total, params, federation)


@functools.partial(jax.jit, static_argnums=0)
def client_accuracies(
  model: models.Model,
  params: models.Params,
  federation: federations.Federation,
) -> Array:
  """The accuracy that each client has with a model.

  Args:
    model: the network.
    params: the global model.
    federation: all clients, with the samples that they measure on.

  Returns:
    float32 [clients]; NaN for a client without samples.
  """

  def total(
    params: models.Params, images: Array, labels: Array, mask: Array
  ) -> Array:
    return evaluate.right(
      models.apply(model, params, images), labels, mask
    ).sum()

  return client_mean(total, params, federation)
