import dataclasses
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

from absl import flags
import chex
from conftest import NUM_CLASSES
from conftest import ROOT
from conftest import TINY_SETTINGS
from conftest import make_images
from conftest import write_images
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import attacks
from fljax import cleansing
from fljax import config as configs
from fljax import errors
from fljax import evaluate
from fljax import experiment
from fljax import models
from fljax import parallel
from fljax import population as populations
from fljax import summary
from fljax import workdir as workdirs
from fljax.baselines import feature_shift
from fljax.baselines import phases
from fljax.cleanse import pipeline


def _metrics(folder):
  text = (Path(folder) / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
  return write_images(tmp_path_factory.mktemp("data") / "rows.npz")


pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def config(own_data, tmp_path):
  return configs.Config(
    workdir=str(tmp_path / "run"),
    dataset=str(own_data),
    **TINY_SETTINGS,
  )


def _with(config, **changes):
  return dataclasses.replace(config, **changes)


def _final(config):
  """Results without times and origin, and the final parameters."""
  workdir = workdirs.Workdir(config.workdir, config.identity())
  with workdir:
    results = workdir.results()
    lines = workdir.metrics()
    state, _ = workdir.restore(experiment.setup(config).init_state())
  for phase in results["phases"]:
    phase.pop("seconds")
    phase.pop("taken_from", None)
  return results, lines, jax.tree.map(np.asarray, state)


def _assert_same(one, two):
  assert one[0] == two[0] and one[1] == two[1]
  for a, b in zip(
    jax.tree.leaves(one[2]), jax.tree.leaves(two[2]), strict=True
  ):
    np.testing.assert_array_equal(a, b)


# --- what a run leaves -------------------------------------------------------


def test_a_run_leaves_what_is_promised(config):
  config = _with(config, figures=True)
  results = experiment.run(config, quiet=True)
  names = [phase["name"] for phase in results["phases"]]
  assert names == ["training", "fp", "fp+aw", "fp+ft", "all"]
  for phase in results["phases"]:
    assert 0 <= phase["test_accuracy"] <= 1
    assert 0 <= phase["attack_success"] <= 1
    assert phase["seconds"] > 0
  training, fp, fp_aw, ft, whole = results["phases"]
  assert training["test_accuracy"] > 0.9
  assert 0 <= fp["pruned_neurons"] <= fp["neurons"] == 8
  assert ft["fine_tune_rounds"] == 3 and 0 <= ft["kept_round"] <= 3
  for phase in (fp_aw, whole):
    assert phase["zeroed_weights"] >= 0 and "delta" in phase
  assert results["seed"] == 0 and results["config"] == config.identity()
  assert results["environment"]["backend"] == jax.default_backend()
  assert results["environment"]["processor"]

  folder = experiment.workdirs.Path(config.workdir)
  assert json.loads((folder / "results.json").read_text()) == results
  lines = _metrics(folder)
  phases = [line["phase"] for line in lines]
  assert phases.count("training") == 3 and phases.count("fp") == 9
  assert phases.count("fp+ft") == 4
  tuning = [line for line in lines if line["phase"] == "fp+ft"]
  assert [line["round"] for line in tuning] == [0, 1, 2, 3]
  assert ["loss" in line for line in tuning] == [False, True, True, True]
  kept = tuning[ft["kept_round"]]
  assert kept["accuracy"] == max(line["accuracy"] for line in tuning)
  assert kept["test_accuracy"] == pytest.approx(ft["test_accuracy"])
  assert [line["round"] for line in lines[:3]] == [2, 4, 6]
  figures = {path.name for path in (folder / "figures").iterdir()}
  assert figures == {
    "trigger.png",
    "training.png",
    "pruning_fp.png",
    "delta_fp_aw.png",
    "fp_ft.png",
    "delta_all.png",
  }
  assert all(
    path.read_bytes().startswith(b"\x89PNG")
    for path in (folder / "figures").iterdir()
  )
  page = (folder / "report.html").read_text()
  assert page.count("data:image/png;base64,") == 6
  assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
  "cleanse, names",
  [
    ("", ["training"]),
    ("aw", ["training", "aw"]),
    ("fp,aw", ["training", "fp", "fp+aw"]),
    ("ft,fp", ["training", "ft", "ft+fp"]),
    ("aw,ft,fp", ["training", "aw", "aw+ft", "aw+ft+fp"]),
    ("aw,ft,aw", ["training", "aw", "aw+ft", "aw+ft+aw"]),
  ],
)
def test_phases_are_chosen_and_ordered(config, cleanse, names):
  config = _with(config, cleanse=cleanse, rounds=2)
  results = experiment.run(config, quiet=True)
  assert [phase["name"] for phase in results["phases"]] == names


@pytest.mark.parametrize("cleanse", ["fp,ft", "aw,ft", "ft"])
def test_fine_tuning_ends_when_enough_is_recovered(config, cleanse):
  """With everything allowed before any round, with nothing never early."""
  for drop, expected in ((1.0, 0), (-1.0, 3)):
    config = _with(
      config,
      cleanse=cleanse,
      rounds=2,
      fine_tune_rounds=3,
      fine_tune_patience=0,
      fine_tune_drop=drop,
      workdir=f"{config.workdir}{drop:g}",
    )
    tuned = experiment.run(config, quiet=True)["phases"][-1]
    assert tuned["fine_tune_rounds"] == expected


@pytest.mark.parametrize("cleanse", ["ft,aw,ft", "fst,ft", "fp,ft"])
def test_what_is_enough_is_relative_to_the_trained_model(
  config, cleanse, monkeypatch
):
  asked = []
  fine_tune = pipeline.fine_tune

  def spied(*arguments, enough, **options):
    asked.append(enough)
    return fine_tune(*arguments, enough=enough, **options)

  monkeypatch.setattr(pipeline, "fine_tune", spied)
  config = _with(
    config, cleanse=cleanse, fine_tune_drop=0.01, server_epochs=1, rounds=4
  )
  experiment.run(config, quiet=True)
  _, lines, _ = _final(config)
  trained = [line for line in lines if line["phase"] == "training"][-1]
  assert len(asked) == cleanse.split(",").count("ft")
  before = _final(config)[0]["phases"][0]
  assert before["accuracy"] == pytest.approx(trained["accuracy"])
  # Of the images that decide in fine-tuning.
  reference = before["accuracy"]
  if cleanse == "fst,ft":
    reference = before["accuracy_left_out"]
    # So many images are left out, of which that is the share.
    left = round(0.2 * config.validation_size)
    assert reference * left == pytest.approx(round(reference * left))
  assert asked == [pytest.approx(reference - 0.01)] * len(asked)


@pytest.mark.parametrize("holdout", [0.25, 0.0])
def test_what_the_server_trains_on_does_not_decide_afterwards(
  config, holdout, monkeypatch
):
  seen = {}
  for module, name in (
    (phases, "shift_features"),
    (pipeline, "validation_curves"),
    (pipeline, "fine_tune"),
  ):
    whole = getattr(module, name)

    def spied(*arguments, name=name, whole=whole, **options):
      images = options["examples"] if "examples" in options else arguments[-1]
      images = images["validation"] if isinstance(images, dict) else images
      seen.setdefault(name, []).append(np.asarray(images.mask).sum())
      return whole(*arguments, **options)

    monkeypatch.setattr(module, name, spied)
  own = config.validation_size
  config = _with(
    config,
    cleanse="fp,fst,ft,aw",
    server_holdout=holdout,
    server_epochs=1,
    rounds=1,
    fine_tune_rounds=1,
  )
  experiment.run(config, quiet=True)
  left = round(holdout * own) or own
  assert seen == {
    # Before the server has trained, everything decides.
    "validation_curves": [own, left],
    "shift_features": [own - left or own],
    "fine_tune": [left],
  }
  alone = _with(
    config, workdir=config.workdir + "-alone", cleanse="fst,fine-pruning"
  )
  experiment.run(alone, quiet=True)
  assert seen["shift_features"][1:] == [own]


def test_fine_tuning_may_aggregate_in_its_own_way(config):
  config = _with(config, rounds=2, cleanse="ft", fine_tune_rounds=1)
  plain = experiment.setup(config)
  assert plain.tuning_block is plain.block
  robust = _with(
    config,
    fine_tune_aggregation="median",
    workdir=config.workdir + "-robust",
  )
  made = experiment.setup(robust, like=plain)
  assert made.block is plain.block is not made.tuning_block
  again = experiment.setup(robust, like=made)
  assert again.tuning_block is made.tuning_block
  back = experiment.setup(config, like=made)
  assert back.tuning_block is back.block

  experiment.run(config, quiet=True)
  experiment.run(robust, quiet=True)
  (_, lines, tuned), (_, robust_lines, robust_tuned) = map(
    _final, (config, robust)
  )
  training = [line for line in lines if line["phase"] == "training"]
  assert training and training == robust_lines[: len(training)]
  kernels = [
    models.target_kernel(plain.model, state.params)
    for state in (tuned, robust_tuned)
  ]
  assert np.abs(kernels[0] - kernels[1]).max() > 1e-6


def test_runs_of_one_structure_share_their_programs(config):
  first = experiment.setup(config)
  other = experiment.setup(_with(config, seed=3, gamma=1.5, cleanse="ft"))
  assert other.block is first.block and other.model is first.model
  hotter = experiment.setup(_with(config, learning_rate=0.3))
  assert hotter.block is not first.block and hotter.model is first.model
  raw = experiment.setup(_with(config, normalisation="unit"))
  assert raw.block is not first.block and raw.model is not first.model


def test_attackers_hide_in_training_or_in_fine_tuning_alone(
  config, monkeypatch
):
  hidden = []

  def within_benign(spread):
    def updates(updates, cohort, active):
      del cohort, active
      hidden.append(spread)
      return updates

    return attacks.Attack(updates=updates, rowwise=False)

  monkeypatch.setattr(attacks, "within_benign", within_benign)
  hiding = experiment.setup(_with(config, fine_tune_stealth=1.5))
  for block, expected in ((hiding.block, []), (hiding.tuning_block, [1.5])):
    state = hiding.init_state()
    jax.eval_shape(block, state, hiding.federation, hiding.key, 1, {})
    assert sorted(set(hidden)) == expected
  # In training as well, and there otherwise.
  hidden.clear()
  both = experiment.setup(
    _with(config, attacker_stealth=0.5, fine_tune_stealth=1.5)
  )
  for block, expected in ((both.block, [0.5]), (both.tuning_block, [0.5, 1.5])):
    state = both.init_state()
    jax.eval_shape(block, state, both.federation, both.key, 1, {})
    assert sorted(set(hidden)) == expected
  for alike in (0.0, 0.5):
    made = experiment.setup(
      _with(config, attacker_stealth=0.5, fine_tune_stealth=alike)
    )
    assert made.tuning_block is made.block
  nobody = _with(config, fine_tune_stealth=1.5, num_attackers=0)
  made = experiment.setup(nobody)
  assert made.tuning_block is made.block


def test_the_same_config_gives_the_same_bits(config):
  experiment.run(config, quiet=True)
  again = _with(config, workdir=config.workdir + "2")
  experiment.run(again, quiet=True)
  _assert_same(_final(config), _final(again))
  other = _with(config, workdir=config.workdir + "3", seed=1)
  experiment.run(other, quiet=True)
  assert _final(other)[1] != _final(config)[1]


@given(scale=st.floats(1e-3, 1e3), clip=st.floats(0.1, 10))
def test_clipped_gradients_keep_their_direction(scale, clip):
  config = configs.Config(gradient_clip=clip)
  gradients = {"a": scale * jnp.arange(3.0), "b": scale * jnp.ones((2, 2))}
  length = 3 * scale
  clipped = experiment.optimizer(config)
  steps, _ = clipped.update(gradients, clipped.init(gradients), gradients)
  factor = -config.learning_rate * min(1, clip / length)
  expected = jax.tree.map(lambda leaf: factor * leaf, gradients)
  chex.assert_trees_all_close(steps, expected, rtol=1e-5)


@pytest.mark.parametrize(
  "changes",
  [
    {"partition": "iid", "local_steps": 2, "final_learning_rate": 0.01},
    {
      "partition": "dirichlet",
      "aggregation": "weighted",
      "momentum": 0.5,
      "weight_decay": 1e-3,
      "last_conv_l2": 0.01,
      "gradient_clip": 1.0,
    },
    {
      "clients_per_round": 2,
      "gamma": 1.5,
      "pruning": "rap",
      "weight_statistics": "all",
      "delta_start": 10.0,
    },
    {
      "model": "tiny_bn",
      "trigger": "blended",
      "attacker_neurotoxin": 0.1,
      "fine_tune_aggregation": "flame",
      "fine_tune_stealth": 1.0,
    },
    {
      "num_attackers": 2,
      "trigger": "pixel1",
      "attack_start": 3,
      "attack_rounds": 1,
      "attacker_avoids": "0,3",
    },
    {
      "num_attackers": 0,
      "local_epochs": 2,
      "server_rate": 0.5,
      "initialisation": "he",
    },
    {"validation_size": 0, "attacker_reports": "stop_pruning"},
    {
      "validation_size": 0,
      "client_holdout": 0.3,
      "partition": "dirichlet",
      "attacker_reports": "ruin_model",
    },
    {"pruning": "gain", "validation_size": 0, "attacker_gain": 1.0},
    {
      "attack_images": "others",
      "client_chunk": 0,
      "conv": "lax",
      "attacker_reports": "promote",
      "attacker_limit": 2.0,
    },
    {
      "attacker_latent": 1.0,
      "attacker_latent_at": "activations",
      "attackers_hold_target": True,
      "precision": "bfloat16",
      "cleanse": "fst",
    },
    {"cleanse": "fp,nc-prune,fine-pruning", "nc_steps": 3},
    {"cleanse": "fp,nc-unlearn,fst,aw", "nc_steps": 3, "server_epochs": 1},
    {"cleanse": "nc-oracle", "nc_steps": 2, "validation_size": 0},
    {
      "cleanse": "fp,ffst,aw",
      "fst_rounds": 2,
      "validation_size": 0,
      "fine_tune_aggregation": "median",
    },
    {
      "attacker_learning_rate": 0.4,
      "fine_tune_learning_rate": 0.02,
      "fine_tune_gamma": 2.0,
      "fine_tune_stealth": 1.0,
      "fine_tune_aggregation": "trimmed_mean",
    },
    {
      "model": "tiny_bn",
      "partition": "dirichlet",
      "momentum": 0.5,
      "weight_decay": 1e-3,
      "gamma": 4.0,
    },
    {
      "model": "tiny_bn",
      "precision": "bfloat16",
      "fine_tune_aggregation": "median",
      "cleanse": "fp,ft,fst,nc-unlearn",
      "server_epochs": 1,
      "nc_steps": 3,
    },
  ],
  ids=lambda changes: ",".join(changes),
)
def test_every_way_of_running_ends_well(config, changes):
  results = experiment.run(_with(config, **changes), quiet=True)
  last = changes.get("cleanse", "all").replace(",", "+")
  assert [phase["name"] for phase in results["phases"]][-1] == last
  success = [phase["attack_success"] for phase in results["phases"]]
  assert all(
    (value is None) == (changes.get("num_attackers") == 0) for value in success
  )


def test_clients_shift_features_as_the_settings_say(config, monkeypatch):
  """From the trained model's last layer; nothing of it is left in the state."""
  told = []
  by_clients = feature_shift.by_clients

  def spied(model):
    extra = by_clients(model)

    def gradients(gradients, said):
      before, weight = said
      jax.debug.callback(
        lambda *seen: told.append([np.asarray(one) for one in seen]),
        before,
        weight,
      )
      return extra.gradients(gradients, said)

    return extra._replace(gradients=gradients)

  monkeypatch.setattr(feature_shift, "by_clients", spied)
  monkeypatch.setattr(cleansing, "_MOST_SHOWN", 1)
  experiment._block.cache_clear()
  config = _with(config, cleanse="ffst", fst_rounds=2, rounds=4, devices=1)
  kernels = []
  for weight in (0.1, 3.0):
    changed = _with(
      config, workdir=f"{config.workdir}-{weight}", fst_weight=weight
    )
    told.clear()
    results = experiment.run(changed, quiet=True)
    assert results["phases"][-1]["fine_tune_rounds"] == 2
    # TA and AA are for the figure; the server's accuracy decides.
    lines = [
      line for line in _metrics(changed.workdir) if line["phase"] == "ffst"
    ]
    assert ["test_accuracy" in line for line in lines] == [True, False, True]
    assert all("accuracy" in line for line in lines)
    made, trained = experiment.load(changed.workdir, phase="training")
    path = models.classifier_path(made.model, trained.params)
    before = models.head_leaf(trained.params, path)
    assert told
    for seen, weighed in told:
      np.testing.assert_array_equal(seen, before)
      assert weighed == np.float32(weight)
    _, after = experiment.load(changed.workdir)
    assert after.told == () and trained.told == ()
    kernels.append(models.head_leaf(after.params, path))
  experiment._block.cache_clear()
  away = [float(jnp.vdot(kernel, before)) for kernel in kernels]
  assert away[1] < away[0]


@pytest.mark.parametrize("validation", [0, 100])
def test_by_gain_neurons_are_pruned_without_asking_anybody(
  config, monkeypatch, validation
):
  def asked(*_):
    raise AssertionError("a client was asked")

  monkeypatch.setattr(populations, "ask_clients", asked)
  config = _with(
    config,
    pruning="gain",
    cleanse="fp",
    pruning_outlier=0.0,
    validation_size=validation,
  )
  results = experiment.run(config, quiet=True)
  pruned = results["phases"][-1]
  assert pruned["name"] == "fp"
  assert pruned["largest_anomaly"] > 0
  # All above the median.
  assert pruned["pruned_neurons"] == pruned["neurons"] // 2
  _, lines, state = _final(config)
  assert (~state.neuron_mask).sum() == pruned["pruned_neurons"]
  curve = [line for line in lines if line["phase"] == "fp"]
  neurons = [line["neuron"] for line in curve]
  assert sorted(neurons[1:]) == list(range(pruned["neurons"]))
  assert all((line["accuracy"] is None) == (not validation) for line in curve)


def test_baselines_alone_are_compared_on_the_trained_model(config):
  config = _with(
    config, cleanse="nc-unlearn,nc-prune,fine-pruning", nc_steps=20
  )
  results = experiment.run(config, quiet=True)
  names = [phase["name"] for phase in results["phases"]]
  assert names == ["training", "nc-unlearn", "nc-prune", "fine-pruning"]
  # One reversal for both, which counts in the time of each.
  unlearn, prune = results["phases"][1:3]
  assert unlearn["trigger_norms"] == prune["trigger_norms"]
  assert prune["seconds"] > unlearn["seconds"] / 3
  for name in ("nc-prune", "fine-pruning"):
    alone = _with(
      config,
      cleanse=name,
      workdir=f"{config.workdir}-{name}",
      trained_in=config.workdir,
    )
    (phase,) = experiment.run(alone, quiet=True)["phases"][1:]
    (same,) = (p for p in results["phases"] if p["name"] == name)
    assert {**phase, "seconds": 0} == {**same, "seconds": 0}


def test_the_server_trains_as_the_settings_say(config, monkeypatch):
  asked = {}
  for name in ("shift_features", "prune_and_tune"):
    whole = getattr(phases, name)

    def spied(*subject, name=name, whole=whole, **settings):
      asked[name] = settings
      return whole(*subject, **settings)

    monkeypatch.setattr(phases, name, spied)
  mesh = parallel.Mesh(np.asarray(jax.devices()), (parallel.AXIS,))
  monkeypatch.setattr(parallel, "make_mesh", lambda devices: mesh)
  told = {"learning_rate": 0.02, "gradient_clip": 0.5, "epochs": 3}
  config = _with(
    config,
    cleanse="fst,fine-pruning",
    rounds=1,
    server_learning_rate=0.02,
    gradient_clip=0.5,
    server_epochs=3,
    augment="flip",
    fst_weight=0.3,
    pruning_drop=0.07,
  )
  experiment.run(config, quiet=True)
  for settings in asked.values():
    assert settings.pop("key") is not None
    assert settings.pop("on_progress") is not None
    assert settings.pop("mesh") is mesh
  told["augmentation"] = "flip"
  assert asked == {
    "shift_features": {**told, "weight": 0.3},
    "prune_and_tune": {**told, "max_drop": 0.07},
  }


@pytest.mark.parametrize("kind", ["fine-pruning", "nc-oracle"])
def test_a_server_that_trains_too_fast_is_told_so(config, kind):
  config = _with(
    config, cleanse=kind, server_learning_rate=1e30, nc_steps=1, rounds=1
  )
  with pytest.raises(errors.DivergedError, match="server_learning_rate"):
    experiment.run(config, quiet=True)


def test_the_learning_rate_falls_to_its_last_round_and_stays(config):
  config = _with(config, rounds=5, learning_rate=0.2, final_learning_rate=0.04)
  factor = experiment.schedule(config)
  rates = [0.2 * float(factor(done)) for done in range(8)]
  np.testing.assert_allclose(
    rates, [0.2, 0.16, 0.12, 0.08, 0.04, 0.04, 0.04, 0.04], rtol=1e-6
  )
  assert config.last_learning_rate == 0.04
  constant = _with(config, final_learning_rate=0.0)
  assert experiment.schedule(constant) is None
  # Where there is but fine-tuning, whose rate is relative to the last one.
  none = experiment.schedule(_with(config, rounds=0))
  assert float(none(0)) == pytest.approx(float(factor(config.rounds)))
  assert constant.last_learning_rate == 0.2


def test_a_complete_run_is_not_run_again(config, monkeypatch):
  first = experiment.run(config, quiet=True)
  monkeypatch.setattr(experiment, "setup", None)
  assert experiment.run(config, quiet=True) == first


def test_a_trained_model_is_taken_over(config):
  experiment.run(config, quiet=True)
  again = _with(config, workdir=config.workdir + "2", trained_in=config.workdir)
  results = experiment.run(again, quiet=True)
  trained = _results(config)["phases"][0]
  assert trained["environment"] == results["environment"]
  taken = {**trained, "taken_from": config.workdir}
  assert results["phases"][0] == taken
  assert f"taken from {config.workdir}" in summary.table(results)
  _assert_same(_final(config), _final(again))
  # What is damaged beside the trained model is nothing to it.
  checkpoints = Path(again.workdir) / "checkpoints"
  (checkpoints / "0000-training").mkdir()
  # Of a model that is taken over again, the first folder is known.
  third = _with(again, workdir=config.workdir + "4", trained_in=again.workdir)
  assert experiment.run(third, quiet=True)["phases"][0] == taken
  other = _with(
    again, workdir=config.workdir + "3", pruning="rap", cleanse="fp"
  )
  assert len(experiment.run(other, quiet=True)["phases"]) == 2


def _results(config):
  return json.loads((Path(config.workdir) / "results.json").read_text())


def test_a_trained_model_of_something_else_is_refused(config, tmp_path):
  trained = _with(config, rounds=2, cleanse="")
  experiment.run(trained, quiet=True)
  taking = _with(
    config,
    rounds=2,
    workdir=str(tmp_path / "taking"),
    trained_in=config.workdir,
  )
  with pytest.raises(errors.WorkdirError, match="seed: 0 there, 1 here"):
    experiment.run(_with(taking, seed=1), quiet=True)
  # The folder is still free for the same command, mended.
  with pytest.raises(errors.WorkdirError, match="holds no run"):
    nothing = str(tmp_path / "nothing")
    experiment.run(_with(taking, trained_in=nothing), quiet=True)
  checkpoints = Path(config.workdir) / "checkpoints"
  for checkpoint in checkpoints.iterdir():
    (checkpoint / "progress.json").unlink()
  with pytest.raises(errors.CheckpointError, match="is damaged"):
    experiment.run(taking, quiet=True)
  for checkpoint in checkpoints.iterdir():
    shutil.rmtree(checkpoint)
  with pytest.raises(errors.WorkdirError, match="not ended its training"):
    experiment.run(taking, quiet=True)
  assert not (Path(taking.workdir) / "config.json").exists()


def test_a_folder_is_free_after_a_model_of_other_data_was_refused(
  config, tmp_path
):
  trained = _with(config, cleanse="")
  experiment.run(trained, quiet=True)
  taking = _with(
    config, workdir=str(tmp_path / "taking"), trained_in=config.workdir
  )
  record = Path(config.workdir) / "config.json"
  text = record.read_text()
  sha256 = json.loads(text)["data_sha256"]
  record.write_text(text.replace(sha256, "0"))
  with pytest.raises(errors.WorkdirError, match=r"otherwise .*data_sha256"):
    experiment.run(taking, quiet=True)
  record.write_text(text)
  assert experiment.run(taking, quiet=True)["phases"]


def test_a_model_is_loaded_from_a_folder_that_stays_as_it_is(config):
  results = experiment.run(config, quiet=True)
  folder = Path(config.workdir)

  def files():
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

  before = files()
  for phase in (*results["phases"], {**results["phases"][-1], "name": ""}):
    loaded, state = experiment.load(config.workdir, phase=phase["name"])
    assert loaded.config == dataclasses.replace(
      config, figures=loaded.config.figures
    )
    for name, examples in (
      ("test_accuracy", loaded.test),
      ("attack_success", loaded.backdoored),
    ):
      measured = evaluate.measure(loaded.model, state.params, examples)
      assert float(measured) == phase[name]
  _, _, last = _final(config)
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, state), last)
  assert files() == before
  # What is damaged beside the model that is wanted is nothing to it.
  checkpoints = {path.name[5:]: path for path in folder.glob("checkpoints/*")}
  record = checkpoints["fp"] / "progress.json"
  text = record.read_text()
  record.write_text("{")
  experiment.load(config.workdir, phase="training")
  with pytest.raises(errors.CheckpointError, match="fp is damaged"):
    experiment.load(config.workdir, phase="fp")
  record.write_text(text)
  record = checkpoints["all"] / "progress.json"
  text = record.read_text()
  record.write_text("{")
  with pytest.raises(errors.CheckpointError, match="all is damaged"):
    experiment.load(config.workdir)
  record.write_text(text)
  with pytest.raises(
    errors.WorkdirError, match=r"phase fst; .* training, fp, "
  ):
    experiment.load(config.workdir, phase="fst")
  with pytest.raises(errors.WorkdirError, match="holds no run"):
    experiment.load(str(folder / "figures"))
  text = (folder / "config.json").read_text()
  for changed, message in (
    (text.replace('"data_sha256": "', '"data_sha256": "0'), "of other data"),
    (text.replace("{", '{"newer": 1,', 1), "another version .* newer"),
  ):
    (folder / "config.json").write_text(changed)
    with pytest.raises(errors.WorkdirError, match=message):
      experiment.load(config.workdir)


# --- a server's images from elsewhere ----------------------------------------


def _from_elsewhere(path, number, label=None, shape=(8, 8, 1)):
  images = np.arange(number, dtype=np.uint8).reshape(-1, 1, 1, 1)
  labels = np.arange(number) % NUM_CLASSES if label is None else [label]
  np.savez(
    path, images=np.broadcast_to(images, (number, *shape)), labels=labels
  )
  return str(path)


@pytest.mark.parametrize("number, had", [(60, 40), (40, 40), (7, 7)])
def test_a_servers_images_may_be_from_elsewhere(config, tmp_path, number, had):
  config = _with(config, validation_size=40)
  path = _from_elsewhere(tmp_path / "own.npz", number)
  before = experiment.setup(config)
  for seed in 0, 1:
    built = experiment.setup(_with(config, server_data=path, seed=seed))
    images, labels = phases.server_images(built.validation)
    # Each image tells which it is: they are different ones, of their labels.
    which = images[:, 0, 0, 0]
    assert len(which) == len(set(which.tolist())) == had
    np.testing.assert_array_equal(labels, which % NUM_CLASSES)
    if seed == 0:
      first = which
      # Nothing of the clients changes.
      chex.assert_trees_all_equal(built.federation, before.federation)
  assert had == number or set(first.tolist()) != set(which.tolist())


def test_a_trained_model_is_cleansed_with_images_from_elsewhere(
  config, tmp_path
):
  experiment.run(_with(config, cleanse=""), quiet=True)
  path = _from_elsewhere(tmp_path / "own.npz", 60)
  taking = _with(
    config,
    workdir=str(tmp_path / "taking"),
    trained_in=config.workdir,
    server_data=path,
    cleanse="fst,aw",
  )
  results = experiment.run(taking, quiet=True)
  assert [phase["name"] for phase in results["phases"]][-1] == "fst+aw"
  loaded, _ = experiment.load(taking.workdir)
  assert loaded.config.server_data == path
  # The same file is the same run; another one is refused, also where the run
  # is complete; none at all is not missed there.
  assert experiment.run(taking, quiet=True) == results
  kept = Path(path).read_bytes()
  _from_elsewhere(path, 61)
  with pytest.raises(errors.WorkdirError, match="server_sha256"):
    experiment.run(taking, quiet=True)
  with pytest.raises(errors.WorkdirError, match="server_sha256"):
    experiment.load(taking.workdir)
  (Path(taking.workdir) / "results.json").unlink()
  with pytest.raises(errors.WorkdirError, match="server_sha256"):
    experiment.run(taking, quiet=True)
  Path(path).write_bytes(kept)
  assert experiment.run(taking, quiet=True)["phases"]
  Path(path).unlink()
  experiment.run(taking, quiet=True)


def test_where_clients_decide_the_servers_images_do_not(config, tmp_path):
  experiment.run(_with(config, cleanse=""), quiet=True)
  path = _from_elsewhere(tmp_path / "own.npz", 60)
  ends, kept = [], []
  for number, own in enumerate(({}, {"server_data": path})):
    cleansed = _with(
      config,
      workdir=str(tmp_path / str(number)),
      trained_in=config.workdir,
      decide_by="clients",
      pruning_drop=0.05,
      **own,
    )
    experiment.run(cleansed, quiet=True)
    results, _, state = _final(cleansed)
    ends.append((results["phases"], None, state))
    kept.append(results["phases"][3]["kept_round"])
  _assert_same(*ends)
  assert kept == 2 * [config.fine_tune_rounds]
  # What the server trains on is all that it has.
  assert not _with(config, cleanse="fst,ft", decide_by="clients").holds_out


@pytest.mark.parametrize("partition", ["labels", "iid", "dirichlet"])
def test_clients_train_on_none_that_they_keep_back(config, partition):
  config = _with(config, partition=partition)
  whole = experiment.setup(config)
  built = experiment.setup(_with(config, client_holdout=0.25))
  training, kept = built.federation, built.client_validation

  def images(clients, client, chosen):
    rows = np.asarray(clients.images[client])[np.asarray(chosen[client])]
    return {row.tobytes() for row in rows}

  for client in range(config.num_clients):
    own = images(whole.federation, client, whole.federation.mask)
    mine = images(training, client, training.mask)
    held = images(kept, client, kept.mask)
    size = int(whole.federation.mask[client].sum())
    assert not mine & held
    # An attacker's backdoored images have taken the place of others.
    assert client == 0 or mine | held == own
    assert int(kept.mask[client].sum()) == round(0.25 * size)
    assert int(training.mask[client].sum()) == size - round(0.25 * size)
  assert not np.asarray(kept.poisoned).any()
  assert np.asarray(training.poisoned).any(axis=1).tolist() == [
    True,
    *3 * [False],
  ]


def test_clients_decide_by_what_they_keep_back(config):
  config = _with(
    config,
    client_holdout=0.2,
    decide_by="clients",
    fine_tune_rounds=4,
    fine_tune_patience=0,
    fine_tune_drop=0.0,
    pruning_drop=0.3,
  )
  experiment.run(config, quiet=True)
  results, lines, _ = _final(config)
  built = experiment.setup(config)
  trained, *_, whole = results["phases"]
  _, state = experiment.load(config.workdir, phase="all")
  reported = pipeline.reported_rounds(
    built.model, built.client_validation, rounds=0, trim=config.report_trim
  )
  curves = {
    name: [line["accuracy"] for line in lines if line["phase"] == name]
    for name in ("fp", "fp+ft", "all")
  }
  tuned = next(p for p in results["phases"] if p["name"] == "fp+ft")
  assert tuned["kept_round"] == int(np.argmax(curves["fp+ft"]))
  # Where one phase ends, the next one begins.
  assert curves["fp"][0] == pytest.approx(trained["accuracy"])
  assert curves["all"][0] == pytest.approx(max(curves["fp+ft"]))
  enough = trained["accuracy"] - 1e-6
  assert all(value < enough for value in curves["fp+ft"][:-1])
  deltas = [line["delta"] for line in lines if line["phase"] == "all"]
  kept = curves["all"][deltas.index(whole["delta"])]
  assert reported(state.params, 0) == pytest.approx(kept)


def test_a_model_trained_on_all_images_is_not_taken_over(config, tmp_path):
  config = _with(config, rounds=0, cleanse="")
  experiment.run(config, quiet=True)
  taking = _with(
    config,
    workdir=str(tmp_path / "taking"),
    trained_in=config.workdir,
    client_holdout=0.2,
  )
  with pytest.raises(errors.WorkdirError, match=r"client_holdout: 0\.0 there"):
    experiment.run(taking, quiet=True)


def test_a_holdout_that_holds_nothing_is_refused(config):
  with pytest.raises(errors.ConfigError, match="no client an image to measure"):
    experiment.setup(_with(config, client_holdout=0.001))


@pytest.mark.parametrize(
  "made, message",
  [
    ({"number": 8, "shape": (8, 8, 3)}, r"\(8, 8, 3\), .* \(8, 8, 1\)"),
    ({"number": 1, "label": NUM_CLASSES}, "labels go to 4, those of rows to 3"),
    ({"number": 1, "label": 0}, "of one image none can be left out"),
    ({"number": 1, "label": -1}, "must be integers from 0"),
  ],
)
def test_images_from_elsewhere_that_do_not_fit_are_refused(
  config, tmp_path, made, message
):
  path = _from_elsewhere(tmp_path / "own.npz", **made)
  with pytest.raises(errors.FljaxError, match=message):
    experiment.setup(_with(config, server_data=path, cleanse="fst,aw"))


# --- interruptions -----------------------------------------------------------


class _KilledError(BaseException):
  pass


@pytest.fixture(scope="module")
def uninterrupted(own_data, tmp_path_factory):
  """What a run of `config`'s settings ends in."""
  config = configs.Config(
    workdir=str(tmp_path_factory.mktemp("uninterrupted") / "run"),
    dataset=str(own_data),
    **TINY_SETTINGS,
  )
  experiment.run(config, quiet=True)
  return _final(config)


@pytest.mark.parametrize("moment", [1, 2, 4, 5, 6, 7])
def test_a_killed_run_goes_on_to_the_same_bits(
  config, uninterrupted, monkeypatch, moment
):
  """Killed right before, or right after, the given checkpoint is written."""
  save = workdirs.Workdir.save
  for after in (False, True):
    killed = _with(config, workdir=f"{config.workdir}-{after}")
    count = 0

    def dying(self, *arguments, after=after, **options):
      nonlocal count
      count += 1
      if count == moment and not after:
        raise _KilledError
      path = save(self, *arguments, **options)
      if count == moment:
        raise _KilledError
      return path

    monkeypatch.setattr(workdirs.Workdir, "save", dying)
    with pytest.raises(_KilledError):
      experiment.run(killed, quiet=True)
    monkeypatch.setattr(workdirs.Workdir, "save", save)
    experiment.run(killed, quiet=True)
    _assert_same(uninterrupted, _final(killed))


def test_what_attackers_remember_outlives_an_interruption(config, monkeypatch):
  # And the state of a rule that has one.
  config = _with(
    config,
    attacker_neurotoxin=0.3,
    aggregation="flame",
    cleanse="ft",
    rounds=4,
  )
  experiment.run(config, quiet=True)
  broken = _with(config, workdir=config.workdir + "-broken")
  save, saved = workdirs.Workdir.save, []

  def dying(self, *arguments, **options):
    saved.append(save(self, *arguments, **options))
    # After two rounds of training, and after training.
    raise _KilledError

  for _ in range(2):
    monkeypatch.setattr(workdirs.Workdir, "save", dying)
    with pytest.raises(_KilledError):
      experiment.run(broken, quiet=True)
    monkeypatch.undo()
  experiment.run(broken, quiet=True)
  _assert_same(_final(config), _final(broken))
  _, state = experiment.load(broken.workdir, phase="training")
  held = jax.tree.leaves(state.memory)
  assert sum(int(leaf.sum()) for leaf in held) == round(
    0.3 * sum(leaf.size for leaf in held)
  )


def test_a_run_on_other_data_is_refused(config, tmp_path):
  experiment.run(_with(config, cleanse=""), quiet=True)
  folder = workdirs.Path(config.workdir)
  (folder / "results.json").unlink()
  images, labels = make_images(600, seed=3)
  np.savez(tmp_path / "other.npz", images=images, labels=labels)
  record = json.loads((folder / "config.json").read_text())
  record["dataset"] = str(tmp_path / "other.npz")
  (folder / "config.json").write_text(json.dumps(record))
  with pytest.raises(errors.WorkdirError, match="data_sha256"):
    experiment.run(
      _with(config, cleanse="", dataset=record["dataset"]), quiet=True
    )


def test_checkpoints_may_be_more_frequent_than_evaluations(config):
  config = _with(config, eval_every=4, checkpoint_every=3, cleanse="")
  experiment.run(config, quiet=True)
  assert [line["round"] for line in _final(config)[1]] == [4, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(
  config, uninterrupted, monkeypatch, number
):
  stopped = _with(config, workdir=config.workdir + "-stopped")
  advance = experiment.consoles.Console.advance

  def stopping(self, done, *arguments):
    if done == 4:
      os.kill(os.getpid(), number)
    advance(self, done, *arguments)

  monkeypatch.setattr(experiment.consoles.Console, "advance", stopping)
  with pytest.raises(errors.InterruptedRunError, match=number.name):
    experiment.run(stopped, quiet=True)
  monkeypatch.undo()
  workdir = workdirs.Workdir(stopped.workdir, stopped.identity())
  with workdir:
    _, progress = workdir.restore(experiment.setup(stopped).init_state())
  assert progress.phase == "training" and not progress.complete
  experiment.run(stopped, quiet=True)
  _assert_same(uninterrupted, _final(stopped))


@pytest.mark.parametrize(
  ("kind", "what"), [("nc-prune", "reversing triggers"), ("fst", "tuning")]
)
def test_a_signal_ends_a_baseline_in_the_midst(config, monkeypatch, kind, what):
  config = _with(config, rounds=1, cleanse=kind, nc_steps=50, server_epochs=30)
  whole = _with(config, workdir=config.workdir + "-whole")
  expected = experiment.run(whole, quiet=True)["phases"]
  advance = experiment.consoles.Console.advance
  told = []

  def stopping(self, done, *arguments):
    told.append((self._name, done))
    if self._name != "training" and done >= 10:
      os.kill(os.getpid(), signal.SIGTERM)
    advance(self, done, *arguments)

  monkeypatch.setattr(experiment.consoles.Console, "advance", stopping)
  with pytest.raises(errors.InterruptedRunError, match="SIGTERM"):
    experiment.run(config, quiet=True)
  name, done = told[-1]
  assert name == f"{kind}: {what}" and 10 <= done < 50
  told.clear()
  monkeypatch.setattr(
    experiment.consoles.Console,
    "advance",
    lambda self, done, *arguments: told.append((self._name, done)),
  )
  results = experiment.run(config, quiet=True)
  # A search goes on, a training begins again; that of the model is complete.
  kept = done if kind == "nc-prune" else 0
  assert told[0] == (f"{kind}: {what}", kept)
  assert not (workdirs.Path(config.workdir) / workdirs.KEPT).exists()
  for phase, other in zip(results["phases"], expected, strict=True):
    assert phase.pop("seconds") > 0 and other.pop("seconds") > 0
    assert phase == other


def test_a_search_of_neural_cleanse_serves_both_ways_after_a_kill(
  config, monkeypatch
):
  """Killed between the two phases that begin with it."""
  config = _with(config, rounds=1, cleanse="nc-unlearn,nc-prune", nc_steps=20)
  save = workdirs.Workdir.save

  def dying(self, *arguments, **options):
    path = save(self, *arguments, **options)
    if options["phase"] == "nc-unlearn":
      raise _KilledError
    return path

  monkeypatch.setattr(workdirs.Workdir, "save", dying)
  with pytest.raises(_KilledError):
    experiment.run(config, quiet=True)
  monkeypatch.setattr(workdirs.Workdir, "save", save)
  with np.load(workdirs.Path(config.workdir) / workdirs.KEPT) as kept:
    seconds = float(kept["seconds"])
  told = []
  monkeypatch.setattr(
    experiment.consoles.Console,
    "advance",
    lambda self, done, *arguments: told.append((self._name, done)),
  )
  results = experiment.run(config, quiet=True)
  assert told == [("nc-prune: reversing triggers", 20)]
  one, other = results["phases"][1:]
  assert one["trigger_norms"] == other["trigger_norms"]
  # The search counts for both.
  assert min(one["seconds"], other["seconds"]) >= seconds > 0


def test_signals_are_handled_as_before_after_a_run(config):
  before = signal.getsignal(signal.SIGTERM)
  experiment.run(_with(config, rounds=1, cleanse=""), quiet=True)
  assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_killed_from_outside_goes_on_to_the_same_bits(tmp_path):
  """kill -9 in mid-training, through the command line."""
  rng = np.random.default_rng(0)
  dataset = tmp_path / "digits.npz"
  np.savez(
    dataset,
    images=rng.integers(0, 256, (1000, 28, 28), np.uint8),
    labels=np.arange(1000) % 10,
  )
  killed, whole = (
    configs.Config(
      workdir=str(tmp_path / name),
      dataset=str(dataset),
      model="mnist_small",
      samples_per_client=60,
      validation_size=100,
      rounds=8,
      eval_every=1,
      checkpoint_every=1,
      cleanse="fp",
      figures=False,
    )
    for name in ("killed", "whole")
  )

  def command(config):
    defaults = configs.Config()
    flags = [
      f"--{field.name}={getattr(config, field.name)}"
      for field in dataclasses.fields(config)
      if getattr(config, field.name) != getattr(defaults, field.name)
    ]
    return [sys.executable, str(ROOT / "launch" / "main.py"), *flags]

  process = subprocess.Popen(command(killed), stderr=subprocess.DEVNULL)
  folder = tmp_path / "killed" / "checkpoints"
  deadline = time.monotonic() + 120
  while not (folder.is_dir() and len(list(folder.glob("0*"))) > 1):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  process.kill()
  process.wait()
  assert not (tmp_path / "killed" / "results.json").exists()
  for config in (killed, whole):
    finished = subprocess.run(
      command(config), capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert ("continuing in" in finished.stderr) == (config is killed)
  _assert_same(_final(killed), _final(whole))


# --- bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"victim_label": NUM_CLASSES}, "victim_label=4 is out of range: rows"),
    ({"target_label": 9}, "target_label=9 is out of range"),
    ({"samples_per_client": 700}, "more than exist"),
    ({"validation_size": 500}, "hold out 500 of 500"),
    ({"labels_per_client": 5}, "labels_per_client=5"),
    ({"model": "mnist_large"}, "too small"),
    ({"dataset": "missing.npz"}, "does not exist"),
    ({"poison_fraction": 0.001}, "attacker 0 has no image"),
    (
      {"attacker_latent": 1.0, "labels_per_client": 1},
      "attacker 0 has no image of --target_label=1.*attackers_hold_target",
    ),
    (
      {"attackers_hold_target": True, "labels_per_client": 1},
      "labels_per_client=1 leaves no room for the 2 labels",
    ),
    ({"attacker_avoids": "8"}, "attacker_avoids=8 does not fit --model=tiny"),
    ({"model": "tiny_bn", "pruning": "gain"}, "--pruning=gain goes by the"),
  ],
)
def test_what_does_not_fit_the_data_is_refused(config, changes, message):
  with pytest.raises(errors.FljaxError, match=message):
    experiment.run(_with(config, **changes), quiet=True)
  # Corrected, the same command works in the same folder.
  experiment.run(_with(config, rounds=1, cleanse=""), quiet=True)


def test_training_that_diverges_stops_with_the_last_good_checkpoint(config):
  config = _with(config, learning_rate=1e30)
  with pytest.raises(errors.DivergedError, match="in round 1"):
    experiment.run(config, quiet=True)
  workdir = workdirs.Workdir(config.workdir, config.identity())
  with workdir:
    state, _ = workdir.restore(experiment.setup(config).init_state())
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
  assert int(state.round) == 0


@pytest.mark.parametrize(
  "validation_size, holdout", [(60, 0), (0, 0), (0, 0.2)]
)
def test_a_population_on_the_host_ends_in_the_same(
  config, validation_size, holdout
):
  """Also where the clients have to report accuracies."""
  config = _with(
    config,
    clients_per_round=2,
    rounds=2,
    attack_rounds=1,
    attacker_neurotoxin=0.1,
    fine_tune_rounds=1,
    validation_size=validation_size,
    client_holdout=float(holdout),
    cleanse="fp,ft",
  )
  there = _with(config, workdir=config.workdir + "-host", population="host")
  for here in (config, there):
    experiment.run(here, quiet=True)
  one, two = _final(config), _final(there)
  assert one[0]["phases"] == two[0]["phases"]
  chex.assert_trees_all_close(one[2], two[2], rtol=1e-5)


def test_vgg11_under_the_distributed_attack_at_reduced_size(tmp_path):
  """The way of cifar10_dba.flags: a quarter of the width, hardly any length."""
  rng = np.random.default_rng(0)
  data = tmp_path / "colours.npz"
  np.savez(
    data,
    images=rng.integers(0, 256, (360, 32, 32, 3), np.uint8),
    labels=np.arange(360) % 10,
  )
  values = flags.FlagValues()
  configs.define_flags(values)
  values(
    [
      "test",
      f"--flagfile={ROOT / 'launch' / 'cifar10_small.flags'}",
      f"--dataset={data}",
      f"--workdir={tmp_path / 'run'}",
      "--samples_per_client=20",
      "--validation_size=40",
      "--batch_size=10",
      "--rounds=1",
      "--local_steps=1",
      "--fine_tune_rounds=1",
      "--delta_step=5",
      "--precision=bfloat16",
      # Of all forms the soonest compiled and run.
      "--conv=slices",
    ]
  )
  config = configs.from_flags(values)
  results = experiment.run(config, quiet=True)
  names = [phase["name"] for phase in results["phases"]]
  assert names == ["training", "fp", "fp+aw", "fp+ft", "all"]
  assert results["phases"][1]["neurons"] == 128
  # Every attacker has a piece of its own, the test all of them.
  clients = experiment.setup(config).federation
  pieces = np.asarray(clients.trigger.mask)[:4].reshape(4, -1)
  assert (pieces.sum(axis=1) == 6).all()
  assert (pieces.sum(axis=0) <= 1).all()
  assert np.asarray(clients.attacker).sum() == 4
  figures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
  assert "trigger.png" in figures


def test_a_profile_is_written_and_changes_nothing(config):
  config = _with(config, rounds=4, cleanse="")
  looked = _with(config, workdir=config.workdir + "-profile", profile=True)
  for run in (config, looked):
    experiment.run(run, quiet=True)
  found = experiment.workdirs.Path(looked.workdir, "profile")
  assert list(found.rglob("*.xplane.pb"))
  assert list(found.rglob("perfetto_trace.json.gz"))
  (_, _, state), (_, _, other) = _final(config), _final(looked)
  chex.assert_trees_all_equal(state, other)


def test_that_no_round_is_traced_is_told(config, capsys):
  config = _with(config, rounds=1, cleanse="", profile=True)
  experiment.run(config)
  assert "no round was traced (--profile)" in capsys.readouterr().err
  assert not (Path(config.workdir) / "profile").exists()
