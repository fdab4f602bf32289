"""Results of tables and figures as JSON, written and read again."""

from __future__ import annotations

from collections.abc import Iterable
import json
from typing import Any

from fljax import errors
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
      "phases": record.results["phases"],
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
    if not all(cell["phases"] for cell in cells):
      raise ValueError("an experiment without a phase")
  except (ValueError, KeyError, TypeError) as error:
    raise errors.WorkdirError(
      f"it is damaged, or not what reproduce.py writes ({error!r})."
    ) from error
  return cells
