"""A population larger than device memory: cohorts are streamed from the host.

The images stay where the data set has them, memory-mapped files where those are
not compressed; cohorts are gathered from there (`rounds.make_streamed_block`).
"""

from __future__ import annotations

from collections.abc import Callable
import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fljax import data
from fljax import federation as federations
from fljax import parallel
from fljax import partition as partitions
from fljax import triggers

Array = jax.Array


class Population:
  """All clients, on the host.

  Attributes:
    clients: everything about them but their images, which are of size zero.
    mesh: the devices that cohorts are spread over; None for a single one.
    chunk: clients that are on the device at once when all are asked.
  """

  def __init__(
    self,
    images: np.ndarray,
    labels: np.ndarray,
    partition: partitions.Partition,
    *,
    poison: Callable[[federations.Federation], federations.Federation],
    num_attackers: int = 0,
    pieces: list[triggers.Trigger] | None = None,
    attack_start: int = 0,
    attack_rounds: int = 0,
    mesh: parallel.Mesh | None = None,
    chunk: int = 100,
  ):
    """Notes who has which images; see `federation.create`.

    Args:
      images: uint8 [train, height, width, channels]; kept, not copied.
      labels: int32 [train].
      partition: who gets which image.
      poison: applied to the attackers alone, who are the first clients; it
        must treat each of them by itself.
      num_attackers: how many clients are malicious.
      pieces: triggers of the attackers.
      attack_start: the first round in which they attack.
      attack_rounds: for how many rounds they do; 0 for good.
      mesh: see above.
      chunk: see above.

    Raises:
      errors.DataError, errors.ConfigError: see `federation.create`.
    """
    self._images, self._indices = images, partition.indices
    self.mesh, self.chunk = mesh, chunk
    # Below, those of size zero stand for the images.
    data.require_usable(images, labels)
    # Of the images' shape, which those of size zero below do not have.
    pieces = pieces or [triggers.from_pixels([], images.shape[1:])]
    create = functools.partial(
      federations.create,
      num_attackers=num_attackers,
      pieces=pieces,
      attack_start=attack_start,
      attack_rounds=attack_rounds,
    )
    nothing = np.empty((len(images), 0, 0, 0), np.uint8)
    clients = create(nothing, labels, partition)
    self.clients: federations.Federation = jax.tree.map(np.array, clients)
    samples = partition.indices.shape[1]
    self._attackers_images = np.empty((0, samples, *images.shape[1:]), np.uint8)
    if num_attackers:
      own = partitions.Partition(
        partition.indices[:num_attackers], partition.mask[:num_attackers]
      )
      poisoned = jax.tree.map(np.asarray, poison(create(images, labels, own)))
      self._attackers_images = poisoned.images

      def overlay(all_rows: np.ndarray, rows: np.ndarray) -> np.ndarray:
        all_rows[:num_attackers] = rows
        return all_rows

      self.clients = jax.tree.map(
        overlay,
        self.clients,
        poisoned.replace(images=self.clients.images[:num_attackers]),
      )

  @property
  def num_clients(self) -> int:
    """How many there are."""
    return self.clients.num_clients

  def with_clients(self, clients: federations.Federation) -> Population:
    """The same images, but everything else as given."""
    other = copy.copy(self)
    other.clients = clients
    return other

  def cohort(self, chosen: np.ndarray) -> federations.Federation:
    """The clients at the given positions, on the device or the mesh.

    Args:
      chosen: int [cohort].

    Returns:
      The cohort; the transfer may still be under way.
    """
    chosen = np.asarray(chosen)
    images = self._images[self._indices[chosen]]
    attacks = np.flatnonzero(chosen < len(self._attackers_images))
    images[attacks] = self._attackers_images[chosen[attacks]]
    cohort = jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], self.clients)
    cohort = cohort.replace(images=images)
    if self.mesh is not None:
      return parallel.place(cohort, self.mesh)
    return jax.device_put(cohort)


def for_fine_tuning(
  clients: federations.Federation | Population,
  *,
  gamma: float,
  rate: float = 1.0,
) -> Any:
  """The same clients with another amplification and other local steps.

  Attackers attack in all of fine-tuning, whenever they do so in training.

  Args:
    clients: all of them.
    gamma: γ by which attackers amplify their updates.
    rate: what everybody's local steps are multiplied by, beside what they
      are already.

  Returns:
    The clients.
  """
  if isinstance(clients, Population):
    return clients.with_clients(
      for_fine_tuning(clients.clients, gamma=gamma, rate=rate)
    )
  scale = jnp.where(clients.attacker, jnp.float32(gamma), clients.scale)
  return clients.replace(
    scale=scale,
    rate=jnp.float32(rate) * clients.rate,
    attack_start=jnp.zeros_like(clients.attack_start),
    attack_end=jnp.full_like(clients.attack_end, federations.NEVER),
  )


def ask_clients(
  question: Callable[[federations.Federation], Any],
  clients: federations.Federation | Population,
) -> Any:
  """What every client answers, whether all fit on the device or not.

  Args:
    question: a function of a federation; each leaf of its answers is
      [clients, ...], and no client's answer depends on the others.
    clients: all of them.

  Returns:
    The answers, [clients, ...].
  """
  if isinstance(clients, federations.Federation):
    return question(clients)
  count = clients.num_clients
  size = min(clients.chunk, count)
  answers = []
  for start in range(0, count, size):
    # Always as many, so that one program answers; the surplus is dropped.
    chosen = np.minimum(np.arange(start, start + size), count - 1)
    answer = jax.tree.map(np.asarray, question(clients.cohort(chosen)))
    answers.append(jax.tree.map(lambda leaf, k=count - start: leaf[:k], answer))
  return jax.tree.map(
    lambda *leaves: jnp.asarray(np.concatenate(leaves)), *answers
  )
