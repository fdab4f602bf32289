import numpy as np
import pytest

from fljax import cleansing
from fljax import config as configs
from fljax.reproduction import catalogue
from fljax.reproduction import discussion
from fljax.reproduction import paper
from fljax.reproduction import plan

BASES = {
  "mnist": configs.Config(),
  "fashion_mnist": configs.Config(dataset="fashion_mnist"),
  "cifar10": configs.Config(dataset="cifar10", trigger="dba"),
}


MADE_OF_ROWS = [
  make
  for kind, makers in catalogue.KINDS.items()
  if kind != "figure"
  for make in makers.values()
]


@pytest.mark.parametrize(
  "table, averages",
  [
    (paper.TABLE_1, (98.3, 99.7, 94.4, 8.4, 96.9, 4.7)),
    (paper.TABLE_2, (88.1, 99.7, 82.8, 23.6, 82.5, 1.9, 86.4, 6.4)),
    (paper.TABLE_3, (72.4, 87.6, 71.9, 46.6, 71.1, 13.0, 71.5, 32.7)),
    (paper.TABLE_6, (30, 98.2, 3.2, 137, 97.5, 42.5)),
  ],
  ids=["1", "2", "3", "6"],
)
def test_published_rows_average_to_the_published_averages(table, averages):
  means = np.mean(list(table.values()), axis=0)
  # The paper cuts its average of weights, 30.6, to 30.
  counts = np.isin(averages, (30, 137))
  assert (np.abs(means - averages) <= np.where(counts, 0.6, 0.05)).all()


def test_the_paper_counts_what_table_5_says():
  rows = np.array(list(paper.TABLE_5.values()))
  assert ((rows[:, 3] < 10).sum(), (rows[:, 5] < 10).sum()) == (5, 7)


@pytest.mark.parametrize("number", catalogue.TABLES)
def test_every_row_has_a_published_number_for_every_column(number):
  table = catalogue.TABLES[number](BASES)
  for row in table.rows:
    assert len(row.paper) == len(table.columns)
    # Deployable baselines and another reading are columns of our own.
    assert (None in row.paper) == (number in (1, 2, 3, 4, 5))
    shown = [plan.variants_of(row, column) for column in table.columns]
    assert {name for names in shown for name in names} == set(row.cells)
    assert all(shown)


@pytest.mark.parametrize("make", MADE_OF_ROWS)
def test_columns_are_phases_that_their_experiments_have(make):
  table = make(BASES)
  for row in table.rows:
    for column in table.columns:
      for variant in plan.variants_of(row, column):
        config = row.cells[variant].config
        names = [name for name, _, _ in cleansing.course(config.phases)]
        assert column.phase in ("training", *names)


def test_rows_attack_whom_they_say():
  for number in (1, 2, 3, 5, 6):
    table = catalogue.TABLES[number](BASES)
    for row, pair in zip(table.rows, paper.PAIRS, strict=False):
      for cell in row.cells.values():
        config = cell.config
        assert (config.victim_label, config.target_label) == pair


def test_nothing_but_its_subject_differs_from_the_flagfile():
  """What is calibrated stays; Table VII's fixed Δ and so on are named.

  A training anew is as long as the tuning that it stands beside.
  """
  calibrated = ("learning_rate", "rounds", "batch_size", "poison_fraction")
  for make in MADE_OF_ROWS:
    for row in make(BASES).rows:
      for variant, cell in row.cells.items():
        if variant.startswith("anew"):
          tuned = row.cells[variant.replace("anew", "ffst")].config
          assert cell.config.rounds == tuned.fst_rounds
          continue
        base = BASES[cell.config.dataset]
        for name in calibrated:
          assert getattr(cell.config, name) == getattr(base, name)


@pytest.mark.parametrize("number, make", catalogue.BEYOND.items())
def test_other_ways_of_cleansing_begin_with_the_same_model(number, make):
  """What is compared is cleansing, and each trained model serves all of it.

  But for what clients keep back to decide by, which is the tenth's question,
  for pairs, of which rows of the eleventh and twelfth have several, and for the
  attack, of which the eleventh has two kinds; and for what is trained anew, or
  for attackers who do not hide, to see them beside those who do.
  """
  for row in make(BASES).rows:
    configs_of = [cell.config for cell in row.cells.values()]
    assert len(set(configs_of)) == len(configs_of)
    groups = {}
    for name, cell in row.cells.items():
      if name.startswith(("anew", "shown")):
        continue
      model = cell.config.training()
      if number == 10:
        model["client_holdout"] = 0
      # As in "gain two/9 → 0", and "gain/9 → 0".
      group = name.partition(" " if number == 11 else "/")[2]
      groups.setdefault(group, []).append(model)
    for models in groups.values():
      assert all(one == models[0] for one in models)
      assert len(models) > 1


def test_pruning_by_gain_withstands_limits_only_if_every_row_does():
  table = catalogue.BEYOND[3](BASES)
  (judged,) = (
    f for text, f in table.statements if "gain withstands attackers" in text
  )
  place = plan.places(table.columns)["FP by gain", "AA"]
  values = np.full((len(table.rows), 1, len(table.columns)), np.nan)
  with pytest.raises(ValueError, match="No result"):
    judged(values)
  limited = [
    i
    for i, row in enumerate(table.rows)
    if {
      row.cells["gain"].config.attacker_limit,
      row.cells["gain"].config.attacker_gain,
    }
    != {0}
  ]
  values[limited, 0, place] = 9.9
  said, numbers = judged(values)
  assert said == "seen"
  assert [numbers.count(table.rows[i].label) for i in limited] == [1] * 5
  values[limited[0], 0, place] = 10.0
  assert judged(values)[0] == "seen partly"


def test_a_pruning_aware_attacker_avoids_what_was_pruned():
  table = discussion.discussion_2(BASES)
  cell = table.rows[1].cells["main"]
  record = plan.Record(
    {"phases": [{"name": "fp", "pruned_neurons": 2}]},
    [
      {"phase": "fp", "pruned_neurons": k, "neuron": neuron}
      for k, neuron in enumerate((None, 7, 3, 5))
    ],
  )
  assert cell.adapt(cell.config, record).attacker_avoids == "3,7"


@pytest.mark.parametrize(
  "make",
  [*MADE_OF_ROWS, *catalogue.FIGURES.values()],
)
def test_some_pairs_are_a_part_of_all(make):
  """Every experiment is in exactly one part, under its own label."""

  def of(pair):
    return lambda config: (config.victim_label, config.target_label) == pair

  def cells(artefact):
    if isinstance(artefact, plan.Table):
      return {
        (row.label, name): (cell.config, row.paper)
        for row in artefact.rows
        for name, cell in row.cells.items()
      }
    return {label: cell.config for label, cell in artefact.cells.items()}

  whole = make(BASES)
  if getattr(whole, "kind", "") == "triggers":
    assert plan.only(whole, of((9, 0))) == whole
    return
  parts = [plan.only(whole, of(pair)) for pair in paper.PAIRS]
  # Nobody attacks a label with itself.
  assert plan.only(whole, of((9, 9))) is None
  parts = [cells(part) for part in parts if part is not None]
  assert sum(map(len, parts)) == len(cells(whole))
  assert {key: value for part in parts for key, value in part.items()} == cells(
    whole
  )
