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
  """Pure functions.

  Attributes:
    init: params -> state.
    update: see `AggregatorUpdate`.
    shares: weights [cohort] -> shares [cohort], if the rule is a sum
      Σ share_i·Δω_i without a state. Such a sum is formed while clients train
      and the stacked updates are never held. None: `update` needs them all.
  """

  init: Callable[[Params], Any]
  update: AggregatorUpdate
  shares: Callable[[Array], Array] | None = None


def linear(shares: Callable[[Array], Array]) -> Aggregator:
  """The rule Σ share_i·Δω_i.

  Args:
    shares: weights [cohort] -> shares [cohort].

  Returns:
    The aggregator.
  """

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    return weighted_sum(updates, shares(weights)), state

  return Aggregator(init=lambda params: (), update=update, shares=shares)


def weighted_sum(updates: Params, shares: Array) -> Params:
  """Σ share_i·Δω_i over the leading axis of every leaf."""
  return jax.tree.map(
    lambda leaf: jnp.tensordot(
      # Or accelerators would round the updates.
      shares.astype(leaf.dtype),
      leaf,
      axes=1,
      precision="highest",
    ),
    updates,
  )


def mean() -> Aggregator:
  """The plain mean: ω + (1/N)·ΣΔω_i, the paper's simplified rule.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section III-A, second equation.
  """
  return linear(lambda weights: jnp.full_like(weights, 1 / len(weights)))


def weighted_mean() -> Aggregator:
  """The mean weighted by numbers of samples: Σn_i·Δω_i / Σn_i.

  Clients without any sample have no weight; a cohort without any changes
  nothing.

  References:
    Communication-Efficient Learning of Deep Networks from Decentralized Data
    (McMahan et al.), Algorithm 1; in the paper Section III-A, first equation.
  """
  return linear(lambda weights: weights / jnp.maximum(weights.sum(), 1))


AGGREGATORS: dict[str, Callable[[], Aggregator]] = {
  "mean": mean,
  "weighted": weighted_mean,
}
