"""Many experiments at once leave what single runs of each leave."""

import dataclasses
import json
import os
from pathlib import Path
import shutil
import signal

from conftest import make_images
import jax
import numpy as np
import pytest

from fljax import config as configs
from fljax import console
from fljax import driver
from fljax import errors
from fljax import execution
from fljax import experiment
from fljax import programs
from fljax import summary
from fljax import sweep
from fljax import workdir as workdirs

SWEEP = "seed=0,1;pairs=3:1,2:1"
NAMES = ["seed=0,3-1", "seed=0,2-1", "seed=1,3-1", "seed=1,2-1"]


pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("sweep")
  images, labels = make_images(400)
  np.savez(path / "rows.npz", images=images, labels=labels)
  return path


def _config(folder, name, **changes):
  settings = {
    "dataset": str(folder / "rows.npz"),
    "model": "tiny",
    "num_clients": 3,
    "samples_per_client": 40,
    "validation_size": 30,
    "rounds": 3,
    "eval_every": 2,
    "checkpoint_every": 1,
    "fine_tune_rounds": 1,
    "victim_label": 3,
    "target_label": 1,
    "gamma": 2.0,
    "learning_rate": 0.2,
    "batch_size": 5,
    "delta_step": 2.0,
    "cleanse": "",
    "figures": False,
  }
  return configs.Config(workdir=str(folder / name), **{**settings, **changes})


def _left(folder):
  """What a run left, without times, and its last checkpoint's arrays."""
  results = json.loads((folder / "results.json").read_text())
  for phase in results["phases"]:
    phase.pop("seconds")
  checkpoints = workdirs.list_checkpoints(folder)
  stored = workdirs._checkpointer().restore(
    (checkpoints[-1][1] / "state").absolute()
  )
  return {
    "config": (folder / "config.json").read_text(),
    "metrics": (folder / "metrics.jsonl").read_text(),
    "results": results,
    "checkpoints": [path.name for _, path in checkpoints],
    "arrays": {name: np.asarray(array) for name, array in stored.items()},
  }


def _assert_same(one, two):
  arrays_one, arrays_two = one.pop("arrays"), two.pop("arrays")
  assert one == two
  assert arrays_one.keys() == arrays_two.keys()
  for name, array in arrays_one.items():
    np.testing.assert_array_equal(array, arrays_two[name], err_msg=name)


@pytest.fixture(scope="module")
def single(folder):
  """What a single run of each config leaves, run once per kind."""
  known = set()

  def left(name, **changes):
    parent = "-".join(["single", *map(str, changes.values())])
    config = sweep.expand(_config(folder, parent, **changes), SWEEP)[name]
    if config.workdir not in known:
      experiment.run(config, quiet=True)
      known.add(config.workdir)
    return _left(Path(config.workdir))

  return left


# --- which experiments -------------------------------------------------------


def test_every_combination_has_a_folder_of_its_own():
  common = configs.Config(workdir="runs/sweep")
  found = sweep.expand(common, "seed=0, 7;pairs=9:0,9:1;gamma=2,2.5")
  assert list(found)[:3] == [
    "seed=0,9-0,gamma=2",
    "seed=0,9-0,gamma=2.5",
    "seed=0,9-1,gamma=2",
  ]
  assert len(found) == 8
  assert found["seed=7,9-1,gamma=2.5"] == dataclasses.replace(
    common,
    workdir="runs/sweep/seed=7,9-1,gamma=2.5",
    seed=7,
    victim_label=9,
    target_label=1,
    gamma=2.5,
  )
  # Phases have commas of their own.
  found = sweep.expand(common, "cleanse=fp+ft+aw,aw,")
  assert [one.phases for one in found.values()] == [
    ("fp", "ft", "aw"),
    ("aw",),
    (),
  ]
  assert "cleanse=fp+ft+aw" in found
  found = sweep.expand(common, "attacker_avoids=3+17,,4")
  assert [one.avoided_neurons for one in found.values()] == [(3, 17), (), (4,)]


def test_a_folder_is_called_by_all_digits_that_a_number_needs():
  text = "learning_rate=0.1000001,0.1000002,0.3"
  assert [*sweep.expand(configs.Config(workdir="runs"), text)] == [
    *("learning_rate=0.1000001", "learning_rate=0.1000002"),
    "learning_rate=0.3",
  ]


def test_switches_and_paths_can_be_swept():
  text = "attackers_hold_target=true,False;dataset=mnist,/a/b.npz,c/b.npz"
  found = sweep.expand(configs.Config(workdir="runs"), text)
  assert [*found][:3] == [
    "attackers_hold_target=True,dataset=mnist",
    "attackers_hold_target=True,dataset=a-b.npz",
    "attackers_hold_target=True,dataset=c-b.npz",
  ]
  assert [one.dataset for one in found.values()][1:3] == ["/a/b.npz", "c/b.npz"]
  assert [one.attackers_hold_target for one in found.values()] == (
    [True] * 3 + [False] * 3
  )


@pytest.mark.parametrize(
  "text, message",
  [
    ("seed", "'seed' is not of the form 'seed=0,1,2'"),
    ("seed=0,1;", "'' is not of the form"),
    ("seed=", "'' is no value of seed; it must be an integer"),
    ("gamma=big", "'big' is no value of gamma; it must be a number"),
    (
      "attackers_hold_target=2",
      "is no value of attackers_hold_target; it must",
    ),
    ("seed=0,one", "'one' is no value of seed"),
    ("seed=0,1,0", "has seed=0 twice"),
    ("gamma=1,1.0", "has gamma=1 twice"),
    ("seed=0;seed=1", "has seed twice"),
    ("pairs=9", "'9' is no value of pairs; it must be two labels, as in 9:0"),
    ("pairs=9:0:1", "must be two labels"),
    ("pairs=1:1", "two different labels"),
    ("seed=-1", "--seed=-1 is out of range"),
    ("trigger=pixel2", "unknown --trigger=pixel2"),
    ("pairs=1:one", "'1:one' is no value of pairs; it must be two labels"),
    ("speed=1,2", "speed cannot be swept; there is no such setting"),
    (
      "victim_label=1",
      "victim_label cannot be swept; labels are swept as pairs",
    ),
    ("workdir=a,b", "workdir cannot be swept; it changes no result"),
    ("attack=backdoor+charm", "unknown --attack 'charm'"),
    ("model=tiny,huge", "unknown --model=huge"),
    ("cleanse=fp+aw,fp + aw", "has cleanse=fp+aw twice"),
    ("dataset=/a/b.npz,a/b.npz", "a folder would be called dataset=a-b.npz"),
    (f"dataset={250 * 'a'}.npz", "is too long for a folder's name"),
  ],
)
def test_a_bad_sweep_is_refused_in_one_sentence(text, message):
  with pytest.raises(errors.ConfigError) as caught:
    sweep.expand(configs.Config(), text)
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_does_not_fit_the_data_is_named(folder):
  found = sweep.expand(_config(folder, "misfit"), "pairs=3:1,3:9")
  with pytest.raises(
    errors.ConfigError, match=r"^3-9: --target_label=9 is out"
  ):
    sweep.run(found, quiet=True)
  assert not list((folder / "misfit").glob("*/config.json"))


def test_what_is_shared_depends_on_structure_and_data(folder):
  one = experiment.setup(_config(folder, "one"))
  other = _config(folder, "two", learning_rate=0.3)
  two = experiment.setup(other, like=one)
  assert two.dataset is one.dataset and two.test is one.test
  assert two.block is not one.block
  twin = dataclasses.replace(other, seed=7, cleanse="fp")
  assert experiment.closest(twin, [one, two]) is two
  three = experiment.setup(twin, like=two)
  assert three.block is two.block and three.model is two.model
  assert experiment.closest(_config(folder, "n", rounds=9), [one, two]) is one
  images, labels = make_images(400)
  np.savez(folder / "others.npz", images=images, labels=labels)
  elsewhere = _config(folder, "three", dataset=str(folder / "others.npz"))
  assert experiment.closest(elsewhere, [one, two]) is None
  with pytest.raises(ValueError, match="different data"):
    experiment.setup(elsewhere, like=one)


# --- the same results --------------------------------------------------------


def test_one_by_one_in_one_program_leaves_the_bits_of_single_runs(
  folder, single, monkeypatch
):
  made = []
  setup = experiment.setup
  loads = []
  load = experiment.data.load

  def counting(*arguments, **options):
    made.append(setup(*arguments, **options))
    return made[-1]

  def loading(*arguments, **options):
    loads.append(arguments)
    return load(*arguments, **options)

  monkeypatch.setattr(experiment, "setup", counting)
  monkeypatch.setattr(experiment.data, "load", loading)
  config = _config(folder, "map", cleanse="fp,ft,aw")
  outcome = sweep.run(sweep.expand(config, SWEEP), quiet=True, over="map")
  monkeypatch.undo()
  assert list(outcome.results) == NAMES and not outcome.failed
  # One data set; one program of rounds, compiled once for all fine-tuning.
  assert len(made) == 4 and len(loads) == 1
  assert len({id(one.block) for one in made}) == 1
  assert len({id(one.test) for one in made}) == 1
  assert made[0].block._cache_size() == 1
  for name in (NAMES[0], NAMES[3]):
    _assert_same(_left(folder / "map" / name), single(name, cleanse="fp,ft,aw"))
  text = summary.compared(outcome.results)
  assert all(name in text for name in (*NAMES, "fp+ft", "all"))
  # Complete, it is not run again.
  monkeypatch.setattr(experiment, "setup", None)
  assert sweep.run(sweep.expand(config, SWEEP), quiet=True) == outcome


@pytest.mark.parametrize(
  "changes", [{}, {"model": "tiny_bn"}], ids=["tiny", "tiny_bn"]
)
def test_all_at_once_agrees_with_single_runs_to_rounding(
  folder, single, changes
):
  config = _config(folder, "-".join(["vmap", *changes.values()]), **changes)
  outcome = sweep.run(sweep.expand(config, SWEEP), quiet=True, over="vmap")
  assert list(outcome.results) == NAMES
  for name in (NAMES[0], NAMES[3]):
    one = _left(Path(config.workdir) / name)
    two = single(name, **changes)
    assert one["checkpoints"] == two["checkpoints"]
    for key, array in one["arrays"].items():
      np.testing.assert_allclose(
        array, two["arrays"][key], rtol=1e-4, atol=1e-5, err_msg=key
      )
    lines = [
      [json.loads(line) for line in left["metrics"].splitlines()]
      for left in (one, two)
    ]
    assert [line["round"] for line in lines[0]] == [2, 3]
    for ours, theirs in zip(*lines, strict=True):
      assert ours.keys() == theirs.keys()
      np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


def test_clients_decide_in_a_sweep_as_in_single_runs(folder, single):
  deciding = {
    "cleanse": "fp,ft,aw",
    "decide_by": "clients",
    "client_holdout": 0.2,
  }
  config = _config(folder, "deciding", **deciding)
  sweep.run(sweep.expand(config, SWEEP), quiet=True, over="map")
  left = _left(folder / "deciding" / NAMES[3])
  _assert_same(left, single(NAMES[3], **deciding))
  assert '"client_holdout": 0.2' in left["config"]


def test_what_differs_in_cleansing_alone_is_trained_once(
  folder, single, monkeypatch, capsys
):
  trained = []
  train = driver.Driver._train

  def counting(self):
    trained.append(self.workdir.path.name)
    train(self)

  monkeypatch.setattr(driver.Driver, "_train", counting)
  config = _config(folder, "cleansings")
  outcome = sweep.run(sweep.expand(config, "cleanse=fp,aw;pairs=2:1"))
  names = ["cleanse=fp,2-1", "cleanse=aw,2-1"]
  assert [*outcome.results] == names and trained == names[:1]
  # What is complete already serves what is asked for later.
  more = sweep.run(sweep.expand(config, "cleanse=ft,aw;pairs=2:1"))
  assert [*more.results] == ["cleanse=ft,2-1", "cleanse=aw,2-1"]
  assert trained == names[:1]
  assert "1 take over the trained model" in capsys.readouterr().err
  alone = _config(folder, "alone", cleanse="aw", victim_label=2)
  theirs = experiment.run(alone, quiet=True)["phases"]
  for one, two in zip(outcome.results[names[1]]["phases"], theirs, strict=True):
    for each in (one, two):
      each.pop("seconds")
      each.pop("taken_from", None)
    assert one == two


def test_other_rules_and_data_leave_what_single_runs_leave(
  folder, monkeypatch, capsys
):
  images, labels = make_images(300)
  other = folder / "less.npz"
  np.savez(other, images=images, labels=labels)
  loads, forgotten = [], []
  load = experiment.data.load

  def loading(*arguments, **options):
    loads.append(arguments[0])
    return load(*arguments, **options)

  monkeypatch.setattr(experiment.data, "load", loading)
  clear = jax.clear_caches

  def clearing():
    forgotten.append(1)
    clear()

  monkeypatch.setattr(programs, "FORGET_EVERY", 9)
  monkeypatch.setattr(jax, "clear_caches", clearing)
  # A rule with a state, and attackers who remember.
  config = _config(
    folder, "kinds", rounds=2, cleanse="fp", attacker_neurotoxin=0.1
  )
  text = (
    "aggregation=mean,flame;seed=0,1;cleanse=fp,aw;"
    f"dataset={config.dataset},{other}"
  )
  found = sweep.expand(config, text)
  outcome = sweep.run(found, over="map")
  said = capsys.readouterr().err
  assert [*outcome.results] == [*found] and len(found) == 16
  assert not outcome.failed
  assert "8 take over the trained model of another one" in said
  assert "they are of 4 kinds, one after the other" in said
  assert said.count("2 experiments are trained as one program") == 4
  assert sorted(loads) == sorted([config.dataset, str(other)])
  assert len(forgotten) == 1
  monkeypatch.undo()
  text = summary.compared(outcome.results)
  assert "aggregation=flame cleanse=aw" in text
  for name, one in found.items():
    # One that was trained beside another, and one of a taken model.
    if one.seed == 1 and one.dataset == str(other) and "=flame" in name:
      alone = dataclasses.replace(one, workdir=f"{one.workdir} alone")
      experiment.run(alone, quiet=True)
      ours, theirs = (
        json.loads((Path(of.workdir) / "results.json").read_text())["phases"]
        for of in (one, alone)
      )
      for phase in (*ours, *theirs):
        phase.pop("seconds")
        phase.pop("taken_from", None)
      assert ours == theirs


def test_a_finished_run_without_its_model_is_no_source(folder):
  config = _config(folder, "no model", rounds=1)
  sweep.run(sweep.expand(config, "cleanse=,fp"), quiet=True)
  for gone in Path(config.workdir).glob("*/checkpoints"):
    shutil.rmtree(gone)
  more = sweep.run(sweep.expand(config, "cleanse=,fp,aw"), quiet=True)
  assert [*more.results] == ["cleanse=", "cleanse=fp", "cleanse=aw"]
  ours, theirs = (
    more.results[name]["phases"][0] for name in ("cleanse=aw", "cleanse=")
  )
  assert ours["test_accuracy"] == theirs["test_accuracy"]
  assert "taken_from" not in ours


def test_a_model_that_diverges_is_nobodys(folder):
  config = _config(folder, "nobodys", learning_rate=1e30)
  outcome = sweep.run(sweep.expand(config, "cleanse=fp,aw"), quiet=True)
  assert not outcome.results
  assert [*outcome.failed] == ["cleanse=fp", "cleanse=aw"]


def test_what_is_one_until_attackers_begin_is_trained_once(
  folder, monkeypatch, capsys
):
  def config(name):
    return _config(folder, name, attack_start=2, checkpoint_every=2)

  text = "pairs=3:1,3:2,2:1"
  alone = sweep.expand(config("late alone"), text)
  for name in ("3-2", "2-1"):
    experiment.run(alone[name], quiet=True)
  setup, lengths = experiment.setup, []

  def counting(*arguments, like=None, **options):
    made = setup(*arguments, like=like, **options)
    if like is not None:
      return made

    def block(state, federation, key, length, examples=None):
      if isinstance(length, int):
        lengths.append(length)
      return made.block(state, federation, key, length, examples)

    return made._replace(block=block)

  monkeypatch.setattr(experiment, "setup", counting)
  together = sweep.expand(config("late"), text)
  sweep.run(together, over="map")
  assert "2 experiments are one until attackers" in capsys.readouterr().err
  # Not for the third, whose attacker has other labels.
  assert lengths == [2]
  for name in ("3-2", "2-1"):
    ours, theirs = (Path(found[name].workdir) for found in (together, alone))
    _assert_same(_left(ours), _left(theirs))


def test_whose_images_depend_on_the_target_are_trained_apart(folder, capsys):
  config = _config(
    folder,
    "holding",
    attack_start=2,
    attackers_hold_target=True,
    labels_per_client=2,
    rounds=2,
    cleanse="",
  )
  sweep.run(sweep.expand(config, "pairs=3:1,3:2"), over="map")
  assert "are one until attackers" not in capsys.readouterr().err


def test_stopped_before_attackers_begin_it_goes_on(folder, monkeypatch):
  config = _config(
    folder,
    "late stop",
    attack_start=2,
    rounds=4,
    eval_every=1,
    checkpoint_every=9,
  )
  found = sweep.expand(config, "attack_rounds=0,1")
  log = driver.Driver.log_training

  def stopping(self, done, metrics):
    self.stop.signal = signal.SIGTERM if done == 1 else None
    return log(self, done, metrics)

  monkeypatch.setattr(driver.Driver, "log_training", stopping)
  with pytest.raises(errors.InterruptedRunError, match=r"SIGTERM.*late stop\."):
    sweep.run(found, quiet=True, over="map")
  monkeypatch.undo()
  for one in found.values():
    ((_, saved),) = workdirs.list_checkpoints(Path(one.workdir))
    progress = json.loads((saved / "progress.json").read_text())
    assert progress["metrics_lines"] == 1
  sweep.run(found, quiet=True, over="map")
  alone = dataclasses.replace(
    found["attack_rounds=1"], workdir=str(folder / "late stop alone")
  )
  experiment.run(alone, quiet=True)
  ours, theirs = (
    _left(Path(one.workdir)) for one in (found["attack_rounds=1"], alone)
  )
  # It saved once more.
  assert ours.pop("checkpoints") != theirs.pop("checkpoints")
  _assert_same(ours, theirs)


def test_without_attackers_nothing_begins_together(folder, capsys):
  config = _config(folder, "nobody", num_attackers=0, attack_start=1, rounds=1)
  sweep.run(sweep.expand(config, "gamma=1,2"))
  assert "until attackers begin" not in capsys.readouterr().err


def test_the_plan_chooses(folder, monkeypatch, capsys):
  plan = execution.plan_for()._replace(sweep="vmap")
  monkeypatch.setitem(execution.PLANS, jax.default_backend(), plan)
  found = sweep.expand(_config(folder, "plan", rounds=1), "seed=0,1")
  sweep.run(found)
  assert "as one program, all at once" in capsys.readouterr().err


# --- when memory does not allow ----------------------------------------------


@pytest.mark.parametrize("moment", ["estimate", "first block", "second block"])
def test_what_does_not_fit_runs_one_after_another(
  folder, single, monkeypatch, capsys, moment
):
  compile_ = sweep._compile
  calls = 0

  def compiling(*arguments):
    program = compile_(*arguments)

    def run(*arguments):
      nonlocal calls
      calls += 1
      if calls == (1 if moment == "first block" else 2):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
      return program(*arguments)

    return run

  if moment == "estimate":
    monkeypatch.setattr(sweep, "_free_memory", lambda: 1000)
  else:
    monkeypatch.setattr(sweep, "_compile", compiling)
  found = sweep.expand(_config(folder, f"memory {moment}"), SWEEP)
  outcome = sweep.run(found)
  said = capsys.readouterr().err
  assert said.count("the experiments run one after another: ") == 1
  assert list(outcome.results) == NAMES
  for name in (NAMES[0], NAMES[3]):
    _assert_same(_left(Path(found[name].workdir)), single(name))


def test_another_error_is_not_taken_for_lack_of_memory(folder, monkeypatch):
  def failing(*arguments):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")

  monkeypatch.setattr(sweep, "_compile", failing)
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    sweep.run(sweep.expand(_config(folder, "internal"), "seed=0,1"), quiet=True)


def test_clients_of_unequal_size_run_one_after_another(folder, capsys):
  config = _config(folder, "dirichlet", partition="dirichlet", rounds=1)
  outcome = sweep.run(sweep.expand(config, "seed=0,1"))
  assert "unequal numbers of images" in capsys.readouterr().err
  assert len(outcome.results) == 2


def test_those_that_can_be_stacked_are_one_program(folder, capsys):
  """A blended trigger has an opacity where others have a mask."""
  config = _config(folder, "triggers", rounds=1, cleanse="")
  text = "trigger=pixel3,blended;seed=0,1"
  outcome = sweep.run(sweep.expand(config, text))
  told = capsys.readouterr().err
  assert told.count("2 experiments are trained as one program") == 2
  assert "one after another" not in told
  assert len(outcome.results) == 4 and not outcome.failed


# --- interruptions -----------------------------------------------------------


class _KilledError(BaseException):
  pass


@pytest.mark.parametrize("moment", [2, 6])
def test_a_killed_sweep_goes_on_to_the_same_bits(
  folder, single, monkeypatch, moment
):
  """Killed when some have saved their checkpoint and others have not."""
  found = sweep.expand(_config(folder, f"killed {moment}"), SWEEP)
  save = workdirs.Workdir.save
  count = 0

  def dying(self, *arguments, **options):
    nonlocal count
    count += 1
    if count == moment:
      raise _KilledError
    return save(self, *arguments, **options)

  with monkeypatch.context() as patch:
    patch.setattr(workdirs.Workdir, "save", dying)
    with pytest.raises(_KilledError):
      sweep.run(found, quiet=True)
  # One of them may go on alone, too.
  experiment.run(found[NAMES[0]], quiet=True)
  outcome = sweep.run(found, quiet=True)
  assert list(outcome.results) == NAMES
  for name in (NAMES[0], NAMES[3]):
    _assert_same(_left(Path(found[name].workdir)), single(name))


def test_a_signal_saves_all_and_the_sweep_goes_on(folder, single, monkeypatch):
  found = sweep.expand(_config(folder, "stopped"), SWEEP)
  advance = console.Console.advance

  def stopping(self, done, *arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    advance(self, done, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(console.Console, "advance", stopping)
    with pytest.raises(errors.InterruptedRunError, match=r"SIGTERM.*stopped"):
      sweep.run(found, quiet=True)
  for config in found.values():
    progress = workdirs.read_progress(
      workdirs.list_checkpoints(Path(config.workdir))[-1][1]
    )
    assert progress.phase == "training" and not progress.complete
  sweep.run(found, quiet=True)
  for name in (NAMES[0], NAMES[3]):
    _assert_same(_left(Path(found[name].workdir)), single(name))


def test_a_trained_model_that_fits_one_of_them_begins_none(folder):
  trained = _config(folder, "trained", rounds=1)
  experiment.run(trained, quiet=True)
  taking = _config(folder, "taking", rounds=1, trained_in=trained.workdir)
  with pytest.raises(errors.WorkdirError, match=r"^seed=1: .*seed: 0 there, 1"):
    sweep.run(sweep.expand(taking, "seed=0,1"), quiet=True)
  left = [path for path in Path(taking.workdir).rglob("*") if path.is_file()]
  # The folders are free for the same command, mended.
  assert {path.name for path in left} <= {".lock"}


def test_finished_runs_of_other_data_are_not_averaged_with(folder):
  rows = np.load(folder / "rows.npz")
  own = folder / "changing.npz"
  np.savez(own, **rows)
  config = _config(folder, "finished", rounds=1, dataset=str(own))
  sweep.run(sweep.expand(config, "seed=0"), quiet=True)
  changed = {**rows}
  images = next(key for key in changed if "images" in key)
  changed[images] = changed[images][::-1]
  np.savez(own, **changed)
  for seeds in ("0", "0,1"):
    with pytest.raises(errors.WorkdirError, match=r"seed=0.*data_sha256"):
      sweep.run(sweep.expand(config, f"seed={seeds}"), quiet=True)
  alone = sweep.expand(config, "seed=0")["seed=0"]
  with pytest.raises(errors.WorkdirError, match="data_sha256"):
    experiment.run(alone, quiet=True)
  own.unlink()  # Results outlive their data.
  assert experiment.run(alone, quiet=True)["phases"]
  # And so does the report, but for the trigger on an image.
  drawn = dataclasses.replace(alone, figures=True)
  assert experiment.run(drawn, quiet=True)["phases"]
  figures = {path.name for path in Path(alone.workdir, "figures").iterdir()}
  assert "training.png" in figures and "trigger.png" not in figures


def test_a_sweep_takes_over_what_another_has_trained(folder):
  trained = _config(folder, "before", rounds=1)
  sweep.run(sweep.expand(trained, "pairs=2:0,2:1"), quiet=True)
  taking = _config(folder, "after", rounds=1, trained_in=trained.workdir)
  found = sweep.expand(taking, "cleanse=aw,fp;pairs=2:1,2:0")
  assert not sweep.run(found, quiet=True).failed
  for config in found.values():
    left = Path(config.workdir) / "results.json"
    pair = f"{config.victim_label}-{config.target_label}"
    before = Path(trained.workdir) / pair / "results.json"
    first, second = (
      json.loads(path.read_text())["phases"][0] for path in (before, left)
    )
    # Not the sweep's folder, but that of the run in it.
    assert second == {**first, "taken_from": str(before.parent)}
  other = sweep.expand(
    _config(folder, "third", rounds=1, trained_in=trained.workdir), "seed=1"
  )
  with pytest.raises(errors.WorkdirError, match=r"models that were trained"):
    sweep.run(other, quiet=True)


def test_one_that_diverges_does_not_stop_the_others(
  folder, single, monkeypatch
):
  compile_ = sweep._compile

  def compiling(*arguments):
    program = compile_(*arguments)

    def run(states, rows, lengths, common):
      states, metrics = program(states, rows, lengths, common)
      bad = metrics.bad_round.at[1].set(states.round[1])
      return states, metrics.replace(bad_round=bad)

    return run

  monkeypatch.setattr(sweep, "_compile", compiling)
  found = sweep.expand(_config(folder, "diverged"), SWEEP)
  outcome = sweep.run(found, quiet=True)
  assert list(outcome.failed) == [NAMES[1]]
  assert "not finite in round 1" in str(outcome.failed[NAMES[1]])
  assert list(outcome.results) == [NAMES[0], *NAMES[2:]]
  assert not (Path(found[NAMES[1]].workdir) / "results.json").exists()
  for name in (NAMES[0], NAMES[3]):
    _assert_same(_left(Path(found[name].workdir)), single(name))
