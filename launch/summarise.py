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
      runs[-1]["seed"], dict(runs[-1]["config"])
      for phase in runs[-1]["phases"]:
        phase["name"], phase["test_accuracy"], phase["seconds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
      print(f"fljax: {path} cannot be read ({error!r}).", file=sys.stderr)
      return 2
  ignored = ("seed", "figures")
  settings = [
    {key: value for key, value in run["config"].items() if key not in ignored}
    for run in runs
  ]
  if any(setting != settings[0] for setting in settings):
    print("these runs differ in more than their seed:", file=sys.stderr)
    for key in sorted({key for setting in settings for key in setting}):
      values = {str(setting.get(key)) for setting in settings}
      if len(values) > 1:
        print(f"  {key}: {', '.join(sorted(values))}", file=sys.stderr)
  seeds = ", ".join(str(run["seed"]) for run in runs)
  print(f"seeds {seeds}")
  print(console.summary(runs))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
