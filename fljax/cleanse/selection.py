"""How far to go: rules that choose a step from accuracies alone.

Algorithm 1 tests the accuracy after a step is made; here the step that falls
below the floor is undone, in pruning and in weight adjusting alike.
"""

from __future__ import annotations

import numpy as np

# Accuracies are float32 shares of counted hits: less than one hit, more than
# their rounding.
TOLERANCE = 1e-6


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
  # NaN compares false, and so is no acceptable accuracy.
  failing = np.flatnonzero(~(accuracies[1:] >= floor - TOLERANCE))
  return int(failing[0]) if failing.size else len(accuracies) - 1


def trimmed_mean(reports: np.ndarray, share: float) -> np.ndarray:
  """Combines what clients report, without the most extreme reports.

  At each step the `ceil(share · clients)` highest and as many lowest reports
  are left out (fewer, if none would remain). As long as liars are no more
  than the reports left out on a side, every step's result lies between two
  honest reports.

  Args:
    reports: [clients, steps].
    share: of the clients, on each side, in [0, 0.5).

  Returns:
    [steps].
  """
  reports = np.sort(np.asarray(reports, np.float64), axis=0)
  clients = len(reports)
  out = min(int(np.ceil(share * clients)), (clients - 1) // 2)
  return reports[out : clients - out].mean(axis=0)
