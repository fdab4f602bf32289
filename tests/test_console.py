import subprocess
import sys

from conftest import ROOT
import pytest

from fljax import config as configs
from fljax import console


def _results(accuracy, success):
  phase = {"test_accuracy": accuracy, "attack_success": success, "seconds": 2.0}
  return {
    "seed": 0,
    "phases": [
      {"name": "training", **phase},
      {"name": "fp", **phase, "pruned_neurons": 3, "neurons": 8},
      {"name": "aw", **phase, "zeroed_weights": 0, "delta": None},
    ],
  }


def test_the_table_shows_every_phase_in_percent():
  lines = console.table(_results(0.9834, 0.0125)).splitlines()
  assert lines[2].split() == ["training", "98.3", "1.2", "2.0"]
  assert "3 of 8 pruned" in lines[3]
  assert "0 weights zeroed (no change)" in lines[4]


def test_the_table_shows_runs_without_attackers():
  lines = console.table(_results(0.5, None)).splitlines()
  assert lines[2].split() == ["training", "50.0", "-", "2.0"]


def test_where_there_is_no_terminal_what_measures_nothing_is_told_rarely(
  capsys, monkeypatch
):
  clock = [0.0]
  monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
  shown = console.Console(prefix="a ")
  shown.start("nc-prune: reversing triggers", 100, 0, unit="step")
  for done in range(0, 101, 5):
    shown.advance(done)
    clock[0] += 4
  shown.start("training", 2, 0)
  shown.advance(1, 0.5, None)
  shown.advance(2, 0.75, 0.5)
  shown.stop()
  assert capsys.readouterr().err.splitlines() == [
    "a nc-prune: reversing triggers: step 40/100",
    "a nc-prune: reversing triggers: step 80/100",
    "a training: round 1/2  TA 50.0  AA -",
    "a training: round 2/2  TA 75.0  AA 50.0",
  ]


@pytest.mark.parametrize(
  "changes, when",
  [
    ({}, "gamma 1)"),
    ({"rounds": 0}, "gamma 1)"),
    ({"attack_rounds": 9}, "gamma 1)"),
    ({"attack_start": 4}, "gamma 1, in rounds 5 to 9)"),
    ({"attack_start": 4, "attack_rounds": 2}, "gamma 1, in rounds 5 to 6)"),
    ({"attack_start": 8, "attack_rounds": 2}, "gamma 1, in rounds 9 to 9)"),
    ({"attack_start": 9}, "gamma 1, in no round of training)"),
  ],
)
def test_the_header_says_when_attackers_attack(changes, when):
  settings = configs.Config(**{"rounds": 9, "gamma": 1.0, **changes})
  assert when in console.header(settings)


def test_the_summary_averages_over_runs():
  runs = [_results(0.9, 0.0), _results(1.0, 0.5)]
  lines = console.summary(runs).splitlines()
  assert lines[1].split() == (
    ["training", "2", "95.00", "±", "7.07", "25.00", "±", "35.36", "2.0"]
  )


@pytest.mark.parametrize(
  "content, message",
  [(None, "there is no"), ("{", "damaged"), ('{"phases": []}', "damaged")],
)
def test_the_summary_of_what_is_no_run_is_refused(tmp_path, content, message):
  if content is not None:
    (tmp_path / "results.json").write_text(content)
  process = subprocess.run(
    [sys.executable, str(ROOT / "launch/summarise.py"), str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 2 and message in process.stderr
  assert "Traceback" not in process.stderr


def test_the_summary_of_a_sweeps_folder_says_what_its_runs_are(tmp_path):
  (tmp_path / "seed=0").mkdir()
  (tmp_path / "seed=0" / "results.json").write_text("{}")
  process = subprocess.run(
    [sys.executable, str(ROOT / "launch/summarise.py"), str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 2
  assert f"a sweep's runs are {tmp_path}/*" in process.stderr


def test_the_table_of_a_sweep_shows_every_experiment_and_averages():
  runs = {"seed=0": _results(0.9, 0.0), "seed=1": _results(1.0, None)}
  del runs["seed=1"]["phases"][2]
  lines = console.sweep_table(runs).splitlines()
  assert lines[0].split() == ["TA/AA", "%", "training", "fp", "aw"]
  assert lines[2].split() == ["seed=0", "90.0/0.0", "90.0/0.0", "90.0/0.0"]
  assert lines[3].split() == ["seed=1", "100.0/-", "100.0/-"]
  assert lines[6].split()[:5] == ["training", "2", "95.00", "±", "7.07"]
