"""The experiments behind the attacks of Section VI-B."""

from __future__ import annotations

from collections.abc import Set

from fljax.config import Config
from fljax.reproduction import plan
from fljax.reproduction.plan import Bases
from fljax.reproduction.plan import Cell
from fljax.reproduction.plan import Record
from fljax.reproduction.plan import Row
from fljax.reproduction.plan import Table


def _attack_table(
  number: int, title: str, note: str, rows: tuple[Row, ...], honest: Set[int]
) -> Table:
  """A table of attacks; `honest` are the rows of what they are compared to."""
  columns = plan.accuracies(plan.TRAINING, plan.FP, plan.FP_AW, plan.ALL)
  attacked = {
    place: row.label for place, row in enumerate(rows) if place not in honest
  }
  return Table(
    f"discussion-{number}",
    title,
    note,
    columns,
    rows,
    (
      (
        "Attack success will still significantly decrease (Section VI-B).",
        plan.leaves_little(columns, plan.ALL[0], attacked),
      ),
    ),
    averaged=False,
  )


def _row(label: str, cell: Cell) -> Row:
  return Row(label, {"main": cell}, (None,) * 8)


def discussion_1(bases: Bases) -> Table:
  """Attack 1: attackers promote the backdoor neurons in their reports."""
  base = bases["mnist"]
  rows = [_row("honest reports, MVP", Cell(plan.changed(base, pruning="mvp")))]
  for method in ("mvp", "rap"):
    promoted = plan.changed(base, pruning=method, attacker_reports="promote")
    rows.append(_row(f"promoted, {method.upper()}", Cell(promoted)))
  reported = plan.changed(base, validation_size=0)
  rows.append(_row("accuracies by clients, honest", Cell(reported)))
  for kind in ("stop_pruning", "ruin_model"):
    lying = Cell(plan.changed(reported, attacker_reports=kind))
    rows.append(_row(f"accuracies by clients, {kind}", lying))
  return _attack_table(
    1,
    "Section VI-B, attack 1: false ranks, votes and accuracies",
    "Attackers report the backdoor's neurons as their most active ones, or lie"
    " about accuracy where clients choose how far pruning and adjusting go.",
    tuple(rows),
    honest={0, 3},
  )


def discussion_2(bases: Bases) -> Table:
  """Attack 2: attackers train under the final pruning mask."""
  base = bases["mnist"]
  known = Cell(base)

  def avoid(config: Config, record: Record) -> Config:
    count = record.phase("fp")["pruned_neurons"]
    order = [line["neuron"] for line in record.curve("fp")[1 : count + 1]]
    return plan.changed(
      config, attacker_avoids=",".join(map(str, sorted(order)))
    )

  return _attack_table(
    2,
    "Section VI-B, attack 2: pruning-aware training",
    "The attacker is given the mask that the same federation ends in without"
    " this attack, and trains without the neurons that it prunes.",
    (
      _row("unaware", known),
      _row("pruning-aware", Cell(base, known, avoid)),
    ),
    honest={0},
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
        _row(f"Δ = {delta:g}", Cell(plan.changed(base, attacker_limit=delta)))
        for delta in (4.0, 3.0, 2.0)
      ),
    ),
    honest={0},
  )
