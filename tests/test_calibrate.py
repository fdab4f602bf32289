"""launch/calibrate.py as its users start it."""

import json
import subprocess
import sys

from conftest import ROOT
import numpy as np
import pytest

from fljax.cleanse import selection

SMALL = (
  "--rounds=1",
  "--samples_per_client=60",
  "--model=mnist_small",
  "--validation_size=200",
  "--fine_tune_rounds=1",
)


def calibrate(folder, *arguments):
  return subprocess.run(
    [
      sys.executable,
      str(ROOT / "launch" / "calibrate.py"),
      f"--flagfile={ROOT / 'launch' / 'mnist.flags'}",
      *SMALL,
      f"--store={folder}",
      *arguments,
    ],
    capture_output=True,
    text=True,
    check=False,
  )


def test_variants_share_a_model_and_aa_stays_hidden(tmp_path):
  gentle = "cleanse=fp pruning_drop=0.06 pruning_drop_of=neuron"
  variants = ("adjusting_drop=0.5", gentle)
  arguments = [f"--variant={text}" for text in variants]
  arguments += ["--pairs=9:1", "--rounds=12", "--samples_per_client=400"]
  arguments += ["--delta_step=1"]
  process = calibrate(tmp_path, *arguments)
  assert process.returncode == 0, process.stderr
  assert len(list((tmp_path / "trained").iterdir())) == 1
  assert len(list((tmp_path / "runs").iterdir())) == 3
  shown = json.loads((tmp_path / "calibration-validation.json").read_text())
  assert list(shown) == ["", *variants]
  for text in variants:
    assert f"| {text} |" in process.stdout
  # Whether the attack has taken, and nothing of it afterwards.
  for row in shown.values():
    assert "AA" in row.pop("training") and row.pop("runs") == "1"
    assert "fp" in row and all("AA" not in text for text in row.values())
    assert all(float(text.split(",")[0]) > 1 for text in row.values())
  # How far each search went, by which variants differ.
  assert "pruned" in shown[""]["fp"] and "round" in shown[""]["fp+ft"]
  assert shown[""]["all"].count("Δ") == shown[""]["all"].count("zeroed") == 1
  assert shown[""]["all"] != shown["adjusting_drop=0.5"]["all"]

  # The variant reached the search.
  for folder in (tmp_path / "runs").iterdir():
    config = json.loads((folder / "config.json").read_text())
    if config["pruning_drop_of"] == "neuron":
      lines = (folder / "metrics.jsonl").read_text().splitlines()
      curve = [
        line["accuracy"]
        for line in map(json.loads, lines)
        if line["phase"] == "fp"
      ]
      count = selection.last_gentle(np.asarray(curve), 0.06)
      assert f"pruned {count}" in shown[gentle]["fp"]
      assert count != selection.last_above(np.asarray(curve), curve[0] - 0.06)

  again = calibrate(tmp_path, "--oracle", *arguments)
  assert again.returncode == 0, again.stderr
  shown = json.loads((tmp_path / "calibration-test.json").read_text())
  assert all("AA" in row["fp"] and "TA" in row["fp"] for row in shown.values())


def test_where_nobody_attacks_there_is_no_aa(tmp_path):
  process = calibrate(
    tmp_path, "--num_attackers=0", "--cleanse=fp", "--pruning=gain", "--oracle"
  )
  assert process.returncode == 0, process.stderr
  (row,) = json.loads((tmp_path / "calibration-test.json").read_text()).values()
  assert all("TA" in row[name] for name in ("training", "fp"))
  assert "AA" not in process.stdout and "nan" not in process.stdout


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--seeds=0"], "--seeds=0: calibration seeds are numbers from 100 on"),
    (["--seeds=100,x"], "--seeds=100,x: calibration"),
    (["--variant=drop=1"], "'drop=1' is no setting of launch/main.py"),
    (["--variant=seed=1"], "--variant=seed=1: seeds are those of --seeds"),
    (["--variant=devices=1"], "devices changes no result; give it as a flag"),
    (["--store=~no-such-user/x"], "--store=~no-such-user/x is in the home"),
    (["--variant=gamma"], "'gamma' is no setting"),
    (["--variant=gamma=much"], "'much' is no value of gamma"),
    (["--variant=gamma=0.1"], "--gamma=0.1 is out of range"),
    (["--pairs=9"], "'9' is no value of pairs"),
    (["--sweep=seed=0,1"], "--sweep is launch/main.py's"),
    (["--seed=105"], "--seed is launch/main.py's: --seeds"),
    (["--trained_in=runs/x"], "--trained_in is launch/main.py's"),
    (["variant"], "unexpected argument 'variant'"),
  ],
  ids=lambda value: str(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(tmp_path, arguments, message):
  process = calibrate(tmp_path, *arguments)
  assert process.returncode == 2
  assert message in process.stderr and "Traceback" not in process.stderr
