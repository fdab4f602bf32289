"""launch/reproduce.py as its users start it."""

import csv
import json
import shlex
import subprocess
import sys

from conftest import ROOT
import pytest

SMALL = (
  "rounds=1",
  "samples_per_client=60",
  "model=mnist_small",
  "validation_size=200",
)


def reproduce(folder, *arguments):
  return subprocess.run(
    [
      sys.executable,
      str(ROOT / "launch" / "reproduce.py"),
      f"--workdir={folder}",
      *arguments,
      *(f"--override={text}" for text in SMALL),
    ],
    capture_output=True,
    text=True,
    check=False,
  )


def test_a_figure_is_made_and_not_made_twice(tmp_path):
  process = reproduce(tmp_path, "--figure=3,1", "--seeds=4", "--together=yes")
  assert process.returncode == 0, process.stderr
  assert "10 clients, 1 attacking 9 -> 0" in process.stderr
  assert "and 2 more in " in process.stderr
  out = tmp_path / "results"
  for name in ("figure-3.png", "figure-3.svg", "figure-3.json", "figure-1.png"):
    assert (out / name).stat().st_size > 1000
  assert "0 of 3 cells are complete" in process.stderr
  page = (out / "index.html").read_text()
  assert "Seeds 4." in page and "Table I: MNIST" in page
  assert "No result yet" in page

  before = (out / "figure-3.json").read_bytes()
  again = reproduce(tmp_path, "--figure=3", "--seeds=4")
  assert again.returncode == 0, again.stderr
  assert "3 of 3 cells are complete" in again.stderr
  assert (out / "figure-3.json").read_bytes() == before
  # What was made before stays on the page, also where nothing is known of it.
  assert (out / "index.html").read_text() == page
  empty = reproduce(
    tmp_path / "empty", "--figure=3", "--norun", "--out", str(out)
  )
  assert empty.returncode == 0, empty.stderr
  assert "is left as it is" in empty.stdout
  assert (out / "index.html").read_text() == page


def test_what_has_not_been_run_is_shown_as_such(tmp_path):
  process = reproduce(
    tmp_path, "--table=5,6", "--norun", "--out", str(tmp_path)
  )
  assert process.returncode == 0, process.stderr
  # Table VI compares two networks, whatever --override says.
  assert "--table=6: 18 of its 36 experiments have a model of" in process.stderr
  assert "--table=5:" not in process.stderr
  assert "No result yet." in (tmp_path / "table-5.md").read_text()
  with open(tmp_path / "table-5.csv", newline="") as stream:
    rows = list(csv.DictReader(stream))
  assert len(rows) == 18 * 10
  assert {row["mean"] for row in rows} == {""}
  assert not (tmp_path / "trained").exists()


def test_what_diverges_is_told_of(tmp_path):
  arguments = ("--table=6", "--pairs=9:0", "--override=learning_rate=1e30")
  for _ in range(2):  # It is not tried again, and told of again.
    process = reproduce(tmp_path, *arguments)
    assert process.returncode == 0, process.stderr
    assert "--table=6 9 → 0, seed 0: no result" in process.stderr
    assert "not finite" in process.stderr


def test_some_pairs_and_data_sets_alone(tmp_path):
  process = reproduce(
    tmp_path,
    "--table=5,2,4",
    "--pairs=1:9,3:9",
    "--datasets=mnist",
    "--norun",
    "--out",
    str(tmp_path),
  )
  assert process.returncode == 0, process.stderr
  text = (tmp_path / "table-5.md").read_text()
  assert " --pairs=1:9,3:9 --datasets=mnist --override" in text
  assert "| 1 → 9 |" in text and "| 9 → 0 |" not in text
  assert not (tmp_path / "table-2.md").exists()
  assert "| CIFAR-10 |" not in (tmp_path / "table-4.md").read_text()


RESULTS = ROOT / "launch" / "results"
SHIPPED = [
  path
  for path in sorted(RESULTS.glob("*.json"))
  # The second attack's settings come from another run's curve.
  if not path.stem.startswith("figure") and path.stem != "discussion-2"
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_are_those_of_the_flagfiles(tmp_path, path):
  # Its cells are found by the settings that the flagfiles give now. Those of
  # another table may be the same settings on another machine.
  _, _, what, *limits = shlex.split(json.loads(path.read_text())["command"])
  assert what == "--" + path.stem.replace("-", "=")
  process = subprocess.run(
    [
      sys.executable,
      str(ROOT / "launch" / "reproduce.py"),
      "--norun",
      f"--results={path}",
      f"--workdir={tmp_path / 'store'}",
      f"--out={tmp_path}",
      what,
      *limits,
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  for suffix in (".csv", ".md"):
    name = path.with_suffix(suffix).name
    assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "nothing to make"),
    (["--table=8"], "--table=8: there is no such table"),
    (["--table=1", "--seeds=one"], "--seeds=one must be numbers"),
    (["--table=1", "--results=~no-such-user"], "--results=~no-such-user is in"),
    (["--table=1", "--override=round=1"], "--override: "),
    (["--table=1", "--override=cleanse=fp"], "--override=cleanse: the phases"),
    (["--table=1", "--override=seed=3"], "--override=seed: use --seeds"),
    (["--table=1", "--override=dataset=x"], "--override=dataset: use --data"),
    (["table=1"], "unexpected argument 'table=1'"),
    (["--table=1", "--pairs=9-0"], "--pairs=9-0: give a victim"),
    (["--table=2", "--pairs=1:9"], "--table=2: left out, none"),
    (
      ["--table=4", "--datasets=svhn"],
      "--datasets=svhn: choose some of mnist,",
    ),
  ],
  ids=lambda value: str(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(tmp_path, arguments, message):
  process = reproduce(tmp_path, *arguments)
  assert process.returncode == 2
  assert message in process.stderr and "Traceback" not in process.stderr
