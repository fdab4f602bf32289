"""How the server combines the stacked updates of a cohort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
Params = Any


class AggregatorUpdate(Protocol):
  """Combines a round's updates."""

  def __call__(
    self, updates: Params, weights: Array, state: Any
  ) -> tuple[Params, Any]:
    """Combines updates.

    Args:
      updates: each leaf [cohort, ...], local model minus global model.
      weights: float32 [cohort], each client's number of samples n_i.
      state: the aggregator's own state.

    Returns:
      One update, each leaf [...], and the next state.
    """


class Aggregator(NamedTuple):
  """A pair of pure functions.

  Attributes:
    init: params -> state.
    update: see `AggregatorUpdate`.
  """

  init: Callable[[Params], Any]
  update: AggregatorUpdate


def mean() -> Aggregator:
  """The plain mean: ω + (1/N)·ΣΔω_i, the paper's simplified rule.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section III-A, second equation.
  """

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    del weights
    return jax.tree.map(lambda leaf: leaf.mean(axis=0), updates), state

  return Aggregator(init=lambda params: (), update=update)


def weighted_mean() -> Aggregator:
  """The mean weighted by numbers of samples: Σn_i·Δω_i / Σn_i.

  Clients without any sample have no weight; a cohort without any changes
  nothing.

  References:
    Communication-Efficient Learning of Deep Networks from Decentralized Data
    (McMahan et al.), Algorithm 1; in the paper Section III-A, first equation.
  """

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    shares = weights / jnp.maximum(weights.sum(), 1)
    combined = jax.tree.map(
      lambda leaf: jnp.tensordot(shares.astype(leaf.dtype), leaf, axes=1),
      updates,
    )
    return combined, state

  return Aggregator(init=lambda params: (), update=update)


AGGREGATORS: dict[str, Callable[[], Aggregator]] = {
  "mean": mean,
  "weighted": weighted_mean,
}
