"""The command line: one clear sentence, the right exit code, no traceback."""

import json
import re
import subprocess
import sys

from conftest import ROOT
import numpy as np
import pytest

from fljax import summary

MAIN = ROOT / "launch" / "main.py"


SMALL = (
  "--model=mnist_small",
  "--samples_per_client=60",
  "--rounds=2",
  "--eval_every=1",
  "--fine_tune_rounds=1",
  "--delta_step=2",
)


def run(*arguments):
  return subprocess.run(
    [sys.executable, str(MAIN), *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("main") / "run"
  return workdir, run(f"--workdir={workdir}", *SMALL)


def test_a_run_prints_the_table_of_phases(finished):
  workdir, process = finished
  assert process.returncode == 0, process.stderr
  results = json.loads((workdir / "results.json").read_text())
  assert process.stdout.strip() == summary.table(results)
  rows = process.stdout.splitlines()[2:]
  assert [row.split()[0] for row in rows] == [
    "training",
    "fp",
    "fp+aw",
    "fp+ft",
    "all",
  ]
  for row, phase in zip(rows, results["phases"], strict=True):
    assert f"{100 * phase['test_accuracy']:.1f}" in row
  assert "training: round 2/2" in process.stderr
  # Nothing but what a person wants to read.
  assert not re.search(r"^[IW]\d{4} ", process.stderr, re.MULTILINE)


def test_another_config_in_the_same_workdir_is_refused(finished):
  workdir, _ = finished
  process = run(f"--workdir={workdir}", *SMALL, "--seed=3")
  assert process.returncode == 2
  assert "seed: 0 there, 3 here" in process.stderr
  assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--dataset=svhn"], "unknown data set 'svhn'"),
    (["--model=resnet"], "unknown --model=resnet: choose one of"),
    (["--trigger=pixel2"], "unknown --trigger=pixel2: choose one of"),
    (["--victim_label=1", "--target_label=1"], "two different labels"),
    (["--victim_label=10"], "--victim_label=10 is out of range"),
    (["--num_attackers=11"], "--num_attackers=11 is more than"),
    (["--gamma=11"], "--gamma=11 is out of range"),
    (["--gamma=0.5"], "--gamma=0.5 is out of range"),
    (["--samples_per_client=9000"], "is more than exist"),
    (["--rounds=many"], "rounds"),
    (["--sweep=figures=true"], "figures cannot be swept"),
    (["--no_such_flag"], "no_such_flag"),
    (["surplus"], "unexpected argument 'surplus'"),
  ],
  ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_sentence(tmp_path, arguments, message):
  process = run(f"--workdir={tmp_path / 'run'}", *arguments)
  assert process.returncode != 0
  assert message in process.stderr
  assert "Traceback" not in process.stderr and not process.stdout


def test_a_workdir_that_cannot_be_written_is_told(tmp_path):
  (tmp_path / "file").write_text("")
  process = run(f"--workdir={tmp_path / 'file' / 'run'}", *SMALL)
  assert process.returncode == 2 and "cannot be written" in process.stderr
  assert "Traceback" not in process.stderr


def test_a_disk_that_is_full_is_told(tmp_path):
  """A limit on file size makes writes fail inside the checkpoint library."""
  process = subprocess.run(
    [
      *("bash", "-c", 'ulimit -f 60; exec "$@"', "bash"),
      *(sys.executable, str(MAIN), f"--workdir={tmp_path / 'run'}", *SMALL),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 2, process.stderr
  assert "cannot be written" in process.stderr
  assert "Traceback" not in process.stderr
  assert not (tmp_path / "run" / "results.json").exists()
  # With room again, the same command goes on.
  process = run(f"--workdir={tmp_path / 'run'}", *SMALL)
  assert process.returncode == 0, process.stderr


def test_a_users_npz_runs_from_the_command_line(tmp_path):
  rng = np.random.default_rng(0)
  labels = np.arange(600) % 3
  images = rng.integers(0, 60, (600, 20, 20, 3), np.uint8)
  images[np.arange(600), 5 * labels] += 150
  np.savez(tmp_path / "own.npz", images=images, labels=labels)
  process = run(
    f"--workdir={tmp_path / 'run'}",
    f"--dataset={tmp_path / 'own.npz'}",
    *SMALL,
    "--num_clients=4",
    "--labels_per_client=2",
    "--validation_size=100",
    "--victim_label=2",
  )
  assert process.returncode == 0, process.stderr
  assert (tmp_path / "run" / "report.html").exists()


def test_help_shows_every_flag_with_its_range():
  process = run("--helpfull")
  for text in ("--pruning_rate", "Range: at least 0 and at most 1", "pixel9"):
    assert text in process.stdout
