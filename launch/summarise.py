"""Averages finished runs: python launch/summarise.py runs/sweep.

Runs that differ in seed and labels alone are averaged; others are compared.
"""

import argparse
from collections.abc import Sequence
import contextlib
import os
from pathlib import Path
import sys

from fljax import errors
from fljax import summary
from fljax import workdir


def found_in(folders: Sequence[str]) -> dict[str, summary.Run]:
  """The runs that folders are, or hold as that of a sweep does, by name.

  Raises:
    errors.WorkdirError: a folder holds no finished run, or a damaged one.
  """
  paths: list[Path] = []
  for folder in map(Path, folders):
    inside = sorted(folder.glob(f"*/{workdir.RESULTS}"))
    if (folder / workdir.RESULTS).exists() or not inside:
      inside = [folder / workdir.RESULTS]
    paths += inside
  # As in "runs/sweep/seed=0": once each, however it was named.
  parents = list(dict.fromkeys(path.parent.absolute() for path in paths))
  common = os.path.commonpath([parent.parent for parent in parents])
  found = {}
  for parent in parents:
    run = workdir.read_results(parent / workdir.RESULTS)
    with contextlib.suppress(errors.WorkdirError):
      # Of results that were copied alone, nobody knows the data.
      run["config"] |= workdir.read_settings(parent)[1]
    found[os.path.relpath(parent, common)] = run
  return found


def main(arguments: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(
    description="Averages over finished runs, and compares them.",
    allow_abbrev=False,
  )
  parser.add_argument(
    "folders",
    nargs="+",
    metavar="FOLDER",
    help="workdir of a finished run, or of a sweep, whose finished runs count",
  )
  parser.add_argument(
    "--csv",
    metavar="FILE",
    help="write a line per run and phase there: settings in which the runs"
    " differ, TA and AA as fractions, seconds",
  )
  options = parser.parse_args(arguments)
  try:
    runs = found_in(options.folders)
    if options.csv:
      Path(options.csv).write_text(summary.as_csv(runs), encoding="utf-8")
  except (errors.WorkdirError, OSError) as error:
    print(f"fljax: {error}", file=sys.stderr)
    return 2
  print(summary.compared(runs))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
