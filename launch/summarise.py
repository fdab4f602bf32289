"""Averages finished runs: python launch/summarise.py runs/mnist-*."""

from pathlib import Path
import sys

from fljax import console
from fljax import errors
from fljax import workdir


def main(folders: list[str]) -> int:
  if not folders:
    print(__doc__, file=sys.stderr)
    return 2
  runs = []
  for folder in folders:
    try:
      runs.append(workdir.read_results(Path(folder) / workdir.RESULTS))
    except errors.WorkdirError as error:
      print(f"fljax: {error}", file=sys.stderr)
      if any(Path(folder).glob(f"*/{workdir.RESULTS}")):
        print(f"fljax: a sweep's runs are {folder}/*", file=sys.stderr)
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
