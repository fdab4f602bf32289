"""How far to go: rules that choose a step from accuracies or scores alone.

Algorithm 1 tests the accuracy after a step is made; here the step that falls
below the floor is undone, in pruning and in weight adjusting alike.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fljax import aggregators
from fljax import errors

# Accuracies are float32 shares of counted hits: less than one hit, more than
# their rounding.
TOLERANCE = 1e-6
# Makes the median of distances a normal distribution's standard deviation.
_CONSISTENCY = 1.4826


def last_above(accuracies: np.ndarray, floor: float) -> int:
  """The last step before the first that falls below the floor.

  Args:
    accuracies: [steps]; step 0 changes nothing and is always allowed.
    floor: the least acceptable accuracy; reaching it exactly is acceptable.

  Returns:
    Index of the step to keep, 0 if the first one is already too much. A
    later recovery does not count: the search has stopped.
  """
  accuracies = np.asarray(accuracies)
  return _before_the_first_failing(accuracies[1:] >= floor - TOLERANCE)


def last_gentle(accuracies: np.ndarray, drop: float) -> int:
  """The last step before the first that by itself costs more than a drop.

  Args:
    accuracies: [steps]; step 0 changes nothing and is always allowed.
    drop: what a single step may cost; costing exactly that is acceptable.

  Returns:
    Index of the step to keep. However far the accuracy has come down until
    then is not limited.

  References:
    The paper, Section V-C: pruning stops "when the test accuracy drops more
    than 1% after pruning the next neuron".
  """
  accuracies = np.asarray(accuracies)
  fall = accuracies[:-1] - accuracies[1:]
  return _before_the_first_failing(fall <= drop + TOLERANCE)


def _before_the_first_failing(acceptable: np.ndarray) -> int:
  """Of [steps - 1], without step 0; of NaN every comparison is false."""
  failing = np.flatnonzero(~acceptable)
  return int(failing[0]) if failing.size else len(acceptable)


def pruning_count(
  accuracies: np.ndarray, max_drop: float, drop_of: str = "total"
) -> int:
  """How many neurons to prune.

  Args:
    accuracies: [neurons + 1], after pruning none, the first, the first two...
    max_drop: what accuracy may fall by.
    drop_of: since when. "total": since pruning began. "neuron": since the
      neuron before, the paper's words, which bound a step and not the sum.

  Returns:
    The number of neurons; that which falls too far is not among them.

  Raises:
    errors.ConfigError: drop_of is neither.
  """
  errors.require_choice("drop_of", drop_of, DROPS)
  return DROPS[drop_of](accuracies, max_drop)


DROPS = {
  "total": lambda accuracies, drop: last_above(
    accuracies, accuracies[0] - drop
  ),
  "neuron": last_gentle,
}


def answered(reports: Any) -> Any:
  """The reports of clients that have something to say.

  Args:
    reports: [clients, ...]. A client without samples has nothing but NaN to
      report, and one that sends what is not finite is not listened to.

  Returns:
    Those that are finite in all places.

  Raises:
    errors.ConfigError: there are none.
  """
  finite = np.isfinite(reports).reshape(len(reports), -1).all(axis=1)
  if not finite.any():
    raise errors.ConfigError("no client has a sample to report on.")
  return reports[np.flatnonzero(finite)]


def trimmed_mean(reports: np.ndarray, share: float) -> np.ndarray:
  """Combines what clients report, without the most extreme reports.

  At each step the `aggregators.left_out` highest and as many lowest reports
  are left out. As long as liars are no more than the reports left out on a
  side, every step's result lies between two honest reports.

  Args:
    reports: [clients, steps]; see `answered`.
    share: of the clients, on each side, in [0, 0.5).

  Returns:
    [steps].

  Raises:
    errors.ConfigError: no client has answered.
  """
  reports = np.sort(answered(np.asarray(reports, np.float64)), axis=0)
  clients = len(reports)
  out = aggregators.left_out(clients, share)
  return reports[out : clients - out].mean(axis=0)


def anomaly_index(values: jax.Array | np.ndarray) -> jax.Array:
  """How far each value lies from the median, in robust deviations.

  |value − median| / (1.4826 · MAD), MAD the median of |value − median|. It is
  invariant under scaling and shifting of all values; an index above 2 is an
  outlier by the usual bound.

  | values   | index                                   |
  | -------- | --------------------------------------- |
  | MAD is 0 | 0 at the median, infinity anywhere else |
  | NaN      | NaN, and left out of medians            |

  Args:
    values: [values].

  Returns:
    float32 [values].

  References:
    Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
    Networks (Wang et al., 2019), Section IV, "Detect Backdoor via Outlier
    Detection".
  """
  values = jnp.asarray(values, jnp.float32)
  away = jnp.abs(values - jnp.nanmedian(values))
  scale = _CONSISTENCY * jnp.nanmedian(away)
  beyond = jnp.where(away > 0, jnp.inf, away)  # NaN stays NaN.
  return jnp.where(scale > 0, away / jnp.where(scale > 0, scale, 1), beyond)
