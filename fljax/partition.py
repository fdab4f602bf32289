"""Who gets which training image: labels -> sample indices per client.

Pure functions on NumPy arrays and a generator; they run once, on the host.
Every partition is disjoint between clients, and from the images that the
server holds out for validation. Clients may keep some of their own out of
their training.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
from typing import NamedTuple

import numpy as np

from fljax import errors


class Partition(NamedTuple):
  """Sample indices per client.

  Attributes:
    indices: int32 [clients, samples], into the training images; padding is 0.
    mask: bool [clients, samples], False for padding.
  """

  indices: np.ndarray
  mask: np.ndarray


def hold_out(
  num_samples: int, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Splits the training images into the server's and the clients'.

  Args:
    num_samples: how many training images there are.
    size: how many of them the server keeps for validation.
    rng: source of randomness.

  Returns:
    Indices of the server's validation images [size] and of all others
    [num_samples - size], both sorted.

  Raises:
    errors.ConfigError: nothing would be left for the clients.
  """
  if not 0 <= size < num_samples:
    raise errors.ConfigError(
      f"the server cannot hold out {size} of {num_samples} training images"
      " (--validation_size)."
    )
  order = rng.permutation(num_samples)
  return np.sort(order[:size]), np.sort(order[size:])


def by_labels(
  labels: np.ndarray,
  pool: np.ndarray,
  *,
  num_clients: int,
  samples_per_client: int,
  labels_per_client: int,
  num_classes: int,
  required: Mapping[int, Sequence[int]],
  rng: np.random.Generator,
) -> Partition:
  """Gives each client images of K labels, every client equally many.

  Labels are dealt at random among those dealt least so far, so that all
  labels are covered as evenly as K and the number of clients allow: with
  purely random labels, 10 clients of 3 labels would miss some digit in more
  than a quarter of all draws. Within a client the K labels have equal counts
  (to one image).

  Args:
    labels: int [train], of all training images.
    pool: int [pool], indices that may be given out.
    num_clients: number of clients.
    samples_per_client: n_i, the same for each client.
    labels_per_client: K.
    num_classes: number of labels.
    required: client -> distinct labels that it must hold (an attacker's
      victim label).
    rng: source of randomness.

  Returns:
    The partition; its mask is all True.

  Raises:
    errors.ConfigError: K is out of range, a required label does not exist, or
      one runs out of images.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section V, "Client Data Distribution".
  """
  if not 1 <= labels_per_client <= num_classes:
    raise errors.ConfigError(
      f"--labels_per_client={labels_per_client} must be between 1 and the"
      f" data set's {num_classes} labels."
    )
  if samples_per_client < labels_per_client:
    raise errors.ConfigError(
      f"--samples_per_client={samples_per_client} cannot cover"
      f" {labels_per_client} labels."
    )
  most = max(map(len, required.values()), default=0)
  if most > labels_per_client:
    raise errors.ConfigError(
      f"--labels_per_client={labels_per_client} leaves no room for the {most}"
      " labels that an attacker must hold."
    )
  for label in itertools.chain(*required.values()):
    if not 0 <= label < num_classes:
      raise errors.ConfigError(
        f"a client must hold label {label}; there are 0 to {num_classes - 1}."
      )
  held = deal_labels(
    num_clients=num_clients,
    labels_per_client=labels_per_client,
    num_classes=num_classes,
    required=required,
    rng=rng,
  )
  base, extra = divmod(samples_per_client, labels_per_client)
  stacks = {
    label: list(rng.permutation(pool[labels[pool] == label]))
    for label in range(num_classes)
  }
  indices = np.zeros((num_clients, samples_per_client), np.int32)
  for client, own in enumerate(held):
    taken: list[int] = []
    for position, label in enumerate(own):
      count = base + (position < extra)
      if count > len(stacks[label]):
        raise errors.ConfigError(
          f"--samples_per_client={samples_per_client} is more than exist:"
          f" label {label} has run out of images at client {client} of"
          f" {num_clients}."
        )
      taken += stacks[label][:count]
      del stacks[label][:count]
    indices[client] = taken
  return Partition(indices, np.ones_like(indices, bool))


def deal_labels(
  *,
  num_clients: int,
  labels_per_client: int,
  num_classes: int,
  required: Mapping[int, Sequence[int]],
  rng: np.random.Generator,
) -> list[list[int]]:
  """Chooses the K distinct labels of each client, covering labels evenly.

  Args:
    num_clients: number of clients.
    labels_per_client: K.
    num_classes: number of labels.
    required: client -> distinct labels that it must hold, at most K.
    rng: source of randomness.

  Returns:
    For each client its K labels, required ones first.
  """
  held = [list(required.get(client, ())) for client in range(num_clients)]
  dealt = np.zeros(num_classes, int)
  for own in held:
    dealt[own] += 1
  for own in held:
    while len(own) < labels_per_client:
      free = np.setdiff1d(np.arange(num_classes), own)
      fewest = free[dealt[free] == dealt[free].min()]
      label = int(rng.choice(fewest))
      own.append(label)
      dealt[label] += 1
  return held


def iid(
  pool: np.ndarray,
  *,
  num_clients: int,
  samples_per_client: int,
  rng: np.random.Generator,
) -> Partition:
  """Gives each client a uniformly random, equally large share.

  Args:
    pool: int [pool], indices that may be given out.
    num_clients: number of clients.
    samples_per_client: n_i, the same for each client.
    rng: source of randomness.

  Returns:
    The partition; its mask is all True.

  Raises:
    errors.ConfigError: there are too few images.
  """
  _check_total(len(pool), num_clients, samples_per_client)
  indices = rng.permutation(pool)[: num_clients * samples_per_client]
  indices = indices.reshape(num_clients, samples_per_client).astype(np.int32)
  return Partition(indices, np.ones_like(indices, bool))


def dirichlet(
  labels: np.ndarray,
  pool: np.ndarray,
  *,
  num_clients: int,
  samples_per_client: int,
  alpha: float,
  num_classes: int,
  required: Mapping[int, Sequence[int]],
  rng: np.random.Generator,
) -> Partition:
  """Splits every label over the clients in Dirichlet proportions.

  Clients get different numbers of images, `samples_per_client` on average;
  shorter ones are padded. The draw is repeated until every client holds an
  image and every required label is there.

  Args:
    labels: int [train], of all training images.
    pool: int [pool], indices that may be given out.
    num_clients: number of clients.
    samples_per_client: mean number of images per client.
    alpha: concentration; small values give each client few labels.
    num_classes: number of labels.
    required: client -> labels that it must hold.
    rng: source of randomness.

  Returns:
    The partition, as wide as the largest client.

  Raises:
    errors.ConfigError: there are too few images, or no draw in 1,000 fits.

  References:
    DBA: Distributed Backdoor Attacks against Federated Learning (Xie, Huang,
    Chen, Li), Section 4.1.
  """
  _check_total(len(pool), num_clients, samples_per_client)
  chosen = rng.permutation(pool)[: num_clients * samples_per_client]
  for _ in range(1000):
    shares: list[list[int]] = [[] for _ in range(num_clients)]
    for label in range(num_classes):
      own = chosen[labels[chosen] == label]
      proportions = rng.dirichlet(np.full(num_clients, alpha))
      cuts = np.round(np.cumsum(proportions)[:-1] * len(own)).astype(int)
      for share, part in zip(shares, np.split(own, cuts), strict=True):
        share += part.tolist()
    if all(shares) and all(
      np.isin(needed, labels[shares[client]]).all()
      for client, needed in required.items()
    ):
      break
  else:
    raise errors.ConfigError(
      f"no Dirichlet({alpha}) partition in 1,000 draws gives every client"
      " an image and every attacker one of each label that it must hold: raise"
      " --dirichlet_alpha or --samples_per_client."
    )
  return _padded(shares)


def keep_back(
  partition: Partition,
  labels: np.ndarray,
  share: float,
  rng: np.random.Generator,
) -> tuple[Partition, Partition]:
  """Splits each client's images into those it trains on and those it keeps.

  A client with n images keeps round(share · n) of them, but never all, and of
  every label as large a share as whole images allow.

  Args:
    partition: who has which image.
    labels: int [train], of all training images.
    share: what each client keeps out of its training, in [0, 1).
    rng: source of randomness.

  Returns:
    The partition of what is trained on and that of what is kept, disjoint and
    padded where clients have unequal numbers.
  """
  trained: list[np.ndarray] = []
  kept: list[np.ndarray] = []
  for indices, mask in zip(*partition, strict=True):
    own = rng.permutation(indices[mask])
    own = own[np.argsort(labels[own], kind="stable")]
    count = min(round(share * len(own)), max(len(own) - 1, 0))
    # Evenly spaced along the images sorted by label, from a random start.
    places = np.arange(count) + rng.random()
    chosen = np.zeros(len(own), bool)
    chosen[(places * len(own) / max(count, 1)).astype(int)] = True
    kept.append(own[chosen])
    trained.append(rng.permutation(own[~chosen]))
  return _padded(trained), _padded(kept)


def _padded(shares: Sequence[Sequence[int] | np.ndarray]) -> Partition:
  """The partition that gives each client its share of indices."""
  width = max(len(share) for share in shares)
  indices = np.zeros((len(shares), width), np.int32)
  mask = np.zeros((len(shares), width), bool)
  for client, share in enumerate(shares):
    indices[client, : len(share)] = share
    mask[client, : len(share)] = True
  return Partition(indices, mask)


def _check_total(available: int, num_clients: int, each: int) -> None:
  if num_clients * each > available:
    raise errors.ConfigError(
      f"--samples_per_client={each} is more than exist: {num_clients}"
      f" clients need {num_clients * each} images and {available} are left"
      " after the server's validation images."
    )
