import csv
import io
import json

import numpy as np
import pytest

from fljax import config as configs
from fljax.reproduction import catalogue
from fljax.reproduction import discussion
from fljax.reproduction import figures
from fljax.reproduction import plan
from fljax.reproduction import render
from fljax.reproduction import tables

BASELINES = ("nc-prune", "nc-unlearn", "fine-pruning", "nc-oracle")
BASES = {"mnist": configs.Config()}


def make_record(training=(0.98, 1.0), seed=0, **phases):
  named = {"training": training, **phases}
  return plan.Record(
    {
      "config": {"seed": seed, "dataset": "mnist"},
      "environment": {"jax": "1"},
      "phases": [
        {"name": name.replace("_", "+"), plan.TA: ta, plan.AA: aa, "seconds": 2}
        for name, (ta, aa) in named.items()
      ],
    },
    [
      {"phase": "training", "round": r, plan.TA: 0.1 * r, plan.AA: 0.5}
      for r in (1, 2, 3)
    ],
  )


def make_table(shown=2):
  table = tables.table_1(BASES)
  return table._replace(rows=table.rows[:shown])


def rendered(records, failures=None, seeds=(0, 1), table=None):
  return render.table(
    table or make_table(), records, failures or {}, seeds, "the command"
  )


def test_values_stand_where_they_belong():
  record = make_record(fp_aw=(0.9, 0.2), all=(0.95, 0.1))
  other = make_record(fp_aw=(0.8, 0.3), all=(0.85, 0.4))
  ranked = make_record(fp_aw=(0.7, 0.5), all=(0.75, 0.6))
  records = {
    ("9 → 1", "main", 1): record,
    ("9 → 1", "total", 1): other,
    ("9 → 1", "rap", 1): ranked,
  }
  values = render.values_of(make_table(), records, (0, 1))
  assert values.shape == (2, 2, 14)
  np.testing.assert_allclose(
    values[1, 1], [98, 100, 90, 20, 95, 10, 80, 30, 85, 40, 70, 50, 75, 60]
  )
  assert np.isnan(values[0]).all() and np.isnan(values[1, 0]).all()


def test_a_row_of_two_trainings_says_so():
  records = {
    ("9 → 1", "main", 1): make_record(fp_aw=(0.9, 0.2), all=(0.95, 0.1)),
    ("9 → 1", "rap", 1): make_record(fp_aw=(0.9, 0.2), all=(0.95, 0.1)),
  }
  said = "9 → 1, seed 1: trained more than once"
  assert said not in rendered(records).files["table-1.md"].decode()
  records["9 → 1", "total", 1] = make_record(
    (0.97, 0.9), fp_aw=(0.9, 0.2), all=(0.95, 0.1)
  )
  assert said in rendered(records).files["table-1.md"].decode()


def test_a_value_may_be_a_mean_over_experiments():
  bases = dict.fromkeys(("mnist", "fashion_mnist", "cifar10"), BASES["mnist"])
  table = tables.table_4(bases)

  def baselines(target):
    phases = [
      {
        "name": name,
        plan.TA: 0.9 + 0.04 * target,
        plan.AA: 0.1 * place,
        "seconds": 3.0,
      }
      for place, name in enumerate(BASELINES)
    ]
    whole = make_record()
    return whole._replace(results={**whole.results, "phases": phases})

  # What has not both is in no column: 2 → 9, and 9 → 5.
  records = {
    **{("MNIST", f"theirs/9 → {t}", 0): baselines(t) for t in (0, 1, 5)},
    **{
      ("MNIST", f"ours/{pair}", 0): make_record(all=(0.9, 0.3))
      for pair in ("9 → 0", "9 → 1", "2 → 9")
    },
  }
  values = render.values_of(table, records, (0,))
  places = [BASELINES.index(column.phase) for column in table.columns[4::3]]
  np.testing.assert_allclose(
    values[0, 0, 4:], [x for k in places for x in (92, 10 * k, 3)]
  )
  np.testing.assert_allclose(values[0, 0, :4], [98, 100, 90, 30])
  text = rendered(records, seeds=(0,), table=table).files["table-4.md"].decode()
  assert "MNIST, seed 0: means over 9 → 0, 9 → 1.\n" in text


def test_table_4_shows_the_papers_numbers_beside_the_oracle():
  bases = dict.fromkeys(("mnist", "fashion_mnist", "cifar10"), BASES["mnist"])
  table = tables.table_4(bases)
  shown = {
    (column.group, column.name): value
    for column, value in zip(table.columns, table.rows[0].paper, strict=True)
    if value is not None
  }
  assert shown == {
    ("Training", "TA"): 98.3,
    ("Training", "AA"): 99.7,
    ("NC, oracle", "TA"): 93,
    ("NC, oracle", "AA"): 3.8,
    ("All", "TA"): 96.9,
    ("All", "AA"): 4.7,
  }


def test_a_table_shows_ours_the_papers_and_the_difference():
  records = {
    (f"9 → {target}", "main", seed): make_record(
      fp_aw=(0.9, 0.2), all=(0.94 + 0.02 * seed, 0.1)
    )
    for target in (0, 1)
    for seed in (0, 1)
  }
  made = rendered(records)
  text = made.files["table-1.md"].decode()
  # 94 and 96 over two seeds; the paper's two rows have 96.6 and 96.9.
  assert "95.0 ± 1.4 (96.6)" in text and "95.0 ± 1.4 (96.9)" in text
  assert "95.0 ± 1.4 (96.8)" in text
  assert "-1.8" in text and "the command" in text and "Seeds 0, 1;" in text
  assert "**seen**" in text
  cells = json.loads(made.files["table-1.json"])["cells"]
  assert len(cells) == 4
  rows = list(csv.DictReader(io.StringIO(made.files["table-1.csv"].decode())))
  (row,) = (r for r in rows if (r["row"], r["column"]) == ("9 → 0", "All TA"))
  assert row["mean"] == "95.000" and row["paper"] == "96.6"
  assert row["difference"] == "-1.600" and row["seed 1"] == "96.000"


def test_what_has_no_result_says_so():
  made = rendered({}, {("9 → 0", "main", 0): "became not finite"})
  text = made.files["table-1.md"].decode()
  assert "No result yet." in text and "none yet" in text
  assert "9 → 0, main, seed 0: became not finite" in text
  assert "seen" not in text


def test_a_half_done_table_averages_what_there_is():
  """The paper's average too, or rows would be compared with others."""
  record = make_record(fp_aw=(0.9, 0.2), all=(0.95, 0.1))
  text = rendered({("9 → 0", "main", 0): record}).files["table-1.md"].decode()
  mean = next(line for line in text.splitlines() if line.startswith("| mean"))
  assert mean.split("|")[6].strip() == "95.0 (96.6)"
  assert "Seeds 0;" in text


def test_between_rows_of_other_seeds_there_is_no_deviation():
  def shown(seeds):
    records = {
      (row, variant, seed): make_record(
        (0.9 + 0.1 * (row == "9 → 1"), 1.0), fp_aw=(0.9, 0.2), all=(0.95, 0.1)
      )
      for row, seed in zip(("9 → 0", "9 → 1", "9 → 1"), seeds, strict=True)
      for variant in ("main", "total", "rap")
    }
    text = rendered(records).files["table-1.md"].decode()
    return next(line for line in text.splitlines() if "| mean" in line)

  # The mean of rows, however many seeds each has.
  assert shown((0, 1, 1)).startswith("| mean | 95.0 (98.4) |")
  assert shown((0, 0, 1)).startswith("| mean | 95.0 (98.4) |")
  assert shown((1, 1, 1)).startswith("| mean | 95.0 (98.4) |")
  assert "±" not in shown((0, 1, 1))


def test_of_an_attack_without_a_result_nothing_is_said():
  table = discussion.discussion_2(BASES)
  record = make_record(
    fp=(0.9, 0.8), fp_aw=(0.9, 0.2), fp_ft=(0.95, 0.9), all=(0.95, 0.1)
  )
  records = {("unaware", "main", 0): record}
  text = rendered(records, seeds=(0,), table=table).files["discussion-2.md"]
  assert "seen" not in text.decode() and "nan" not in text.decode()
  records["pruning-aware", "main", 0] = record
  text = rendered(records, seeds=(0,), table=table).files["discussion-2.md"]
  assert "**not seen**: AA: pruning-aware 10.0" in text.decode()


def test_labels_are_escaped_on_the_page():
  page = render.page({"<b>": "<p>section</p>"})
  assert "&lt;b&gt;" in page and "<p>section</p>" in page


def test_a_figure_averages_over_seeds_and_is_the_same_again():
  figure = figures.figure_3(BASES)
  records = {
    (label, "", seed): make_record(training=(0.9, 0.5), seed=seed)
    for label in figure.cells
    for seed in (0, 1)
  }
  made = render.figure(figure, records, {}, (0, 1), "command")
  assert set(made.files) == {f"figure-3.{s}" for s in ("png", "svg", "json")}
  assert made.files["figure-3.png"].startswith(b"\x89PNG")
  assert "Seeds 0, 1." in made.section and "<b>seen</b>" in made.section
  again = render.figure(figure, records, {}, (0, 1), "command")
  assert again.files["figure-3.png"] == made.files["figure-3.png"]


def test_how_far_adjusting_goes_in_a_figure_is_not_decided_by_aa():
  """Neither is it when accuracy has recovered."""
  record = make_record(fp_ft=(0.98, 1.0), all=(0.9, 0.0))
  lines = [
    {"phase": "all", "delta": delta, "accuracy": accuracy, plan.AA: success}
    for delta, accuracy, success in (
      (None, 0.98, 1.0),
      (4, 0.975, 0.95),
      (3, 0.95, 0.5),
      (2, 0.97, 0.05),
    )
  ]
  record = record._replace(lines=[*record.lines, *lines])
  ((_, check),) = figures.figure_6(BASES).statements
  verdict, told = check({"9 → 0": [record]})
  assert verdict == "not seen" and "95.0 at Δ = 4" in told


def test_a_statement_about_what_has_no_result_is_not_made():
  record = make_record(training=(0.9, 0.5), fp=(0.9, 0.8), all=(0.95, 0.1))
  few = {(label, "", 0): record for label in ("1", "2", "5")}
  made = render.figure(figures.figure_8(BASES), few, {}, (0,), "command")
  assert made.files and "seen" not in made.section
  some = {(f"λ = {x:g}", "", 0): record for x in (0.01, 0.03)}
  made = render.figure(figures.figure_10(BASES), some, {}, (0,), "command")
  assert made.files and "seen" not in made.section


def test_attacks_are_not_averaged():
  table = discussion.discussion_3(BASES)
  record = make_record(
    fp=(0.9, 0.8), fp_aw=(0.9, 0.2), fp_ft=(0.95, 0.9), all=(0.95, 0.1)
  )
  records = {(row.label, "main", 0): record for row in table.rows}
  text = rendered(records, seeds=(0,), table=table).files["discussion-3.md"]
  assert "mean" not in text.decode() and text.count(b" 95.0 |") > 3


def test_a_figure_without_results_says_so():
  made = render.figure(figures.figure_5(BASES), {}, {}, (0,), "command")
  assert not made.files and "No result yet." in made.section


@pytest.mark.parametrize("number", [5, 6, 7, 8, 9, 10])
def test_every_kind_of_figure_is_drawn(number):
  bases = {name: configs.Config() for name in ("mnist", "fashion_mnist")}
  figure = catalogue.FIGURES[number](bases)
  record = make_record(
    fp=(0.9, 0.8), fp_aw=(0.9, 0.2), fp_ft=(0.95, 0.9), all=(0.95, 0.1)
  )
  lines = [
    *record.lines,
    *(
      {"phase": "fp", "pruned_neurons": k, plan.TA: 0.9, plan.AA: 0.5}
      for k in range(40)
    ),
    *(
      {
        "phase": "all",
        "delta": delta,
        "accuracy": 0.9,
        plan.TA: 0.9,
        plan.AA: 0.5,
      }
      for delta in (None, 3.0, 2.0)
    ),
  ]
  records = {
    (label, "", 0): record._replace(lines=lines) for label in figure.cells
  }
  made = render.figure(figure, records, {}, (0,), "command")
  assert f"{figure.name}.svg" in made.files
  assert made.summary
  again = render.figure(figure, records, {}, (0,), "command")
  assert made.files == again.files


def test_triggers_are_drawn_on_a_real_image():
  made = render.figure(figures.figure_1(BASES), {}, {}, (0,), "command")
  assert set(made.files) == {"figure-1.png", "figure-1.svg"}


def test_the_papers_average_is_over_the_rows_that_ours_is_over():
  """Half a table is not compared with the whole of the paper's."""
  table = make_table(2)
  record = make_record(fp_aw=(0.9, 0.2), all=(0.95, 0.1))
  made = rendered({("9 → 1", "main", 0): record}, seeds=(0,), table=table)
  lines = made.files["table-1.md"].decode().splitlines()
  second, mean = (
    next(line for line in lines if line.startswith(f"| {label} |"))
    for label in ("9 → 1", "mean")
  )
  assert second.removeprefix("| 9 → 1") == mean.removeprefix("| mean")
  none = rendered({}, seeds=(0,), table=table).files["table-1.md"].decode()
  assert "| mean | – (98.4)" in none
