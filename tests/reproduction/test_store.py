import dataclasses
import json
from pathlib import Path
import shutil

from conftest import TINY_SETTINGS
from conftest import write_images
import pytest

from fljax import config as configs
from fljax import driver
from fljax import errors
from fljax import experiment
from fljax.reproduction import archive
from fljax.reproduction import plan
from fljax.reproduction import store as stores

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("store")
  return configs.Config(
    dataset=str(write_images(folder / "rows.npz")),
    **TINY_SETTINGS,
  )


@pytest.fixture
def store(tmp_path):
  return stores.Store(str(tmp_path / "store"), driver.Stop())


def _with(config, **changes):
  return dataclasses.replace(config, **changes)


def test_cells_that_differ_in_cleansing_share_a_training(base, store):
  one = plan.Cell(_with(base, cleanse="fp", pruning="rap"))
  two = plan.Cell(_with(base, cleanse="fp", pruning="mvp"))
  # The trim is part of training by that rule alone.
  robust = {"cleanse": "ft", "fine_tune_aggregation": "trimmed_mean"}
  trims = [
    plan.Cell(_with(base, aggregation_trim=trim, **robust))
    for trim in (0.3, 0.4)
  ]
  assert store.record(one, 3) is None
  for cell in (one, two, *trims):
    store.run(cell, 3)
  assert len(list((store.path / "trained").iterdir())) == 1
  assert len(list((store.path / "runs").iterdir())) == 4
  # From a run that has another trim, too.
  other = store.settings(trims[0], 3)
  taking = _with(
    other,
    aggregation_trim=0.1,
    workdir=f"{other.workdir}-taking",
    trained_in=other.workdir,
  )
  assert experiment.run(taking, quiet=True)["phases"][1]["name"] == "ft"
  shutil.rmtree(taking.workdir)
  first, second = (store.record(cell, 3) for cell in (one, two))
  assert first.phase("training") == second.phase("training")
  assert first.curve("training") == second.curve("training")
  assert first.results["config"]["seed"] == 3
  # Another seed is another training.
  store.run(one, 4)
  assert len(list((store.path / "trained").iterdir())) == 2


def test_a_stored_run_is_what_the_command_line_gives(base, store, tmp_path):
  cell = plan.Cell(base)
  store.run(cell, 1)
  alone = experiment.run(
    _with(base, seed=1, workdir=str(tmp_path / "alone")), quiet=True
  )
  stored = store.record(cell, 1).results
  for results in (alone, stored):
    for phase in results["phases"]:
      del phase["seconds"]
  assert "trained" in stored["phases"][0].pop("taken_from")
  assert stored == alone


def test_what_is_complete_is_not_run_again(base, store, monkeypatch):
  cell = plan.Cell(_with(base, cleanse="", rounds=1))
  store.run(cell, 0)
  monkeypatch.setattr(experiment, "setup", None)
  store.run(cell, 0)
  assert store.record(cell, 0) is not None


def test_a_cell_waits_for_the_one_it_builds_on(base, store):
  first = plan.Cell(_with(base, cleanse="fp", rounds=1))

  def adapt(config, record):
    pruned = record.phase("fp")["pruned_neurons"]
    return _with(config, pruning_rate=0.25 + pruned / 100)

  second = plan.Cell(first.config, first, adapt)
  assert store.settings(second, 0) is None
  assert store.record(second, 0) is None
  store.run(second, 0)
  pruned = store.record(first, 0).phase("fp")["pruned_neurons"]
  settings = store.record(second, 0).results["config"]
  assert settings["pruning_rate"] == 0.25 + pruned / 100


def test_a_cell_that_diverges_says_why_and_is_left(base, store, monkeypatch):
  cell = plan.Cell(_with(base, learning_rate=1e20))
  store.run(cell, 0)
  assert store.record(cell, 0) is None
  assert "became not finite in round" in store.failure(cell, 0)
  monkeypatch.setattr(experiment, "setup", None)
  store.run(cell, 0)
  assert store.failure(plan.Cell(base), 0) is None
  builds_on_it = plan.Cell(base, cell, lambda config, record: config)
  assert "not finite" in store.failure(builds_on_it, 0)


def test_cells_trained_together_are_those_trained_alone(base, store, tmp_path):
  cells = [
    ("a", plan.Cell(_with(base, cleanse="")), 3),
    ("b", plan.Cell(_with(base, cleanse="", gamma=1.5)), 3),
    # The same training as the first; and one of another structure.
    ("c", plan.Cell(_with(base, cleanse="aw")), 3),
    ("d", plan.Cell(_with(base, cleanse="", momentum=0.5)), 3),
  ]
  store.train_together(cells, over="map")
  assert len(list((store.path / "trained").iterdir())) == 2
  assert not (store.path / "runs").exists()
  alone = stores.Store(str(tmp_path / "alone"), driver.Stop())
  for _, cell, seed in cells[:2]:
    for each in (store, alone):
      each.run(cell, seed)
    ours, theirs = (
      each.record(cell, seed).curve("training") for each in (store, alone)
    )
    assert ours == theirs
  store.run(cells[2][1], 3)
  assert len(list((store.path / "trained").iterdir())) == 2


def test_a_missing_data_set_is_left_to_the_single_run(base, store, monkeypatch):
  gone = _with(base, dataset="gone.npz")
  asked = []
  setup = experiment.setup

  def asking(config, **keywords):
    asked.append(config.dataset)
    return setup(config, **keywords)

  monkeypatch.setattr(experiment, "setup", asking)
  store.train_together(
    (f"seed {seed}", plan.Cell(gone), seed) for seed in (0, 1)
  )
  assert asked == ["gone.npz"]
  with pytest.raises(errors.DataError, match=r"gone\.npz"):
    store.run(plan.Cell(gone), 0)


def test_one_that_diverges_among_others_is_noted(base, store, monkeypatch):
  wild = plan.Cell(_with(base, cleanse="", gamma=3.0))
  tame = plan.Cell(_with(base, cleanse=""))
  calm = experiment.setup

  def setup(config, **keywords):
    made = calm(config, **keywords)
    if config.gamma == 3.0:
      rate = made.federation.rate * float("inf")
      made = made._replace(federation=made.federation.replace(rate=rate))
    return made

  monkeypatch.setattr(experiment, "setup", setup)
  store.train_together([("wild", wild, 3), ("tame", tame, 3)])
  assert "not finite" in store.failure(wild, 3)
  assert store.failure(tame, 3) is None
  store.run(tame, 3)
  assert store.record(tame, 3) is not None


def test_a_damaged_result_is_named(base, store):
  cell = plan.Cell(_with(base, cleanse="", rounds=1))
  store.run(cell, 0)
  folder = Path(store.settings(cell, 0).workdir)
  whole = json.loads((folder / "results.json").read_text())
  for broken in ("{", "{}", json.dumps({**whole, "phases": [{}]})):
    (folder / "results.json").write_text(broken)
    with pytest.raises(errors.WorkdirError, match=r"is damaged.*delete it"):
      store.record(cell, 0)


def test_a_setting_at_its_default_does_not_change_the_hash(base):
  settings = base.identity()
  assert settings["nc_steps"] == configs.Config.defaults()["nc_steps"]
  without = {k: v for k, v in settings.items() if k != "nc_steps"}
  assert stores.digest(without) == stores.digest(settings)
  other = _with(base, nc_steps=7).identity()
  assert stores.digest(other) != stores.digest(settings)


def test_records_made_elsewhere_are_taken_over(base, store, tmp_path):
  cell = plan.Cell(_with(base, cleanse="fp"))
  elsewhere = tmp_path / "sweep" / "seed=2"
  alone = experiment.run(
    _with(cell.config, seed=2, workdir=str(elsewhere)), quiet=True
  )
  shutil.rmtree(elsewhere / "checkpoints")
  assert store.record(cell, 2) is None
  assert store.take_over(str(tmp_path / "sweep")) == 1
  assert store.record(cell, 2).results == alone
  assert store.record(cell, 2).curve("training")
  assert store.record(cell, 3) is None
  # It is a finished run like any other, and stays what it is.
  store.run(cell, 2)
  changed = json.dumps({**alone, "seed": 3})
  (elsewhere / "results.json").write_text(changed)
  assert store.take_over(str(tmp_path / "sweep")) == 1
  assert store.record(cell, 2).results == alone


def test_a_table_made_elsewhere_is_taken_over(base, store, tmp_path):
  cell = plan.Cell(_with(base, cleanse="fp"))
  after = plan.Cell(base, cell, lambda config, record: config)
  store.run(cell, 2)
  record = store.record(cell, 2)
  made = archive.dump("Title", "command", {("row", "main", 2): record}, [])
  (tmp_path / "made").mkdir()
  (tmp_path / "made" / "table-1.json").write_bytes(made)
  (tmp_path / "made" / "something-else.json").write_text("[1]")

  other = stores.Store(str(tmp_path / "other"), driver.Stop())
  assert other.record(cell, 2) is None
  assert other.take_over(str(tmp_path / "made")) == 1
  taken = other.record(cell, 2)
  # A folder here is nothing to those who read it there, and where training
  # ran on the same as the rest, that is said once.
  trained, *others = record.results["phases"]
  assert trained["environment"] == record.results["environment"]
  there = {
    key: value
    for key, value in trained.items()
    if key not in ("taken_from", "environment")
  }
  assert taken.results == {
    **{key: record.results[key] for key in ("environment", "config")},
    "phases": [there, *others],
  }
  assert b"taken_from" not in made
  assert taken.lines == []
  # A single file will do; and whose store cannot be written, is told so.
  one = stores.Store(str(tmp_path / "one"), driver.Stop())
  assert one.take_over(str(tmp_path / "made" / "table-1.json")) == 1
  (tmp_path / "file").write_text("")
  no = stores.Store(str(tmp_path / "file"), driver.Stop())
  with pytest.raises(
    errors.WorkdirError, match=r"file/tables/.* cannot be wri"
  ):
    no.take_over(str(tmp_path / "made"))
  # What needs curves does not make do with it, and its own run comes first.
  assert other.record(cell, 2, curves=True) is None
  assert other.settings(after, 2) is None
  other.run(cell, 2)
  assert other.record(cell, 2).curve("training")
  assert other.record(cell, 2, curves=True) is not None


@pytest.mark.parametrize(
  "files, message",
  [
    ({}, "no finished run"),
    ({"something-else.json": "{}"}, "no finished run"),
    ({"table-1.json": "{"}, "table-1.json: it is damaged"),
    ({"table-1.json": '{"shared": 1, "cells": [2]}'}, "it is damaged"),
    (
      {
        "beyond-2.json": '{"shared": {"config": {}, "environment": {}},'
        ' "cells": [{"config": {}, "environment": {}, "phases": []}]}'
      },
      "without a phase",
    ),
    ({"results.json": "{}", "config.json": "{}"}, "taken over"),
    ({"results.json": '{"phases": []}'}, "taken over"),
    ({"results.json": "[", "config.json": '{"data_sha256": ""}'}, "damaged"),
  ],
)
def test_what_is_no_record_is_refused(store, tmp_path, files, message):
  folder = tmp_path / "elsewhere"
  folder.mkdir()
  for name, text in files.items():
    (folder / name).write_text(text)
  with pytest.raises(errors.WorkdirError, match=message):
    store.take_over(str(folder))
