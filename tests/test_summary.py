import csv
import json
import subprocess
import sys

from conftest import ROOT
import pytest

from fljax import config as configs
from fljax import summary
from fljax import workdir as workdirs


def _results(accuracy, success, **changes):
  phase = {"test_accuracy": accuracy, "attack_success": success, "seconds": 2.0}
  config = configs.Config(**changes)
  return {
    "config": config.identity(),
    "environment": {},
    "seed": config.seed,
    "phases": [
      {"name": "training", **phase},
      {"name": "fp", **phase, "pruned_neurons": 3, "neurons": 8},
      {"name": "aw", **phase, "zeroed_weights": 0, "delta": None},
    ],
  }


def _write(folder, results, data="same"):
  folder.mkdir(parents=True)
  settings = {**results["config"], workdirs.DATA_SHA256: data}
  (folder / workdirs.CONFIG).write_text(json.dumps(settings))
  (folder / workdirs.RESULTS).write_text(json.dumps(results))
  return str(folder)


def _summarise(*arguments):
  return subprocess.run(
    [sys.executable, str(ROOT / "launch/summarise.py"), *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_table_shows_every_phase_in_percent():
  lines = summary.table(_results(0.9834, 0.0125)).splitlines()
  assert lines[2].split() == ["training", "98.3", "1.2", "2.0"]
  assert "3 of 8 pruned" in lines[3]
  assert "0 weights zeroed (no change)" in lines[4]


def test_the_table_shows_runs_without_attackers():
  lines = summary.table(_results(0.5, None)).splitlines()
  assert lines[2].split() == ["training", "50.0", "-", "2.0"]


def test_the_summary_averages_over_runs():
  runs = [_results(0.9, 0.0), _results(1.0, 0.5)]
  lines = summary.summary(runs).splitlines()
  assert lines[1].split() == (
    ["training", "2", "95.00", "±", "7.07", "25.00", "±", "35.36", "2.0"]
  )


def test_repetitions_of_one_experiment_are_averaged():
  runs = {
    "seed=0": _results(0.9, 0.0),
    "seed=1,2-1": _results(
      1.0, None, seed=1, victim_label=2, target_label=1, figures=False
    ),
  }
  del runs["seed=1,2-1"]["phases"][2]
  lines = summary.compared(runs).splitlines()
  assert lines[0].split() == ["TA/AA", "%", "training", "fp", "aw"]
  assert lines[2].split() == ["seed=0", "90.0/0.0", "90.0/0.0", "90.0/0.0"]
  assert lines[3].split() == ["seed=1,2-1", "100.0/-", "100.0/-"]
  assert lines[6].split()[:5] == ["training", "2", "95.00", "±", "7.07"]


def test_what_differs_in_more_is_compared_by_what_it_differs_in():
  runs = {
    f"seed={seed},{rule},{gamma:g}": _results(
      accuracy + seed / 100, None, seed=seed, aggregation=rule, gamma=gamma
    )
    for rule, accuracy in (("mean", 0.9), ("median", 0.8))
    for gamma in (1.0, 2.0)
    for seed in (0, 1)
  }
  # What an older version left lacks later settings, which are as by default.
  del runs["seed=0,mean,1"]["config"]["client_holdout"]
  every = list(runs.values())
  assert summary.differing(every) == ["seed", "aggregation", "gamma"]
  lines = summary.compared(runs).splitlines()[-4:]
  assert [line.split() for line in lines] == [
    [f"aggregation={rule}", f"gamma={gamma}", "2", *[f"{mean}/-"] * 3]
    for rule, mean in (("mean", 90.5), ("median", 80.5))
    for gamma in (1.0, 2.0)
  ]
  # One of each is no average.
  alone = {name: run for name, run in runs.items() if run["seed"] == 0}
  assert len(summary.compared(alone).splitlines()) == 2 + len(alone)
  assert len(summary.compared({"one": every[0]}).splitlines()) == 3


@pytest.mark.parametrize("known", [configs.TRAINING_CODE, "data_sha256"])
def test_other_code_or_data_is_another_group(known):
  runs = [
    _results(0.9, 0.0),
    _results(0.8, 0.0),
    _results(0.8, 0.0, seed=1),
    _results(0.7, 0.0, cleanse="aw"),
  ]
  for run, code in zip(runs, "abba", strict=True):
    run["config"][known] = {"network toy": code}
  found = summary.groups(runs)
  assert {name: len(members) for name, members in found.items()} == {
    "cleanse=fp,ft,aw": 1,
    "cleanse=fp,ft,aw #2": 2,
    "cleanse=aw": 1,
  }
  assert [*summary.groups(runs[:3])] == ["", "#2"]


def test_groups_are_compared_by_what_all_of_them_have():
  runs = [
    _results(0.9, 0.0),
    _results(0.3, 0.0, seed=1),
    _results(0.9, 0.0, aggregation="median"),
  ]
  heading, _, mean, median = summary.averages(runs).splitlines()
  assert "over what all have" in heading
  assert mean.split()[1:3] == ["1", "90.0/0.0"] == median.split()[1:3]
  runs[2]["config"]["seed"] = 2
  heading, _, mean, _ = summary.averages(runs).splitlines()
  assert "over different seeds or labels" in heading
  assert mean.split()[1:3] == ["2", "60.0/0.0"]


def test_a_sweeps_folder_is_its_finished_runs(tmp_path):
  sweep = tmp_path / "sweep"
  for seed in (0, 1):
    for gamma in (1.0, 2.0):
      _write(
        sweep / f"{seed},{gamma:g}",
        _results(0.5 + seed / 4, gamma / 10, seed=seed, gamma=gamma),
      )
  (sweep / "unfinished").mkdir()
  alone = _write(tmp_path / "alone", _results(0.5, 0.1, gamma=1.0, seed=2))
  out = tmp_path / "all.csv"
  done = _summarise(sweep, alone, alone, "--csv", out)
  assert not done.returncode, done.stderr
  lines = [line.split() for line in done.stdout.splitlines()]
  assert [line[0] for line in lines[2:7]] == [
    *(f"sweep/{seed},{gamma}" for seed in (0, 1) for gamma in (1, 2)),
    "alone",
  ]
  assert lines[-2:] == [
    ["gamma=1.0", "2", *["62.5/10.0"] * 3],
    ["gamma=2.0", "2", *["62.5/20.0"] * 3],
  ]
  with open(out, encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 15
  assert rows[4] == {
    "run": "sweep/0,2",
    "seed": "0",
    "victim_label": "9",
    "target_label": "0",
    "gamma": "2.0",
    "phase": "fp",
    "test_accuracy": "0.5",
    "attack_success": "0.2",
    "seconds": "2.0",
  }


def test_runs_of_other_data_are_not_averaged_with(tmp_path):
  for seed, data in enumerate("aab"):
    _write(tmp_path / str(seed), _results(0.5, 0.1, seed=seed), data)
  done = _summarise(tmp_path)
  assert "over different seeds or labels" in done.stdout
  assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == (
    ["2", "#2"]
  )


@pytest.mark.parametrize(
  "content, message",
  [(None, "there is no"), ("{", "damaged"), ('{"phases": []}', "damaged")],
)
def test_the_summary_of_what_is_no_run_is_refused(tmp_path, content, message):
  if content is not None:
    (tmp_path / "results.json").write_text(content)
  process = _summarise(tmp_path)
  assert process.returncode == 2 and message in process.stderr
  assert "Traceback" not in process.stderr


def test_a_csv_that_cannot_be_written_is_told_in_one_line(tmp_path):
  run = _write(tmp_path / "run", _results(0.5, 0.1))
  process = _summarise(run, "--csv", tmp_path / "no" / "where.csv")
  assert process.returncode == 2
  assert process.stderr.startswith("fljax: ")
  assert process.stderr.count("\n") == 1
