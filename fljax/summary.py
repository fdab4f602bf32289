"""What finished runs say, as text: phases, averages over runs, CSV.

A run is the contents of its results.json (`workdir.read_results`), of which the
settings may be joined by the digests of its data.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
import csv
import io
import statistics
from typing import Any

from fljax import config as configs
from fljax import console as consoles
from fljax import workdir as workdirs

Run = dict[str, Any]

# Runs that differ in nothing else are of one experiment, repeated.
REPEATED = ("seed", "victim_label", "target_label")
_SHOWN_ONLY = ("figures",)
# What runs were made of, where it is known: too long to be shown.
_DIGESTS = (
  configs.TRAINING_CODE,
  configs.CLEANSING_CODE,
  *workdirs.DIGESTS,
)


def table(run: Run) -> str:
  """The phases of a run as the paper's tables show them.

  Returns:
    Several lines; accuracies in percent.
  """
  rows = [["phase", "TA %", "AA %", "seconds", "what was done"]]
  rows += [
    [
      phase["name"],
      consoles.percent(phase["test_accuracy"]),
      consoles.percent(phase["attack_success"]),
      f"{phase['seconds']:.1f}",
      consoles.detail(phase),
    ]
    for phase in run["phases"]
  ]
  return _grid(rows, ragged=True)


def _grid(rows: Sequence[Sequence[str]], *, ragged: bool = False) -> str:
  """Columns side by side under a ruled header, the first to the left.

  So is the last if it is ragged, such as text.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  if ragged:
    widths[-1] = 0
  lines = [
    "  ".join(
      [row[0].ljust(widths[0])]
      + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
    ).rstrip()
    for row in rows
  ]
  lines.insert(1, "-" * max(map(len, lines)))
  return "\n".join(lines)


def _phases(runs: Iterable[Run]) -> list[str]:
  """Names of the phases that any of them has, in order."""
  return list(
    dict.fromkeys(phase["name"] for run in runs for phase in run["phases"])
  )


def _cell(accuracy: float | None, success: float | None) -> str:
  return f"{consoles.percent(accuracy)}/{consoles.percent(success)}"


def _settings(run: Run) -> dict[str, Any]:
  """What a run is too old to have is as by default."""
  return {**configs.Config.defaults(), **run["config"]}


# --- averages ----------------------------------------------------------------


def differing(runs: Sequence[Run]) -> list[str]:
  """Settings in which runs differ, and digests of code and data."""
  settings = [_settings(run) for run in runs]
  names = dict.fromkeys(name for one in settings for name in one)
  return [
    name
    for name in names
    if name not in _SHOWN_ONLY
    and any(one.get(name) != settings[0].get(name) for one in settings)
  ]


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Runs that differ in seed and labels alone, by what else they are.

  Returns:
    For each group its settings that other groups do not share, as in
    "gamma=2 cleanse=fp,aw"; the only one's name is empty. Digests of code and
    data tell groups apart, too, and are numbered.
  """
  names = [name for name in differing(runs) if name not in REPEATED]
  kinds: list[tuple[list[Any], list[Run]]] = []
  for run in runs:
    settings = _settings(run)
    key = [settings.get(name) for name in names]
    for known, members in kinds:
      if known == key:
        members.append(run)
        break
    else:
      kinds.append((key, [run]))
  found: dict[str, list[Run]] = {}
  for key, members in kinds:
    label = plain = " ".join(
      f"{name}={value}"
      for name, value in zip(names, key, strict=True)
      if name not in _DIGESTS
    )
    number = 1
    while label in found:
      number += 1
      label = f"{plain} #{number}".strip()
    found[label] = members
  return found


def _repetition(run: Run) -> tuple[Any, ...]:
  settings = _settings(run)
  return tuple(settings.get(name) for name in REPEATED)


def _of_phase(runs: Sequence[Run], name: str) -> list[dict[str, Any]]:
  return [p for run in runs for p in run["phases"] if p["name"] == name]


def _values(phases: Sequence[dict[str, Any]], key: str) -> list[float]:
  return [phase[key] for phase in phases if phase[key] is not None]


def _deviation(values: Sequence[float]) -> float:
  return statistics.stdev(values) if len(values) > 1 else 0.0


def summary(runs: Sequence[Run]) -> str:
  """Phases averaged over runs, for example over seeds.

  Returns:
    Several lines: per phase the mean over the runs that have it, and the
    sample standard deviation over them, in percent.
  """
  lines = [f"{'phase':10}{'runs':>5}{'TA %':>15}{'AA %':>16}{'seconds':>10}"]
  for name in _phases(runs):
    found = _of_phase(runs, name)
    cells = []
    for key in ("test_accuracy", "attack_success"):
      values = _values(found, key)
      cells.append(
        f"{100 * statistics.fmean(values):.2f} ± {100 * _deviation(values):.2f}"
        if values
        else "-"
      )
    seconds = statistics.fmean(phase["seconds"] for phase in found)
    lines.append(
      f"{name:10}{len(found):>5}{cells[0]:>15}{cells[1]:>16}{seconds:>10.1f}"
    )
  return "\n".join(lines)


def averages(runs: Sequence[Run]) -> str:
  """Means over seeds and labels, of each group (`groups`) one line.

  Returns:
    Several lines, TA/AA in percent; of a single group those of `summary`.
    Groups are compared by the seeds and labels that all of them have; where
    there are none, each by its own, which the heading says.
  """
  found = groups(runs)
  if len(found) == 1:
    return summary(runs)
  phases = _phases(runs)
  heading = "TA/AA %, on average"
  each = [{_repetition(run) for run in members} for members in found.values()]
  common = set.intersection(*each)
  if common:
    found = {
      label: [run for run in members if _repetition(run) in common]
      for label, members in found.items()
    }
  if any(one != common for one in each):
    heading += (
      " over what all have" if common else " over different seeds or labels"
    )
  rows = [[heading, "runs", *phases]]
  for label, members in found.items():
    row = [label, str(len(members))]
    for name in phases:
      of_phase = _of_phase(members, name)
      means = [
        statistics.fmean(values) if values else None
        for values in (
          _values(of_phase, "test_accuracy"),
          _values(of_phase, "attack_success"),
        )
      ]
      row.append(_cell(*means) if of_phase else "")
    rows.append(row)
  return _grid(rows)


def compared(runs: dict[str, Run]) -> str:
  """Every run's phases, and averages over those that differ in seed and labels.

  Args:
    runs: by the experiment's name, as in a sweep.

  Returns:
    Several lines; TA/AA in percent. Without averages where there is but one
    run of each group.
  """
  phases = _phases(runs.values())
  rows = [["TA/AA %", *phases]]
  for experiment, run in runs.items():
    cells = {
      phase["name"]: _cell(phase["test_accuracy"], phase["attack_success"])
      for phase in run["phases"]
    }
    rows.append([experiment, *(cells.get(name, "") for name in phases)])
  every = list(runs.values())
  if len(groups(every)) == len(every):
    return _grid(rows)
  return "\n".join([_grid(rows), "", averages(every)])


# --- for other programs ------------------------------------------------------


def as_csv(runs: dict[str, Run]) -> str:
  """One line per run and phase, with a header.

  Args:
    runs: by name.

  Returns:
    Columns: run, seed, victim_label, target_label, the other settings in which
    they differ, phase, and TA, AA (fractions) and seconds of that.
  """
  every = list(runs.values())
  names = [name for name in differing(every) if name not in REPEATED]
  file = io.StringIO()
  measured = ("test_accuracy", "attack_success", "seconds")
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(["run", *REPEATED, *names, "phase", *measured])
  for name, run in runs.items():
    settings = _settings(run)
    for phase in run["phases"]:
      writer.writerow(
        [
          name,
          *(settings.get(setting) for setting in (*REPEATED, *names)),
          phase["name"],
          *(phase[key] for key in measured),
        ]
      )
  return file.getvalue()
