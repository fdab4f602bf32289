"""Averages finished runs: python launch/summarise.py runs/mnist-*."""

import json
from pathlib import Path
import sys

from fljax import console


def main(folders: list[str]) -> int:
  if not folders:
    print(__doc__, file=sys.stderr)
    return 2
  runs = []
  for folder in folders:
    path = Path(folder) / "results.json"
    try:
      runs.append(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
      print(f"fljax: {path} cannot be read ({error}).", file=sys.stderr)
      return 2
  seeds = ", ".join(str(run["seed"]) for run in runs)
  print(f"seeds {seeds}")
  print(console.summary(runs))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
