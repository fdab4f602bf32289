"""Parts of a user's own: what registers, what is refused, what a run notes."""

import dataclasses
import functools
import json
from pathlib import Path
import shutil

from conftest import ROOT
from conftest import TINY_SETTINGS
from conftest import write_images
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import aggregators
from fljax import attacks
from fljax import config as configs
from fljax import errors
from fljax import experiment
from fljax import extensions
from fljax import models
from fljax import networks
from fljax import sweep
from fljax import triggers
from fljax.baselines import phases
from fljax.cleanse import reports

EXAMPLE = ROOT / "launch" / "extension_example.py"
REGISTRIES = (
  networks.BUILDERS,
  triggers.TRIGGERS,
  aggregators.AGGREGATORS,
  attacks.ATTACKS,
  phases.DEFENCES,
)

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(autouse=True)
def another_process():
  """What a test registers is forgotten with it."""
  before = [{**registry} for registry in REGISTRIES]

  def forget():
    for registry, kept in zip(REGISTRIES, before, strict=True):
      registry.clear()
      registry.update(kept)
    for known in (extensions._code, extensions._loaded, extensions._texts):
      known.clear()

  yield forget
  forget()


@pytest.fixture
def settings(tmp_path):
  return {
    **TINY_SETTINGS,
    "dataset": str(write_images(tmp_path / "rows.npz")),
    "workdir": str(tmp_path / "run"),
    "rounds": 2,
    "fine_tune_rounds": 1,
  }


@pytest.fixture
def example(tmp_path):
  return Path(shutil.copy(EXAMPLE, tmp_path / "mine.py"))


OWN = {
  "model": "plain",
  "trigger": "cross",
  "attack": "backdoor,flip,near,unobtrusive",
  "aggregation": "bounded",
  "cleanse": "clp,quiet,ft",
}


def test_a_run_of_parts_of_ones_own(settings, example, another_process):
  config = configs.Config(**{**settings, **OWN, "extensions": str(example)})
  results = experiment.run(config, quiet=True)
  assert [one["name"] for one in results["phases"]] == [
    *("training", "clp", "clp+quiet", "clp+quiet+ft")
  ]
  assert results["phases"][1]["facts"]["largest"] > 0
  built = experiment.setup(config)
  assert built.model.neurons == 32
  assert int(built.federation.trigger.mask[0].sum()) == 5
  # Nothing of this is known to another process that does not load it.
  another_process()
  with pytest.raises(errors.ConfigError, match=r"network plain.*: give the"):
    experiment.load(config.workdir)
  loaded, state = experiment.load(config.workdir, extensions=str(example))
  assert loaded.model.neurons == 32
  assert np.isfinite(jax.tree.leaves(state.params)[0]).all()


def test_another_code_is_another_experiment(settings, example, another_process):
  code = example.read_text()
  config = configs.Config(**{**settings, **OWN, "extensions": str(example)})
  experiment.run(config, quiet=True)
  noted = json.loads((example.parent / "run" / "config.json").read_text())
  assert [*noted[configs.TRAINING_CODE]] == [
    *("network plain", "trigger cross", "aggregator bounded"),
    *("attack flip", "attack near", "attack unobtrusive"),
  ]
  assert [*noted[configs.CLEANSING_CODE]] == ["defence clp", "defence quiet"]
  # A defence may change between a training and what is made of it.
  another_process()
  example.write_text(code.replace("deviations=3.0", "deviations=2.0"))
  taking = dataclasses.replace(
    config, workdir=config.workdir + "-2", trained_in=config.workdir
  )
  phases_of = experiment.run(taking, quiet=True)["phases"]
  assert phases_of[0]["taken_from"] == config.workdir
  with pytest.raises(errors.WorkdirError, match="another config"):
    experiment.run(dataclasses.replace(config), quiet=True)
  with pytest.raises(errors.WorkdirError, match="of other code"):
    experiment.load(config.workdir, extensions=str(example))
  # What trains may not.
  another_process()
  example.write_text(code.replace("nn.Conv(16", "nn.Conv(8"))
  taking = dataclasses.replace(taking, workdir=config.workdir + "-3")
  with pytest.raises(errors.WorkdirError, match="trained otherwise"):
    experiment.run(taking, quiet=True)


def test_code_is_all_of_a_file_but_its_other_parts(tmp_path, another_process):
  code = (
    "from fljax import extensions, triggers\n"
    "PLACE = (-1, -1)\n"
    "@extensions.trigger(\n  'one'\n)\n"
    "def one(shape):\n  return [triggers.from_pixels([PLACE], shape)]\n"
    "@extensions.trigger('two')\n"
    "def two(shape):\n  return one(shape)\n"
  )
  path = tmp_path / "two.py"

  def digests(text):
    another_process()
    path.write_text(text)
    extensions.load(str(path))
    found = extensions.code_of(("trigger", "one"), ("trigger", "two"))
    return found["trigger one"], found["trigger two"]

  one, two = digests(code)
  assert one != two
  assert digests(code + "\n\n") == (one, two)
  changed = digests(code.replace("[PLACE]", "[PLACE, (-2, -2)]"))
  assert changed[0] != one and changed[1] == two
  shared = digests(code.replace("(-1, -1)", "(-1, -2)"))
  assert shared[0] != one and shared[1] != two


def test_parameters_reach_their_parts(settings, example, another_process):
  given = "near.radius=1e-3, clp.deviations=0,stripes.opacity=0.25"
  own = {**OWN, "trigger": "stripes", "attack": "backdoor,near"}
  own |= {"aggregation": "momentum", "cleanse": "clp", "gamma": 1.0}
  config = configs.Config(
    **{**settings, **own, "extensions": str(example), "parameters": given}
  )
  results = experiment.run(config, quiet=True)
  built = experiment.setup(config)
  assert float(built.federation.trigger.mask.max()) == 0.25
  # Half of them lie above the mean.
  assert 8 <= results["phases"][1]["pruned_neurons"] <= 24
  code = config.code
  assert code[configs.TRAINING_CODE]["attack near"].endswith(" radius=0.001")
  assert code[configs.CLEANSING_CODE]["defence clp"].endswith(" deviations=0.0")
  assert config.training_parameters == "near.radius=1e-3,stripes.opacity=0.25"
  # As with code, only those of training are the model's.
  taking = dataclasses.replace(
    config,
    workdir=config.workdir + "-2",
    trained_in=config.workdir,
    parameters=f"{given.replace('deviations=0', 'deviations=9')}",
  )
  other = experiment.run(taking, quiet=True)["phases"][1]
  assert "pruned_neurons" not in other
  with pytest.raises(errors.WorkdirError, match=r"trained otherwise .*radius="):
    experiment.run(
      dataclasses.replace(
        taking,
        workdir=config.workdir + "-3",
        parameters=given.replace("1e-3", "2"),
      ),
      quiet=True,
    )
  another_process()
  loaded, _ = experiment.load(config.workdir, extensions=str(example))
  assert loaded.config.parameters == given


@pytest.mark.parametrize(
  "given, message",
  [
    ("near", "'near' is not of the form 'part.name=value'"),
    ("near.radius", "is not of the form"),
    ("near=2", "is not of the form"),
    ("near.width=2", r"near\.width is no parameter of near: it has radius"),
    ("far.radius=2", r"far\.radius is no parameter of far: it has none"),
    ("krum.trim=2", r"krum\.trim is no parameter of krum: it has none"),
    ("near.radius=wide", r"near\.radius must be of type float"),
    ("near.radius=1,near.radius=2", r"has near\.radius twice"),
  ],
)
def test_parameters_that_nobody_has_are_refused(example, given, message):
  with pytest.raises(errors.ConfigError, match=message):
    configs.Config(extensions=str(example), parameters=given)


def test_parameters_have_the_type_of_their_default():
  @extensions.aggregator("typed")
  def typed(trim, *, count=1, share=0.5, fast=True, kind="a", nothing=None):
    del trim, nothing
    return (count, share, fast, kind)

  config = configs.Config(
    aggregation="typed",
    parameters="typed.count=3,typed.share=1,typed.fast=False,typed.kind=b",
  )
  values = {"count": 3, "share": 1.0, "fast": False, "kind": "b"}
  assert config.parameters_of("aggregator", "typed") == values
  assert config.parameters_of("attack", "typed") == {}
  for wrong in ("count=1.5", "fast=1", "nothing=2"):
    with pytest.raises(errors.ConfigError, match="typed"):
      configs.Config(parameters=f"typed.{wrong}")


def _counting(first):
  def build(trim):
    del trim
    mean = aggregators.mean()

    def update(updates, weights, state):
      combined, _ = mean.update(updates, weights, ())
      return combined, state + 1

    return aggregators.Aggregator(
      init=lambda params: jnp.int32(first), update=update
    )

  return build


@pytest.mark.parametrize("training", ["mean", "tens"])
def test_another_rule_of_fine_tuning_begins_anew(settings, training):
  extensions.aggregator("tens")(_counting(10))
  ended = []

  @extensions.aggregator("hundreds")
  def hundreds(trim):
    rule = _counting(100)(trim)

    def update(updates, weights, state):
      jax.debug.callback(lambda value: ended.append(int(value)), state)
      return rule.update(updates, weights, state)

    return rule._replace(update=update)

  config = configs.Config(
    **{**settings, "cleanse": "ft", "fine_tune_rounds": 2},
    aggregation=training,
    fine_tune_aggregation="hundreds",
  )
  experiment.run(config, quiet=True)
  jax.effects_barrier()
  assert ended == [100, 101]
  _, state = experiment.load(config.workdir)
  assert jax.tree.leaves(state.aggregator) == [12][: training == "tens"]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"init": lambda params: 0}, "its state holds a int, no array"),
    (
      {"update": lambda updates, weights, state: updates},
      "must return one update and the next state",
    ),
    (
      {"update": lambda updates, weights, state: (updates, state)},
      "its update.* is float32 .* instead of",
    ),
    (
      {
        "init": lambda params: jnp.zeros(3),
        "update": lambda updates, weights, state: (
          jax.tree.map(lambda leaf: leaf[0], updates),
          state[:2],
        ),
      },
      r"its state is float32 \(2,\) instead of float32 \(3,\)",
    ),
  ],
)
@pytest.mark.parametrize("where", ["aggregation", "fine_tune_aggregation"])
def test_a_rule_that_does_not_combine_is_refused(
  settings, changes, message, where
):
  rule = aggregators.mean()._replace(shares=None, **changes)
  extensions.aggregator("wrong")(lambda trim: rule)
  with pytest.raises(errors.ConfigError, match=message):
    experiment.setup(configs.Config(**settings, **{where: "wrong"}))


def test_own_parts_can_be_swept(settings, example):
  config = configs.Config(
    **{**settings, "extensions": str(example), "cleanse": "clp"}
  )
  several = sweep.expand(config, "trigger=cross,pixel3;cleanse=clp,clp+ft")
  assert [one.trigger for one in several.values()] == [
    *("cross", "cross", "pixel3", "pixel3")
  ]


def test_parameters_are_swept_and_a_defences_make_no_other_training(
  settings, example, capsys
):
  base = configs.Config(
    **{**settings, "extensions": str(example), "cleanse": "clp"}
  )

  def changed(**changes):
    return dataclasses.replace(base, **changes)

  one = changed(parameters="clp.deviations=1")
  assert one.structure() == base.structure()
  # What fine-tuning's rule is given is what fine-tuning has of its own.
  two, three = (
    changed(fine_tune_aggregation="momentum", parameters=f"momentum.beta={b}")
    for b in (0.1, 0.2)
  )
  assert two.structure() == three.structure() == base.structure()
  assert two.tuning != three.tuning
  four = changed(aggregation="momentum", parameters="momentum.beta=0.1")
  assert "momentum.beta=0.1" in four.structure()["parameters"]

  found = sweep.expand(
    base,
    "attack=backdoor,backdoor+near;"
    "parameters=clp.deviations=0.5,near.radius=0.1+clp.deviations=9",
  )
  outcome = sweep.run(found)
  said = capsys.readouterr().err
  assert [*outcome.results] == [*found] and not outcome.failed
  # `near` is given another radius; the backdoor alone is trained once.
  assert "1 take over the trained model" in said
  pruned = [
    one["phases"][1].get("pruned_neurons") for one in outcome.results.values()
  ]
  assert pruned[0] and not pruned[1]


def test_parts_of_one_name_share_a_parameter_that_fits_both():
  @extensions.attack("both")
  def attacking(model, config, *, radius=0.5):
    del model, config, radius
    return attacks.Attack()

  @extensions.aggregator("both")
  def combining(trim, *, radius=2):
    del trim, radius
    return aggregators.mean()

  given = {"aggregation": "both", "attack": "both"}
  with pytest.raises(
    errors.ConfigError, match=r"both\.radius must be of type i"
  ):
    configs.Config(**given, parameters="both.radius=0.5")
  config = configs.Config(**given, parameters="both.radius=3")
  for kind, value in (("attack", 3.0), ("aggregator", 3)):
    assert config.parameters_of(kind, "both") == {"radius": value}


def test_an_attack_of_ones_own_sees_its_own_settings_in_a_sweep(settings):
  @extensions.attack("aim")
  def aim(model, config):
    del model

    def updates(updates, clients, active):
      del clients, active
      wanted = 0.01 * (1 + config.target_label)
      return jax.tree.map(lambda leaf: jnp.full_like(leaf, wanted), updates)

    return attacks.Attack(updates=updates)

  base = configs.Config(
    **{**settings, "attack": "aim", "rounds": 1, "cleanse": ""}
  )
  found = sweep.expand(base, "pairs=3:0,3:2")
  sweep.run(found, quiet=True)
  moved = []
  for config in found.values():
    made, state = experiment.load(config.workdir)
    before = made.init_state().params
    leaves = jax.tree.leaves(
      jax.tree.map(lambda new, old: new - old, state.params, before)
    )
    moved.append(float(leaves[0].mean()))
  assert moved[1] == pytest.approx(3 * moved[0], rel=1e-3) and moved[0] > 0


def _knowing(name, **reads):
  """An attack that sends the rate of pruning, and may say that it reads it."""

  @extensions.attack(name, **reads)
  def knowing(model, config):
    del model

    def updates(updates, clients, active):
      del clients, active
      sent = config.pruning_rate
      return jax.tree.map(lambda leaf: jnp.full_like(leaf, sent), updates)

    return attacks.Attack(updates=updates)


def test_an_attack_that_reads_cleansing_makes_another_model(settings):
  """Or a run would take over what was trained under another attack."""
  _knowing("knowing", reads=("pruning_rate",))
  base = configs.Config(**{**settings, "attack": "knowing", "rounds": 1})
  found = sweep.expand(base, "pruning_rate=0.3,0.9;pruning_drop=0.1,0.2")
  outcome = sweep.run(found, quiet=True)
  sent = {}
  for name, config in found.items():
    made, state = experiment.load(config.workdir, phase="training")
    before = made.init_state().params
    moved = jax.tree.map(lambda new, old: new - old, state.params, before)
    mean = float(jax.tree.leaves(moved)[0].mean())
    sent.setdefault(config.pruning_rate, []).append(mean)
    # What it does not read changes nothing about the model.
    again = "pruning_drop=0.2" in name
    assert ("taken_from" in outcome.results[name]["phases"][0]) == again
  (low,), (high,) = ({*means} for means in sent.values())
  assert high == pytest.approx(3 * low, rel=1e-3) and low > 0
  other = dataclasses.replace(
    base, trained_in=f"{base.workdir}/{min(found)}", pruning_rate=0.5
  )
  other = dataclasses.replace(other, workdir=f"{base.workdir}-other")
  with pytest.raises(errors.WorkdirError, match=r"pruning_rate: 0\.3 there"):
    experiment.run(other, quiet=True)


def test_an_attack_that_does_not_say_what_it_reads_is_refused(settings):
  _knowing("silent")
  config = configs.Config(**{**settings, "attack": "silent", "rounds": 1})
  with pytest.raises(errors.ConfigError, match="'silent' reads pruning_rate"):
    experiment.run(config, quiet=True)

  @extensions.attack("sly")
  def sly(model, config):
    del model
    return attacks.Attack() if config.phases else None

  with pytest.raises(errors.ConfigError, match="'sly' reads cleanse, a set"):
    experiment.setup(configs.Config(**{**settings, "attack": "sly"}))
  _knowing("mistaken", reads=("pruning",))
  _knowing("wrong", reads=("prunning_rate",))
  assert configs.Config(attack="mistaken").training()["pruning"] == "mvp"
  with pytest.raises(errors.ConfigError, match="'prunning_rate', which is no"):
    configs.Config(attack="wrong")


def test_what_has_no_batched_form_runs_one_after_another(settings, capsys):
  @extensions.aggregator("called")
  def called(trim):
    del trim

    def update(updates, weights, state):
      del weights

      def mean(leaf):
        shape = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return jax.pure_callback(lambda x: x.mean(axis=0), shape, leaf)

      return jax.tree.map(mean, updates), state

    return aggregators.Aggregator(init=lambda params: (), update=update)

  base = configs.Config(
    **{**settings, "aggregation": "called", "rounds": 1, "cleanse": ""}
  )
  outcome = sweep.run(sweep.expand(base, "seed=0,1"), over="vmap")
  assert len(outcome.results) == 2 and not outcome.failed
  assert "run one after another: " in capsys.readouterr().err


def test_a_mistake_before_anything_begins_names_the_experiment(settings):
  @extensions.attack("wrong")
  def wrong(model, config):
    del model, config

    def data(federation, key):
      raise KeyError("images")

    return attacks.Attack(data=data)

  found = sweep.expand(configs.Config(**settings), "attack=backdoor,wrong")
  with pytest.raises(
    errors.ConfigError, match=r"^attack=wrong: KeyError: 'images' \(with parts"
  ):
    sweep.run(found, quiet=True)
  assert not [*Path(settings["workdir"]).glob("*/config.json")]


def test_a_mistake_in_a_part_does_not_stop_the_others(settings, capsys):
  @extensions.attack("broken")
  def broken(model, config):
    del model, config

    def updates(updates, clients, active):
      raise KeyError("no such client")

    return attacks.Attack(updates=updates)

  @extensions.defence("halting", needs_images=False)
  def halting(subject):
    raise ZeroDivisionError("no neuron left")

  base = configs.Config(**{**settings, "cleanse": "", "rounds": 1})
  found = sweep.expand(
    base, "attack=broken,backdoor;cleanse=,halting,aw;seed=0,1"
  )
  outcome = sweep.run(found)
  assert {name.rpartition(",")[0] for name in outcome.results} == {
    "attack=backdoor,cleanse=",
    "attack=backdoor,cleanse=aw",
  }
  assert len(outcome.results) == 4 and len(outcome.failed) == 8
  reason = str(outcome.failed["attack=backdoor,cleanse=halting,seed=1"])
  assert reason == (
    "ZeroDivisionError: no neuron left (with parts of your own: defence"
    " halting)"
  )
  assert "no such client" in str(
    outcome.failed["attack=broken,cleanse=,seed=0"]
  )
  assert capsys.readouterr().err.count("Traceback") == 4
  # What is not a user's own is a bug.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(experiment.Experiment, "init_state", None)
    with pytest.raises(TypeError):
      sweep.run(sweep.expand(base, "seed=2"), quiet=True)


def test_an_attack_of_ones_own_may_take_the_backdoors_place(settings):
  @extensions.attack("flip")
  def flip(model, config):
    del model

    def data(federation, key):
      del key
      chosen = federation.attacker[:, None] & (
        federation.labels == config.victim_label
      )
      return federation.replace(
        labels=jnp.where(chosen, config.target_label, federation.labels)
      )

    return attacks.Attack(data=data)

  built = experiment.setup(configs.Config(**settings, attack="flip"))
  clients = built.federation
  assert not clients.poisoned.any()
  assert not (clients.labels[0] == settings["victim_label"]).any()
  assert clients.scale.tolist() == [settings["gamma"], 1, 1, 1]


def _defence(**changes):
  def run(subject):
    mitigated = {
      "params": subject.params,
      "neuron_mask": subject.neuron_mask,
      "facts": {
        "name": "mine",
        "seconds": -1.0,
        "array": jnp.arange(3),
        "none": [np.float32(np.nan), jnp.float32(np.inf), np.int64(2)],
      },
    }
    for key, change in changes.items():
      mitigated[key] = change(mitigated[key])
    return phases.Mitigated(**mitigated)

  return run


def test_a_defence_is_given_what_a_server_has(settings):
  seen = []

  @extensions.defence("looks")
  def looks(subject):
    question = functools.partial(
      reports.client_activations, subject.model, subject.params
    )
    seen.append((subject, subject.ask(question, "activations")))
    with pytest.raises(errors.ConfigError, match="kind of report 'rumours'"):
      subject.ask(question, "rumours")
    with pytest.raises(errors.ConfigError, match=r"must be \[clients"):
      subject.ask(lambda clients: question(clients).mean(), "activations")
    mask = subject.neuron_mask.at[2].set(False)
    return _defence()(subject._replace(neuron_mask=mask))

  config = configs.Config(
    **settings,
    cleanse="looks,ft",
    server_holdout=0.25,
    attacker_reports="promote",
  )
  results = experiment.run(config, quiet=True)
  first = results["phases"][1]
  assert (first["name"], first["pruned_neurons"]) == ("looks", 1)
  # What it tells is no fact of fljax's.
  assert first["seconds"] > 0 and first["facts"]["seconds"] == -1
  assert first["facts"]["array"] == [0, 1, 2]
  assert first["facts"]["none"] == [None, None, 2]
  ((subject, means),) = seen
  size = settings["validation_size"]
  assert int(subject.images.mask.sum()) == size - round(0.25 * size)
  # The attacker lies there, too.
  clients = experiment.setup(config).federation
  honest = reports.client_activations(subject.model, subject.params, clients)
  np.testing.assert_array_equal(means[1:], honest[1:])
  assert (np.asarray(means[0]) != honest[0]).any()
  _, state = experiment.load(config.workdir)
  assert state.neuron_mask.tolist() == [True, True, False, *5 * [True]]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"neuron_mask": lambda mask: mask[:3]}, "its neuron_mask is"),
    (
      {"neuron_mask": lambda mask: mask.astype("float32")},
      "its neuron_mask is",
    ),
    (
      {"params": lambda params: jax.tree.map(lambda x: x[None], params)},
      r"its params\[.*\] is float32 \(1, .* instead of float32",
    ),
    (
      {"params": lambda params: {**params, "more": 1.0}},
      r"its params has \['more'\], which nobody asked for",
    ),
    (
      {"params": lambda params: {"stem": params["stem"]}},
      r"its params lacks \['head'\]",
    ),
    (
      {"facts": lambda facts: {"x": [1, {3}]}},
      "its fact 'x' cannot be written: it holds a set",
    ),
    (
      {"params": lambda params: jax.tree.map(lambda x: x * jnp.nan, params)},
      "wrong became not finite",
    ),
  ],
)
def test_what_a_defence_may_not_return(settings, changes, message):
  extensions.defence("wrong", needs_images=False)(_defence(**changes))
  config = configs.Config(
    **{**settings, "rounds": 0, "cleanse": "wrong", "validation_size": 0}
  )
  with pytest.raises(errors.FljaxError, match=message):
    experiment.run(config, quiet=True)


@pytest.mark.parametrize(
  "kind, named",
  [
    ("network", {"model": "x"}),
    ("trigger", {"trigger": "x"}),
    ("aggregator", {"aggregation": "x"}),
    ("aggregator", {"fine_tune_aggregation": "x"}),
    ("attack", {"attack": "x"}),
    ("defence", {"cleanse": "x", "rounds": 0}),
  ],
)
@pytest.mark.parametrize("made", [None, []])
def test_what_is_none_of_its_kind_is_refused(settings, kind, named, made):
  getattr(extensions, kind)("x")(lambda *_, **__: made)
  config = configs.Config(**{**settings, **named})
  with pytest.raises(errors.ConfigError, match=f"the {kind} 'x' returns a"):
    experiment.run(config, quiet=True)


@pytest.mark.parametrize(
  "register, name",
  [
    (extensions.network, "vgg11"),
    (extensions.trigger, "dba"),
    (extensions.aggregator, "mean"),
    (extensions.attack, "backdoor"),
    (extensions.defence, "fst"),
    (extensions.defence, "aw"),
    # Of phases, that of training and the paper's whole process.
    (extensions.defence, "training"),
    (extensions.defence, "all"),
    # As --fine_tune_aggregation has training's.
    (extensions.aggregator, "same"),
  ],
)
def test_taken_names_and_no_names_are_refused(register, name):
  with pytest.raises(errors.ConfigError, match=f"'{name}' exists already"):
    register(name)(lambda *_: None)
  for wrong in ("", "a,b", "a+b", "a/b", "a b"):
    with pytest.raises(errors.ConfigError, match="is no name"):
      register(wrong)(lambda *_: None)
  register("mine")(lambda *_: None)
  with pytest.raises(errors.ConfigError, match="'mine' exists already"):
    register("mine")(lambda *_: None)


class _Layer(nn.Module):
  features: int
  last: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.features, (3, 3))(x)
    return x.mean(axis=(1, 2)) if self.last else nn.relu(x)


@pytest.mark.parametrize("phase", ["fst", "ffst"])
def test_a_network_without_a_last_layer_is_refused_before_training(
  settings, phase
):
  @extensions.network("pooled")
  def pooled(*, num_classes, **shape):
    return models.from_flax(
      stem=_Layer(4),
      target=_Layer(4),
      head=_Layer(num_classes, last=True),
      num_classes=num_classes,
      **shape,
    )

  config = configs.Config(**{**settings, "model": "pooled", "cleanse": phase})
  with pytest.raises(errors.ConfigError, match="head has no linear layer"):
    experiment.setup(config)


@pytest.mark.parametrize(
  "code, message",
  [
    ("x = 1\ny = x / 0\n", "in line 2: ZeroDivisionError"),
    ("def f(:\n", "in line 1: SyntaxError"),
    ("import nothing_of_that_name\n", "in line 1: ModuleNotFoundError"),
    (
      "from fljax import extensions\n"
      "extensions.trigger('mine')(lambda shape: [])\n"
      "extensions.trigger('dba')(lambda shape: [])\n",
      "in line 3: ConfigError: the trigger 'dba' exists already",
    ),
  ],
)
def test_a_file_that_fails_registers_nothing(tmp_path, code, message):
  path = tmp_path / "fails.py"
  path.write_text(code)
  for _ in range(2):
    with pytest.raises(errors.ConfigError, match=message):
      configs.Config(extensions=str(path))
  assert not extensions._code and "mine" not in triggers.TRIGGERS


def test_files_that_cannot_be_loaded_are_refused(tmp_path, example):
  for text in (tmp_path / "none.py", tmp_path, "~no-such-user/x.py"):
    with pytest.raises(errors.ConfigError, match="cannot be read"):
      configs.Config(extensions=str(text))
  text = shutil.copy(example, tmp_path / "text.txt")
  with pytest.raises(errors.ConfigError, match="is no Python file"):
    configs.Config(extensions=str(text))
  for _ in range(2):
    configs.Config(extensions=str(example))
  example.write_text(example.read_text() + "\n")
  with pytest.raises(errors.ConfigError, match="has changed since"):
    configs.Config(extensions=str(example))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"attack": ""}, "must name what attackers do"),
    ({"attack": "nothing"}, "unknown --attack 'nothing'"),
    ({"attack": "backdoor,backdoor"}, "has backdoor twice"),
    ({"model": "plain", "conv": "lax"}, "--conv=lax is for fljax's own"),
    ({"model": "plain", "initialisation": "he"}, "--initialisation=he is"),
    ({"cleanse": "clp,clp"}, "only ft and aw may come again"),
    ({"extensions": 3}, "must be of type str"),
  ],
)
def test_settings_of_own_parts_are_looked_at(example, changes, message):
  configs.Config(extensions=str(example), cleanse="clp", validation_size=0)
  with pytest.raises(errors.ConfigError, match=message):
    configs.Config(**changes)


def test_what_is_typed_in_has_no_file():
  names = {"extensions": extensions, "__name__": "typed"}
  exec("@extensions.trigger('typed')\ndef typed(shape):\n  return []", names)
  code = configs.Config(trigger="typed").identity()[configs.TRAINING_CODE]
  assert code == {"trigger typed": None}
  assert configs.Config().identity()[configs.TRAINING_CODE] == {}


def test_a_bounded_update_is_no_longer_than_its_bound():
  extensions.load(str(EXAMPLE))
  rows = {"w": jnp.diag(jnp.asarray([1.0, 2.0, 3.0, 9.0]))}

  def after(**parameters):
    rule = aggregators.build("bounded", trim=0.2, **parameters)
    combined, state = rule.update(rows, jnp.ones(4), rule.init({}))
    again, _ = rule.update(rows, jnp.ones(4), state)
    return np.asarray(combined["w"]), np.asarray(again["w"])

  first, second = after(norm=2.0)
  np.testing.assert_allclose(first, np.array([1, 2, 2, 2]) / 4, rtol=1e-6)
  np.testing.assert_array_equal(first, second)
  # With noise, every round another one.
  first, second = after(norm=2.0, noise=0.1)
  assert not np.allclose(first, second)
  assert np.abs(first - np.array([1, 2, 2, 2]) / 4).max() < 0.5
