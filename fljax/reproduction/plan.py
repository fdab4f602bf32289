"""What a table or figure of results is made of.

Everything is data: rows of configs, columns that say which number of which
phase is shown, and statements as functions of the columns. Which there are is
said by `catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

import numpy as np

from fljax.config import Config
from fljax.reproduction import paper

Bases = dict[str, Config]
TA, AA = "test_accuracy", "attack_success"


class Record(NamedTuple):
  """What a finished run left.

  Attributes:
    results: the contents of results.json.
    lines: those of metrics.jsonl.
  """

  results: dict[str, Any]
  lines: list[dict[str, Any]]

  def phase(self, name: str) -> dict[str, Any]:
    """A phase of results.json; KeyError if the run has none of that name."""
    for phase in self.results["phases"]:
      if phase["name"] == name:
        return phase
    raise KeyError(name)

  def curve(self, name: str) -> list[dict[str, Any]]:
    """The lines of a phase."""
    return [line for line in self.lines if line["phase"] == name]


class Cell(NamedTuple):
  """One experiment, of whatever seed.

  Attributes:
    config: its settings; seed and workdir are filled in when it is run.
    after: another one that must be known first.
    adapt: from the settings and that one's record, those that are run.
  """

  config: Config
  after: Cell | None = None
  adapt: Callable[[Config, Record], Config] | None = None


class Column(NamedTuple):
  """A column of a table.

  Attributes:
    group: the heading above, such as "All".
    name: "TA", "AA" or "N".
    variant: which of the row's experiments; the mean is shown where there are
      several, named "variant/case".
    phase: of that experiment.
    key: of that phase.
    percent: whether the value is a fraction, shown in percent.
  """

  group: str
  name: str
  variant: str
  phase: str
  key: str
  percent: bool = True


def variants_of(row: Row, column: Column) -> list[str]:
  """The experiments of a row that a column's value is the mean of."""
  return [
    name
    for name in row.cells
    if name == column.variant or name.startswith(f"{column.variant}/")
  ]


def cases_of(row: Row, known: Callable[[str], bool]) -> list[str]:
  """The cases that a row's means are over: those that all variants know.

  Otherwise columns would compare different cases.

  Args:
    row: of a table.
    known: by experiment, whether it has a result.

  Returns:
    What follows the slash in the names of experiments, in their order.
  """
  by_case: dict[str, list[str]] = {}
  for name in row.cells:
    _, slash, case = name.partition("/")
    if slash:
      by_case.setdefault(case, []).append(name)
  return [case for case, names in by_case.items() if all(map(known, names))]


class Row(NamedTuple):
  """A row of a table.

  Attributes:
    label: its first cell.
    cells: its experiments by variant.
    paper: the published number of each column, where there is one.
  """

  label: str
  cells: dict[str, Cell]
  paper: tuple[float | None, ...]


# Of a table: float [rows, seeds, columns] in the table's units, NaN where
# there is no result; of a figure: records by (line, seed).
Statement = tuple[str, Callable[[Any], tuple[str, str]]]


class Table(NamedTuple):
  """A table, or a part of the discussion in the form of one.

  Attributes:
    name: of its files.
    title: as in the paper.
    note: what a reader has to know about ours.
    columns: what is shown.
    rows: what is run.
    statements: the paper's, each with a function of the values that says
      "seen", "seen partly" or "not seen", and the numbers.
    averaged: whether its rows are like things, of which a mean says something.
  """

  name: str
  title: str
  note: str
  columns: tuple[Column, ...]
  rows: tuple[Row, ...]
  statements: tuple[Statement, ...] = ()
  averaged: bool = True


class Figure(NamedTuple):
  """A figure: experiments by label, drawn by `render`.

  Attributes:
    name: of its files.
    title: as in the paper.
    note: what a reader has to know about ours.
    kind: which drawing of `render`.
    cells: experiments by the label of their curve or panel.
    statements: see `Table`; functions of the records by label.
  """

  name: str
  title: str
  note: str
  kind: str
  cells: dict[str, Cell]
  statements: tuple[Statement, ...] = ()


def only(
  artefact: Table | Figure, wanted: Callable[[Config], bool]
) -> Table | Figure | None:
  """What is left of a table or figure with some experiments alone.

  Args:
    artefact: what it is.
    wanted: whether an experiment of these settings is kept.

  Returns:
    The rows, or curves, and experiments that are kept; None if there are none.
    Figures that show triggers, which no experiment stands behind, are whole.
  """

  def kept(cells: dict[str, Cell]) -> dict[str, Cell]:
    return {label: cell for label, cell in cells.items() if wanted(cell.config)}

  if isinstance(artefact, Table):
    rows = [row._replace(cells=kept(row.cells)) for row in artefact.rows]
    rows = [row for row in rows if row.cells]
    return artefact._replace(rows=tuple(rows)) if rows else None
  if artefact.kind == "triggers":
    return artefact
  cells = kept(artefact.cells)
  return artefact._replace(cells=cells) if cells else None


# --- pieces ------------------------------------------------------------------


def changed(config: Config, **changes: Any) -> Config:
  """The settings with some of them changed."""
  return dataclasses.replace(config, **changes)


def of_pair(config: Config, pair: paper.Pair) -> Config:
  """The settings with this victim and attack label."""
  return changed(config, victim_label=pair[0], target_label=pair[1])


def arrow(pair: paper.Pair, names: tuple[str, ...] | None = None) -> str:
  """How a pair is written; by the names of labels, if there are some."""
  victim, target = (names[i] if names else str(i) for i in pair)
  return f"{victim} → {target}"


def accuracies(
  *groups: tuple[str, str], variant: str = "main"
) -> tuple[Column, ...]:
  """TA and AA of phases: (heading, phase), ..."""
  return tuple(
    Column(group, name, variant, phase, key)
    for group, phase in groups
    for name, key in (("TA", TA), ("AA", AA))
  )


def rows_of_pairs(
  base: Config,
  published: Mapping[paper.Pair, tuple[float, ...]],
  cells: Callable[[Config], dict[str, Cell]],
  columns: Sequence[Column],
  names: tuple[str, ...] | None = None,
) -> tuple[Row, ...]:
  """A row per pair, where the paper has but training and its whole process.

  Args:
    base: the settings, with any pair.
    published: the paper's numbers, which begin with TA and AA of training and
      end with those of its process.
    cells: settings with a pair -> the experiments of a row.
    columns: of the table; the first four are training and the process.
    names: of labels, see `arrow`.

  Returns:
    The rows.
  """
  unknown = (None,) * (len(columns) - 4)
  return tuple(
    Row(
      arrow(pair, names),
      cells(of_pair(base, pair)),
      (*numbers[:2], *numbers[-2:], *unknown),
    )
    for pair, numbers in published.items()
  )


TRAINING, FP = ("Training", "training"), ("FP", "fp")
FP_AW, ALL = ("FP+AW", "fp+aw"), ("All", "all")


def places(columns: Sequence[Column]) -> dict[tuple[str, str], int]:
  """Where columns stand, by heading and name."""
  return {(column.group, column.name): i for i, column in enumerate(columns)}


def mean(values: np.ndarray, column: int) -> float:
  """Over what is known; ValueError if nothing is, of which none can speak."""
  known = values[..., column]
  if np.isnan(known).all():
    raise ValueError("No result yet.")
  return float(np.nanmean(known))


def ends(
  values: np.ndarray,
  columns: Sequence[Column],
  ways: Iterable[tuple[str, str]],
) -> tuple[dict[str, tuple[float, float]], str]:
  """What ways of cleansing end with on average.

  Args:
    values: [rows, columns].
    columns: of the table.
    ways: (heading, phase), ..., whose TA and AA are among the columns.

  Returns:
    TA and AA by heading, and the same in words.
  """
  place = places(columns)
  found = {
    way: (mean(values, place[way, "TA"]), mean(values, place[way, "AA"]))
    for way, _ in ways
  }
  return found, ", ".join(
    f"{way} {ta:.1f}/{aa:.1f}" for way, (ta, aa) in found.items()
  )


def verdict(*conditions: bool) -> str:
  """What a statement that is made of these comes to; ValueError of none."""
  if not conditions:
    raise ValueError("No result yet.")
  if all(conditions):
    return "seen"
  return "seen partly" if any(conditions) else "not seen"


def leaves_little(
  columns: Sequence[Column], way: str, labels: Mapping[int, str]
) -> Callable[[np.ndarray], tuple[str, str]]:
  """Whether a way of cleansing leaves less than 10% in all of these rows.

  Args:
    columns: the table's.
    way: what its columns are headed by.
    labels: the rows meant, by their position, and what to call them.

  Returns:
    What judges a statement, see `Table`.
  """
  column = places(columns)[way, "AA"]

  def judged(values: np.ndarray) -> tuple[str, str]:
    left = {label: mean(values[row], column) for row, label in labels.items()}
    return (
      verdict(*(success < 10 for success in left.values())),
      "AA: " + ", ".join(f"{k} {x:.1f}" for k, x in left.items()),
    )

  return judged


def count_below(
  values: np.ndarray, column: int, below: float
) -> tuple[int, int]:
  """How many known values are below a bound, and how many there are."""
  known = values[..., column].ravel()
  known = known[~np.isnan(known)]
  return int((known < below).sum()), len(known)


JPEG = "CIFAR-10 (JPEG) where the data set is a JPEG copy."
