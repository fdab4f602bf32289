"""Results of tables and figures as JSON, written and read again."""

from __future__ import annotations

from collections.abc import Iterable
import json
from typing import Any

from fljax import errors
from fljax import workdir as workdirs
from fljax.config import Config
from fljax.reproduction.plan import Record

# Said once for all cells that agree on it.
_PARTS = ("environment", "config")


def dump(
  title: str,
  command: str,
  records: dict[tuple[str, str, int], Record],
  statements: Iterable[tuple[str, str, str]],
) -> bytes:
  """What every experiment's phases say, without its curves.

  Args:
    title: of the table or figure.
    command: what makes it again.
    records: the experiments by row (or curve), variant and seed.
    statements: (statement, verdict, numbers).

  Returns:
    A JSON file.
  """
  cells = [
    {
      "cell": label,
      "variant": variant,
      "seed": seed,
      "environment": record.results["environment"],
      "config": record.results["config"],
      "phases": _shown(record.results),
    }
    for (label, variant, seed), record in records.items()
  ]
  shared: dict[str, Any] = {}
  for part in _PARTS:
    first = cells[0][part] if cells else {}
    shared[part] = {
      key: value
      for key, value in first.items()
      if all(key in cell[part] and cell[part][key] == value for cell in cells)
    }
    for cell in cells:
      cell[part] = {
        key: value
        for key, value in cell[part].items()
        if key not in shared[part]
      }
  whole = {
    "title": title,
    "command": command,
    "shared": shared,
    "statements": [
      {"statement": text, "verdict": verdict, "numbers": numbers}
      for text, verdict, numbers in statements
    ],
    "cells": cells,
  }
  return (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode()


def _shown(results: dict[str, Any]) -> list[dict[str, Any]]:
  """The phases, without paths, nor twice what a run ran on."""
  shown = []
  for phase in results["phases"]:
    own = {
      key: value for key, value in phase.items() if key != workdirs.TAKEN_FROM
    }
    if own.get("environment") == results["environment"]:
      del own["environment"]
    shown.append(own)
  return shown


def load(content: bytes) -> list[dict[str, Any]]:
  """The experiments of a file that `dump` made.

  Args:
    content: of a JSON file.

  Returns:
    For each what its results.json says: config, environment and phases.

  Raises:
    errors.WorkdirError: it is damaged, or something else.
  """
  try:
    whole = json.loads(content)
    cells = [
      {
        "environment": {
          **whole["shared"]["environment"],
          **cell["environment"],
        },
        # Settings that came later were at their default.
        "config": {
          **Config.defaults(),
          **whole["shared"]["config"],
          **cell["config"],
        },
        "phases": [{**phase} for phase in cell["phases"]],
      }
      for cell in whole["cells"]
    ]
    for cell in cells:
      if not cell["phases"] or not all(map(workdirs.is_phase, cell["phases"])):
        raise ValueError("an experiment without a phase, or a broken one")
  except (ValueError, KeyError, TypeError) as error:
    raise errors.WorkdirError(
      f"it is damaged, or not what reproduce.py writes ({error!r})."
    ) from error
  return cells
