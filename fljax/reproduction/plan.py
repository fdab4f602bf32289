"""Which experiments stand behind each table and figure of the paper.

Everything here is data: rows of configs, columns that say which number of
which phase is shown, and the paper's statements as functions of the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

import numpy as np

from fljax.config import BASELINES
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
  """

  name: str
  title: str
  note: str
  columns: tuple[Column, ...]
  rows: tuple[Row, ...]
  statements: tuple[Statement, ...] = ()


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
  artefact: Table | Figure, pairs: Sequence[paper.Pair]
) -> Table | Figure | None:
  """What is left of a table or figure with these pairs alone.

  Args:
    artefact: what it is.
    pairs: victim label and attack label of the experiments that are kept.

  Returns:
    The rows, or curves, and experiments of those pairs; None if there are none.
    Figures that show triggers, which no experiment stands behind, are whole.
  """

  def kept(cells: dict[str, Cell]) -> dict[str, Cell]:
    return {
      label: cell
      for label, cell in cells.items()
      if (cell.config.victim_label, cell.config.target_label) in pairs
    }

  if isinstance(artefact, Table):
    rows = [row._replace(cells=kept(row.cells)) for row in artefact.rows]
    rows = [row for row in rows if row.cells]
    return artefact._replace(rows=tuple(rows)) if rows else None
  if artefact.kind == "triggers":
    return artefact
  cells = kept(artefact.cells)
  return artefact._replace(cells=cells) if cells else None


# --- pieces ------------------------------------------------------------------


def _with(config: Config, **changes: Any) -> Config:
  return dataclasses.replace(config, **changes)


def _pair(config: Config, pair: paper.Pair) -> Config:
  return _with(config, victim_label=pair[0], target_label=pair[1])


def _arrow(pair: paper.Pair, names: tuple[str, ...] | None = None) -> str:
  victim, target = (names[i] if names else str(i) for i in pair)
  return f"{victim} → {target}"


def _accuracies(
  *groups: tuple[str, str], variant: str = "main"
) -> tuple[Column, ...]:
  """TA and AA of phases: (heading, phase), ..."""
  return tuple(
    Column(group, name, variant, phase, key)
    for group, phase in groups
    for name, key in (("TA", TA), ("AA", AA))
  )


_TRAINING, _FP = ("Training", "training"), ("FP", "fp")
_FP_AW, _ALL = ("FP+AW", "fp+aw"), ("All", "all")


def _places(columns: Sequence[Column]) -> dict[tuple[str, str], int]:
  """Where columns stand, by heading and name."""
  return {(column.group, column.name): i for i, column in enumerate(columns)}


def _mean(values: np.ndarray, column: int) -> float:
  """Over what is known; ValueError if nothing is, of which none can speak."""
  known = values[..., column]
  if np.isnan(known).all():
    raise ValueError("No result yet.")
  return float(np.nanmean(known))


def _verdict(*conditions: bool) -> str:
  if all(conditions):
    return "seen"
  return "seen partly" if any(conditions) else "not seen"


def _count(values: np.ndarray, column: int, below: float) -> tuple[int, int]:
  """How many known values are below a bound, and how many there are."""
  known = values[..., column].ravel()
  known = known[~np.isnan(known)]
  return int((known < below).sum()), len(known)


# --- tables ------------------------------------------------------------------

_READINGS = (
  "Pruning stops where the test accuracy “drops more than 1% after pruning the"
  " next neuron” (Section V-C). Read as the drop of one neuron, it is the"
  " paper's columns; “in all” bounds all pruned neurons together."
)
_METHODS = (
  " Which method pruned in this table, the paper does not say; ours are votes"
  " (MVP), and ranks (RAP) on the right."
)


def _readings(config: Config) -> dict[str, Cell]:
  """The whole process, as it is and by what the paper leaves open."""
  return {
    "main": Cell(config),
    "total": Cell(_with(config, pruning_drop_of="total")),
    "rap": Cell(_with(config, pruning="rap")),
  }


def _of_readings(config: Config) -> tuple[Column, ...]:
  """The columns of what `_readings` has besides the main one."""
  drop = f"{100 * config.pruning_drop:g}% in all"
  return tuple(
    column
    for variant, text in (("total", drop), ("rap", "RAP"))
    for column in _accuracies(
      *((f"{heading}, {text}", phase) for heading, phase in (_FP_AW, _ALL)),
      variant=variant,
    )
  )


def _rows_with_readings(
  base: Config, published: dict[paper.Pair, tuple[float, ...]]
) -> tuple[Row, ...]:
  """A row per pair; the paper has no numbers for the other readings."""
  none = (None,) * len(_of_readings(base))
  return tuple(
    Row(_arrow(pair), _readings(_pair(base, pair)), (*numbers, *none))
    for pair, numbers in published.items()
  )


def table_1(bases: Bases) -> Table:
  """MNIST: the whole process for 18 pairs."""
  base = bases["mnist"]

  def works(values: np.ndarray) -> tuple[str, str]:
    aw, whole = _mean(values, 3), _mean(values, 5)
    ta_aw, ta_whole = _mean(values, 2), _mean(values, 4)
    return (
      _verdict(whole <= aw, ta_whole >= ta_aw),
      f"All {ta_whole:.1f}/{whole:.1f}, FP+AW {ta_aw:.1f}/{aw:.1f}",
    )

  return Table(
    "table-1",
    "Table I: MNIST in different modes",
    _READINGS + _METHODS,
    (*_accuracies(_TRAINING, _FP_AW, _ALL), *_of_readings(base)),
    _rows_with_readings(base, paper.TABLE_1),
    (("The All mode works the best.", works),),
  )


def table_2(bases: Bases) -> Table:
  """Fashion-MNIST: nine targets."""
  base = bases["fashion_mnist"]

  def rises(values: np.ndarray) -> tuple[str, str]:
    ta = [_mean(values, column) for column in (4, 6)]
    aa = [_mean(values, column) for column in (5, 7)]
    return (
      _verdict(ta[1] > ta[0], aa[1] > aa[0]),
      f"TA {ta[0]:.1f} to {ta[1]:.1f}, AA {aa[0]:.1f} to {aa[1]:.1f}",
    )

  return Table(
    "table-2",
    "Table II: Fashion-MNIST",
    _READINGS + _METHODS,
    (*_accuracies(_TRAINING, _FP, _FP_AW, _ALL), *_of_readings(base)),
    _rows_with_readings(base, paper.TABLE_2),
    (("From FP+AW to All, TA rises, and AA too.", rises),),
  )


_JPEG = "CIFAR-10 (JPEG) where the data set is a JPEG copy."


def table_3(bases: Bases) -> Table:
  """CIFAR-10 under the Distributed Backdoor Attack."""
  base = bases["cifar10"]
  return Table(
    "table-3",
    "Table III: CIFAR-10 under the Distributed Backdoor Attack",
    _JPEG,
    _accuracies(_TRAINING, _FP, _FP_AW, _ALL),
    tuple(
      Row(
        _arrow(pair, paper.CIFAR10_LABELS),
        {"main": Cell(_pair(base, pair))},
        numbers,
      )
      for pair, numbers in paper.TABLE_3.items()
    ),
  )


def table_4(bases: Bases) -> Table:
  """Neural Cleanse and Fine-Pruning beside the whole process."""
  baselines = {
    "unlearning": ("NC, unlearning", "nc-unlearn"),
    "pruning": ("NC, pruning", "nc-prune"),
    "oracle": ("NC, oracle", "nc-oracle"),
    "": ("Fine-Pruning", "fine-pruning"),
  }
  columns = list(_accuracies(_TRAINING, variant="ours"))
  for group, phase in baselines.values():
    columns += _accuracies((group, phase), variant="theirs")
    columns.append(
      Column(group, "s", "theirs", phase, "seconds", percent=False)
    )
  columns += _accuracies(_ALL, variant="ours")
  place = _places(columns)

  def better(values: np.ndarray) -> tuple[str, str]:
    ours = _mean(values, place["All", "AA"])
    theirs = {
      kind: _mean(values, place[group, "AA"])
      for kind, (group, _) in baselines.items()
      if kind
    }
    return (
      _verdict(*(ours < value for value in theirs.values())),
      f"AA of All {ours:.1f}; of Neural Cleanse: "
      + ", ".join(f"{kind} {value:.1f}" for kind, value in theirs.items()),
    )

  rows = []
  for name, published, pairs in (
    ("mnist", "MNIST", paper.TABLE_1),
    ("fashion_mnist", "Fashion-MNIST", paper.TABLE_2),
    ("cifar10", "CIFAR-10", paper.TABLE_3),
  ):
    cells = {}
    for pair in pairs:
      config = _pair(bases[name], pair)
      cells[f"theirs/{_arrow(pair)}"] = Cell(
        _with(config, cleanse=",".join(BASELINES))
      )
      cells[f"ours/{_arrow(pair)}"] = Cell(config)
    numbers: list[float | None] = [None] * len(columns)
    for group, pair_of in zip(
      ("Training", "NC, oracle", "All"), (0, 2, 4), strict=True
    ):
      for name_of, value in zip(
        ("TA", "AA"), paper.TABLE_4[name][pair_of : pair_of + 2], strict=True
      ):
        numbers[place[group, name_of]] = value
    rows.append(Row(published, cells, tuple(numbers)))
  return Table(
    "table-4",
    "Table IV: comparison with Neural Cleanse",
    "Averages over the pairs of Tables I to III. Neural Cleanse by unlearning"
    " and by pruning, and Fine-Pruning, are deployable: they see the server's"
    " own images alone. The paper's Neural Cleanse is the best of several runs"
    " by AA, with test images; it stands beside our oracle, which is told the"
    " target label too. s: seconds, compilation included where a run compiled.",
    tuple(columns),
    tuple(rows),
    (("Our method has better performance than Neural Cleanse.", better),),
  )


def table_5(bases: Bases) -> Table:
  """MNIST: pruning by ranks and by votes."""
  base = bases["mnist"]
  drop = f"{100 * base.pruning_drop:g}%"
  # What the drop is of: of all pruned neurons, as in the whole process, or of
  # the next one alone, which are the paper's words in its Section V-C.
  readings = {"total": f", {drop} in all", "neuron": f", {drop} per neuron"}
  methods = {"rap": "RAP", "mvp": "MVP"}
  columns = list(_accuracies(_TRAINING, variant="rap, total"))
  for reading, text in readings.items():
    for method, name in methods.items():
      columns += _accuracies(
        (name + text, "fp"), variant=f"{method}, {reading}"
      )
  place = _places(columns)

  def low(name: str, published: int) -> Callable[[Any], tuple[str, str]]:
    def check(values: np.ndarray) -> tuple[str, str]:
      counts = {
        text: _count(values, place[name + text, "AA"], 10)
        for text in readings.values()
      }
      count, known = counts[readings["neuron"]]
      expected = published * known / len(paper.PAIRS)
      alike = abs(count - expected) <= known / 10
      return (
        _verdict(alike, 0 < count < known),
        "; ".join(
          f"{count} of {known}{text}"
          for text, (count, known) in reversed(counts.items())
        ),
      )

    return check

  rows = []
  for pair, numbers in paper.TABLE_5.items():
    config = _with(_pair(base, pair), cleanse="fp")
    cells = {
      f"{method}, {reading}": Cell(
        _with(config, pruning=method, pruning_drop_of=reading)
      )
      for method in methods
      for reading in readings
    }
    rows.append(
      Row(_arrow(pair), cells, (*numbers[:2], *[None] * 4, *numbers[2:]))
    )
  return Table(
    "table-5",
    "Table V: federated pruning by ranks (RAP) and votes (MVP)",
    _READINGS,
    tuple(columns),
    tuple(rows),
    (
      ("RAP drops AA below 10% in 5 of 18 cases.", low("RAP", 5)),
      ("MVP successfully defends 7 of 18 cases.", low("MVP", 7)),
    ),
  )


def table_6(bases: Bases) -> Table:
  """MNIST: adjusting extreme weights alone, in two networks."""
  base = _with(bases["mnist"], cleanse="aw")

  def simple(values: np.ndarray) -> tuple[str, str]:
    small, large = _mean(values, 2), _mean(values, 5)
    return (
      _verdict(small < large),
      f"AA {small:.1f} in the small network, {large:.1f} in the large one",
    )

  rows = []
  for pair, numbers in paper.TABLE_6.items():
    config = _pair(base, pair)
    cells = {
      size: Cell(_with(config, model=f"mnist_{size}"))
      for size in ("small", "large")
    }
    rows.append(Row(_arrow(pair), cells, numbers))
  return Table(
    "table-6",
    "Table VI: only adjusting extreme weights",
    "N is the number of weights that were zeroed.",
    tuple(
      column
      for size in ("small", "large")
      for column in (
        Column(size, "N", size, "aw", "zeroed_weights", percent=False),
        *_accuracies((size, "aw"), variant=size),
      )
    ),
    tuple(rows),
    (
      (
        "In the small network extreme weights alone are enough, in the large"
        " one they are not.",
        simple,
      ),
    ),
  )


def table_7(bases: Bases) -> Table:
  """MNIST: triggers of one to nine pixels, at Δ = 3."""
  base = _with(
    _pair(bases["mnist"], (9, 1)),
    # A single step, kept whatever it costs.
    delta_start=3.0,
    delta_step=3.0,
    adjusting_drop=1.0,
  )

  def falls(values: np.ndarray) -> tuple[str, str]:
    fp, aw = _mean(values, 4), _mean(values, 7)
    return _verdict(aw < fp), f"AA {fp:.1f} after FP, {aw:.1f} after FP+AW"

  return Table(
    "table-7",
    "Table VII: attack patterns of 1 to 9 pixels, 9 → 1",
    "Δ = 3, as in the paper's table; N counts pruned neurons and zeroed"
    " weights.",
    (
      *_accuracies(_TRAINING),
      Column("FP", "N", "main", "fp", "pruned_neurons", percent=False),
      *_accuracies(_FP),
      Column("FP+AW", "N", "main", "fp+aw", "zeroed_weights", percent=False),
      *_accuracies(_FP_AW),
    ),
    tuple(
      Row(
        str(pixels),
        {"main": Cell(_with(base, trigger=f"pixel{pixels}"))},
        numbers,
      )
      for pixels, numbers in paper.TABLE_7.items()
    ),
    (("Adjusting weights lowers AA further than pruning.", falls),),
  )


# --- the discussion ----------------------------------------------------------


def _attack_table(
  number: int, title: str, note: str, rows: tuple[Row, ...]
) -> Table:
  def robust(values: np.ndarray) -> tuple[str, str]:
    before, after = _mean(values[:1], -1), _mean(values[1:], -1)
    return (
      _verdict(after < 10, after < 50),
      f"AA of All {after:.1f} under this attack, {before:.1f} without",
    )

  return Table(
    f"discussion-{number}",
    title,
    note,
    _accuracies(_TRAINING, _FP, _FP_AW, _ALL),
    rows,
    (
      (
        "Attack success will still significantly decrease (Section VI-B).",
        robust,
      ),
    ),
  )


def _row(label: str, cell: Cell) -> Row:
  return Row(label, {"main": cell}, (None,) * 8)


def discussion_1(bases: Bases) -> Table:
  """Attack 1: attackers promote the backdoor neurons in their reports."""
  base = bases["mnist"]
  rows = [_row("honest reports, MVP", Cell(_with(base, pruning="mvp")))]
  for method in ("mvp", "rap"):
    promoted = _with(base, pruning=method, attacker_reports="promote")
    rows.append(_row(f"promoted, {method.upper()}", Cell(promoted)))
  reported = _with(base, validation_size=0)
  rows.append(_row("accuracies by clients, honest", Cell(reported)))
  for kind in ("stop_pruning", "ruin_model"):
    lying = Cell(_with(reported, attacker_reports=kind))
    rows.append(_row(f"accuracies by clients, {kind}", lying))
  return _attack_table(
    1,
    "Section VI-B, attack 1: false ranks, votes and accuracies",
    "Attackers report the backdoor's neurons as their most active ones, or lie"
    " about accuracy where clients choose the pruning rate.",
    tuple(rows),
  )


def discussion_2(bases: Bases) -> Table:
  """Attack 2: attackers train under the final pruning mask."""
  base = bases["mnist"]
  known = Cell(base)

  def avoid(config: Config, record: Record) -> Config:
    count = record.phase("fp")["pruned_neurons"]
    order = [line["neuron"] for line in record.curve("fp")[1 : count + 1]]
    return _with(config, attacker_avoids=",".join(map(str, sorted(order))))

  return _attack_table(
    2,
    "Section VI-B, attack 2: pruning-aware training",
    "The attacker is given the mask that the same federation ends in without"
    " this attack, and trains without the neurons that it prunes.",
    (
      _row("unaware", known),
      _row("pruning-aware", Cell(base, known, avoid)),
    ),
  )


def discussion_3(bases: Bases) -> Table:
  """Attack 3: attackers limit their own extreme weights."""
  base = bases["mnist"]
  return _attack_table(
    3,
    "Section VI-B, attack on adjusting: self-limited weights",
    "After each local step the attacker limits its last convolution to μ ± Δσ.",
    (
      _row("unlimited", Cell(base)),
      *(
        _row(f"Δ = {delta:g}", Cell(_with(base, attacker_limit=delta)))
        for delta in (4.0, 3.0, 2.0)
      ),
    ),
  )


# --- figures -----------------------------------------------------------------

_TWO = ((9, 0), (9, 2))


def figure_3(bases: Bases) -> Figure:
  """Training under 3, 5 and 7 labels per client."""
  base = _with(bases["mnist"], cleanse="", eval_every=3)

  def easier(records: dict[str, list[Record]]) -> tuple[str, str]:
    final = {
      label: np.mean([run.phase("training")[TA] for run in runs])
      for label, runs in records.items()
    }
    ordered = [100 * value for value in final.values()]
    return (
      _verdict(ordered[0] <= ordered[1], ordered[1] <= ordered[2]),
      ", ".join(f"{k}: TA {100 * v:.1f}" for k, v in final.items()),
    )

  return Figure(
    "figure-3",
    "Figure 3: training under different data distributions",
    "",
    "training",
    {
      f"{labels}-label": Cell(_with(base, labels_per_client=labels))
      for labels in (3, 5, 7)
    },
    (("The fewer labels per client, the harder the training.", easier),),
  )


def figure_5(bases: Bases) -> Figure:
  """Pruning curves by rank and by vote."""

  def redundant(records: dict[str, list[Record]]) -> tuple[str, str]:
    lost = {
      label: float(
        np.mean([r.curve("fp")[0][TA] - r.curve("fp")[30][TA] for r in runs])
      )
      for label, runs in records.items()
    }
    return (
      _verdict(*(value <= 0.01 for value in lost.values())),
      "TA lost by 30 neurons: "
      + ", ".join(f"{k} {100 * v:.1f}" for k, v in lost.items()),
    )

  return Figure(
    "figure-5",
    "Figure 5: federated pruning",
    "",
    "pruning",
    {
      f"{_arrow(pair)}, {name}": Cell(
        _with(_pair(bases["mnist"], pair), cleanse="fp", pruning=method)
      )
      for pair in _TWO
      for name, method in (("rank", "rap"), ("vote", "mvp"))
    },
    (("Both methods prune over 30 redundant neurons.", redundant),),
  )


def figure_6(bases: Bases) -> Figure:
  """Δ curves."""
  return Figure(
    "figure-6",
    "Figure 6: adjusting extreme weights",
    "After pruning and fine-tuning, down to Δ = 1, whatever it costs.",
    "delta",
    {
      _arrow(pair): Cell(
        _with(_pair(bases["mnist"], pair), cleanse="fp,ft,aw", **_WHOLE_CURVE)
      )
      for pair in _TWO
    },
    (("AA falls before TA does.", _falls_first),),
  )


_WHOLE_CURVE = {"delta_start": 10.0, "delta_step": 0.25, "adjusting_drop": 0.5}


def _falls_first(records: dict[str, list[Record]]) -> tuple[str, str]:
  told, seen = [], []
  for label, runs in records.items():
    for run in runs:
      curve = run.curve("all")
      floor = curve[0]["accuracy"] - 0.02
      kept = [line for line in curve if line["accuracy"] >= floor]
      best = min(kept, key=lambda line: line[AA])
      seen.append(best[AA] < 0.1)
      told.append(
        f"{label}: lowest AA {100 * best[AA]:.1f}, at Δ = {best['delta']},"
        " where validation has lost less than 2 points"
      )
  return _verdict(*seen), "; ".join(told)


def figure_7(bases: Bases) -> Figure:
  """50 clients, 10% attackers, 5 to 25 selected per round."""
  base = _with(
    bases["mnist"],
    num_clients=50,
    num_attackers=5,
    samples_per_client=600,
    **_WHOLE_CURVE,
  )
  return Figure(
    "figure-7",
    "Figure 7: adjusting weights, 50 clients, so many selected per round",
    "600 images per client, five attackers.",
    "delta",
    {
      f"{count} selected": Cell(_with(base, clients_per_round=count))
      for count in (5, 10, 15, 20, 25)
    },
    (("Attack success is greatly mitigated in all of them.", _falls_first),),
  )


def figure_8(bases: Bases) -> Figure:
  """One to ten attackers."""
  # All ten attackers need images of the victim label, of which there are 5,000.
  base = _with(bases["mnist"], samples_per_client=1500)

  def protects(records: dict[str, list[Record]]) -> tuple[str, str]:
    many = {
      label: float(np.mean([run.phase("all")[AA] for run in runs]))
      for label, runs in records.items()
      if int(label) > 5
    }
    return (
      _verdict(*(value < 0.2 for value in many.values())),
      "AA of All with so many attackers: "
      + ", ".join(f"{k}: {100 * v:.1f}" for k, v in many.items()),
    )

  return Figure(
    "figure-8",
    "Figure 8: influence of the number of attackers",
    f"γ = {base.gamma:g} for one attacker, and that divided by their number for"
    " more, at least 1. 1,500 images per client, so that ten attackers find"
    " enough of the victim label.",
    "attackers",
    {
      str(count): Cell(
        _with(
          base,
          num_attackers=count,
          gamma=max(1.0, base.gamma / count),
        )
      )
      for count in range(1, 11)
    },
    (
      (
        "With more than half of the clients malicious, the complete process"
        " still mitigates most backdoor attacks.",
        protects,
      ),
    ),
  )


def figure_9(bases: Bases) -> Figure:
  """Time per phase."""

  def short(records: dict[str, list[Record]]) -> tuple[str, str]:
    told, seen = [], []
    for label, runs in records.items():
      training = np.mean([run.phase("training")["seconds"] for run in runs])
      rest = np.mean(
        [
          sum(run.phase(name)["seconds"] for name in ("fp", "fp+ft", "all"))
          for run in runs
        ]
      )
      seen.append(bool(rest < training / 2))
      told.append(f"{label}: training {training:.0f} s, cleansing {rest:.0f} s")
    return _verdict(*seen), "; ".join(told)

  return Figure(
    "figure-9",
    "Figure 9: time of each process",
    "Seconds of finished work on the machine that the runs name, compilation"
    " included where a run compiled.",
    "seconds",
    {
      name: Cell(_pair(bases[name], (9, 0)))
      for name in ("mnist", "fashion_mnist", "cifar10")
      if name in bases
    },
    (("Cleansing takes little beside training.", short),),
  )


def figure_10(bases: Bases) -> Figure:
  """λ on the last convolution."""
  base = _with(bases["mnist"], cleanse="", eval_every=3)

  def harder(records: dict[str, list[Record]]) -> tuple[str, str]:
    ends = {
      label: [
        100 * float(np.mean([run.phase("training")[key] for run in runs]))
        for key in (TA, AA)
      ]
      for label, runs in records.items()
    }
    first, *_, last = ends.values()
    return (
      _verdict(last[1] < first[1] - 5, last[0] < first[0]),
      ", ".join(f"{k}: {v[0]:.1f}/{v[1]:.1f}" for k, v in ends.items()),
    )

  return Figure(
    "figure-10",
    "Figure 10: L2 on the last convolution",
    "λ as in (λ/2)·Σw².",
    "training",
    {
      f"λ = {value:g}": Cell(_with(base, last_conv_l2=value))
      for value in (0.0, 0.01, 0.03, 0.1)
    },
    (
      (
        "A large λ makes the attack much more challenging, at some loss of"
        " test accuracy.",
        harder,
      ),
    ),
  )


def figure_1(bases: Bases) -> Figure:
  """Triggers of 1 to 9 pixels on a real image."""
  return Figure(
    "figure-1",
    "Figure 1: pixel patterns",
    "",
    "triggers",
    {
      f"{pixels} pixels": Cell(_with(bases["mnist"], trigger=f"pixel{pixels}"))
      for pixels in (1, 3, 5, 7, 9)
    },
  )


def figure_4(bases: Bases) -> Figure:
  """DBA's pieces on a real image."""
  return Figure(
    "figure-4",
    "Figure 4: the Distributed Backdoor Attack's pieces",
    _JPEG,
    "triggers",
    {"dba": Cell(bases["cifar10"])},
  )


TABLES: dict[int, Callable[[Bases], Table]] = {
  1: table_1,
  2: table_2,
  3: table_3,
  4: table_4,
  5: table_5,
  6: table_6,
  7: table_7,
}
FIGURES: dict[int, Callable[[Bases], Figure]] = {
  1: figure_1,
  3: figure_3,
  4: figure_4,
  5: figure_5,
  6: figure_6,
  7: figure_7,
  8: figure_8,
  9: figure_9,
  10: figure_10,
}
DISCUSSION: dict[int, Callable[[Bases], Table]] = {
  1: discussion_1,
  2: discussion_2,
  3: discussion_3,
}
