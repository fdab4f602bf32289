"""The phases after training, as an experiment's settings have them.

The procedures are in `cleanse.pipeline` and `baselines.phases`, and ask for
nothing but values; here is what a run gives them: which images decide, what
clients report and attackers make of it, the rates and depths of its settings,
and a console to tell.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import functools
import time
from typing import TYPE_CHECKING
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fljax import attacks
from fljax import config as configs
from fljax import console as consoles
from fljax import errors
from fljax import evaluate
from fljax import extensions
from fljax import federation as federations
from fljax import models
from fljax import parallel
from fljax import population as populations
from fljax import rounds
from fljax import workdir as workdirs
from fljax.baselines import feature_shift
from fljax.baselines import neural_cleanse
from fljax.baselines import phases
from fljax.cleanse import pipeline
from fljax.cleanse import pruning
from fljax.cleanse import reports

if TYPE_CHECKING:
  from fljax.experiment import Experiment

Array = jax.Array

# Of a search: the accuracy, as it sees it, of the model that it began with.
ACCURACY_BEFORE = "accuracy_before"
# Of the trained model, where fine-tuning may end at what it had: on all of the
# server's images, or as clients report it; and on those of the server's that
# its own training leaves out.
_ACCURACY, _LEFT = "accuracy", "accuracy_left_out"
# How much of a search is lost by `kill -9`.
_SECONDS_BETWEEN_KEEPING = 60
# In how many of Feature Shift Tuning's rounds TA and AA are measured.
_MOST_SHOWN = 40
# The model after a phase, what results.json says of it, and the lines of its
# curve in metrics.jsonl, for the figures: asked for when the phase is over.
Outcome = tuple[Any, dict[str, Any], Callable[[], Iterator[dict[str, Any]]]]


def course(phases: tuple[str, ...]) -> list[tuple[str, str, bool]]:
  """The phases of a run in order.

  Args:
    phases: some of `pipeline.PHASES` and `config.alone()`, in the order
      wanted.

  Returns:
    For each: its name in results.json, its kind, and whether it is a side
    result that the next phase does not build on. The paper's full process,
    fp, ft, aw, ends in "all" and also shows "fp+aw". Baselines and defences of
    a user's own alone are compared: each is applied to the trained model.
  """
  if all(phase in configs.alone() for phase in phases):
    return [(phase, phase, True) for phase in phases]
  steps = [
    ("+".join(phases[: index + 1]), kind, False)
    for index, kind in enumerate(phases)
  ]
  if phases == pipeline.WHOLE:
    steps[-1] = ("all", "aw", False)
    steps.insert(1, ("fp+aw", "aw", True))
  return steps


class Phases:
  """The phases of one run.

  Attributes:
    experiment: the experiment, its arrays where they are computed on.
    workdir: the run's folder, for what a long phase keeps.
    console: where it is told.
    check_stop: raises `errors.InterruptedRunError` if the run is asked to stop.
  """

  def __init__(
    self,
    experiment: Experiment,
    workdir: workdirs.Workdir | workdirs.Shared,
    console: consoles.Console,
    check_stop: Callable[[], None],
  ):
    self.experiment = experiment
    self.config = experiment.config
    self.workdir = workdir
    self.console = console
    self.check_stop = check_stop
    # The server's images that decide in the phase in progress.
    self._deciding: evaluate.Examples | None = None
    # The model that Neural Cleanse looked at last, what it found, in seconds.
    self._found: tuple[Any, phases.Suspects, float] | None = None

  def run(
    self, name: str, kind: str, state: Any, trained: Mapping[str, Any]
  ) -> Outcome:
    """One phase.

    Args:
      name: its name in results.json, as in `course`.
      kind: its kind, as in `course`.
      state: the server's state that it begins with.
      trained: what results.json says of training.

    Returns:
      The state after it, what results.json is to say of it, and its curve:
      TA and AA along it are for the figures, not for the choice, and are
      computed when it is asked for. Seconds that another phase, or an earlier
      process, spent for this one are under "seconds_before".

    Raises:
      errors.DivergedError: what it made is not finite.
      errors.InterruptedRunError: the run is asked to stop.
    """
    self._deciding, teaching = self._server_images(name)
    if kind == "fp":
      return self._prune(state)
    if kind == "ft":
      return self._fine_tune(name, state, trained)
    if kind == "aw":
      return self._adjust(state)
    if kind == "ffst":
      return self._shift_features(name, state)
    return self._mitigate(name, kind, state, teaching)

  def accuracies_before(self, params: models.Params) -> dict[str, float]:
    """The trained model's, by all that fine-tuning may decide by.

    Args:
      params: the trained model, before any phase changes it.

    Returns:
      What is to stand in results.json with training, and what ends fine-tuning
      early (`--fine_tune_drop`) is relative to.
    """
    reported = self._reported_rounds(0)
    if reported is not None:
      return {_ACCURACY: reported(params, 0)}
    everything = self.experiment.validation
    assert everything is not None
    found = {_ACCURACY: everything}
    for name, kind, _ in course(self.config.phases):
      if kind == "ft":
        deciding, _ = self._server_images(name)
        if deciding is not None and deciding is not everything:
          found[_LEFT] = deciding
    model = self.experiment.model
    return {
      key: float(evaluate.measure(model, params, examples))
      for key, examples in found.items()
    }

  def _server_images(
    self, name: str
  ) -> tuple[evaluate.Examples | None, evaluate.Examples | None]:
    """The server's images that decide in a phase, and those it may train on.

    Accuracy on images that a model was trained on says little: in a chain, the
    server's own training leaves some for fp, ft, aw and ffst after it to decide
    by. None decide where clients do.
    """
    everything, config = self.experiment.validation, self.config
    if not config.server_decides:
      return None, everything
    if everything is None or not config.holds_out:
      return everything, everything
    left, taught = phases.set_aside(
      everything, config.server_holdout, config.seed
    )
    *before, _ = name.split("+")
    after = config.phases[len(before) + 1 :]
    return (
      left if {*before} & {*configs.training_alone()} else everything,
      taught if {*after} & {*pipeline.PHASES} else everything,
    )

  def _curves(self) -> pipeline.Curves:
    experiment = self.experiment
    if self._deciding is not None:
      return pipeline.validation_curves(experiment.model, self._deciding)
    return pipeline.reported_curves(
      experiment.model, self._reporting(), **self._as_received()
    )

  def _reporting(self) -> federations.Federation | populations.Population:
    """The clients, with the images that they report accuracies on."""
    kept_back = self.experiment.client_validation
    return self.experiment.federation if kept_back is None else kept_back

  def _as_received(self) -> dict[str, Any]:
    """What becomes of the accuracies that clients report."""
    return {
      "trim": self.config.report_trim,
      "report": functools.partial(self._reported, kind="accuracies"),
    }

  def _reported_rounds(
    self, most: int
  ) -> Callable[[models.Params, int], float] | None:
    """What clients say of rounds of fine-tuning, if that is gone by."""
    config = self.config
    if config.server_decides or not config.chooses_round:
      return None
    return pipeline.reported_rounds(
      self.experiment.model,
      self._reporting(),
      rounds=most,
      **self._as_received(),
    )

  def _reported(
    self, values: Array, *, kind: str, triggered: Array | None = None
  ) -> Array:
    """Clients' honest reports as the server receives them."""
    clients = self.experiment.federation
    if isinstance(clients, populations.Population):
      clients = parallel.replicate(clients.clients, clients.mesh)
    return _received(
      values, triggered, clients, attack=self.experiment.attack, kind=kind
    )

  def _shown(self) -> dict[str, evaluate.Examples]:
    shown = {"test_accuracy": self.experiment.test}
    if self.experiment.backdoored is not None:
      shown["attack_success"] = self.experiment.backdoored
    return shown

  def _prune(self, state: Any) -> Outcome:
    """Pruning (FP): federated, or by what the server sees in the weights."""
    config, model = self.config, self.experiment.model
    accuracies = self._curves().pruning
    if config.pruning == configs.GAIN:
      pruned = pipeline.prune_outliers(
        model,
        state.params,
        # For the record; clients are not asked for that.
        accuracies if self._deciding is not None else None,
        neuron_mask=state.neuron_mask,
        threshold=config.pruning_outlier,
      )
    else:
      pruned = pipeline.prune(
        model,
        state.params,
        self._asked(
          functools.partial(reports.client_activations, model, state.params),
          "activations",
        ),
        accuracies,
        neuron_mask=state.neuron_mask,
        method=config.pruning,
        rate=config.pruning_rate,
        max_drop=config.pruning_drop,
        drop_of=config.pruning_drop_of,
      )

    def curve() -> Iterator[dict[str, Any]]:
      order = jnp.asarray(pruned.order)
      columns = {
        key: np.asarray(
          pruning.pruning_curve(model, state.params, order, examples)
        )
        for key, examples in self._shown().items()
      }
      measured = [float(accuracy) for accuracy in pruned.accuracies]
      for step in range(model.neurons + 1):
        yield {
          "pruned_neurons": step,
          "neuron": int(pruned.order[step - 1]) if step else None,
          "accuracy": measured[step] if measured else None,
          **{key: float(column[step]) for key, column in columns.items()},
        }

    after = state.replace(params=pruned.params, neuron_mask=pruned.neuron_mask)
    facts: dict[str, Any] = {
      "pruned_neurons": pruned.num_pruned,
      "neurons": model.neurons,
    }
    if len(pruned.accuracies):
      facts[ACCURACY_BEFORE] = float(pruned.accuracies[0])
    if pruned.anomaly is not None and np.isfinite(pruned.anomaly):
      facts["largest_anomaly"] = pruned.anomaly
    return after, facts, curve

  def _asked(
    self, question: Callable[[federations.Federation], Array], kind: str
  ) -> Array:
    """What clients answer, as it reaches the server."""
    experiment = self.experiment
    errors.require_choice("kind of report", kind, attacks.KINDS)
    if kind != "activations":
      answers = self._answers(question, self._reporting())
      return self._reported(answers, kind=kind)
    answers = self._answers(question, experiment.federation)
    triggered = None
    if experiment.attack.wants_triggered:
      triggered = populations.ask_clients(
        lambda clients: question(federations.poisoned_only(clients)),
        experiment.federation,
      )
    return self._reported(answers, kind=kind, triggered=triggered)

  def _answers(
    self,
    question: Callable[[federations.Federation], Array],
    clients: federations.Federation | populations.Population,
  ) -> Array:
    answers = populations.ask_clients(question, clients)
    if np.shape(answers)[:1] != (clients.num_clients,):
      raise errors.ConfigError(
        f"a question to {clients.num_clients} clients has answers of shape"
        f" {np.shape(answers)}: they must be [clients, ...]."
      )
    return answers

  def _fine_tune(
    self, name: str, state: Any, trained: Mapping[str, Any]
  ) -> Outcome:
    """Federated fine-tuning (FT), attackers included."""
    config = self.config
    return self._tune(
      name,
      state,
      self.experiment.tuning_block,
      config.fine_tune_rounds,
      patience=config.fine_tune_patience,
      enough=self._enough(trained),
    )

  def _shift_features(self, name: str, state: Any) -> Outcome:
    """Feature Shift Tuning by all clients, attackers included."""
    config, experiment = self.config, self.experiment
    key = jax.random.fold_in(jax.random.key(config.seed), 7)
    params, before = feature_shift.redrawn(
      experiment.model, state.params, *jax.random.split(key)
    )
    told = (before, jnp.float32(config.fst_weight))
    redrawn = parallel.replicate(
      state.replace(params=params, told=told), experiment.mesh
    )
    assert experiment.shift_block is not None
    after, facts, lines = self._tune(
      name,
      redrawn,
      experiment.shift_block,
      config.fst_rounds,
      # What a rule remembers is of another last layer.
      anew=True,
      # Of many rounds of few steps, evaluations would be the most of it.
      shown_every=max(config.fst_rounds // _MOST_SHOWN, 1),
    )
    # If no round is better than chance, the model is what it was.
    after = after.replace(told=()) if facts["kept_round"] else state
    return after, facts, lines

  def _tune(
    self,
    name: str,
    state: Any,
    block: rounds.Block,
    most: int,
    *,
    anew: bool = False,
    shown_every: int = 0,
    **until: Any,
  ) -> Outcome:
    """Rounds with everybody, of which the best is kept (`fine_tune`).

    Another rule than training's begins with a state of its own, which is left
    behind, and so does the same one if it is to begin anew. TA and AA are
    measured every so many rounds; 0 leaves them to the block of rounds, which
    is then training's.
    """
    config, experiment = self.config, self.experiment
    rate = config.fine_tune_learning_rate or config.last_learning_rate
    federation = populations.for_fine_tuning(
      experiment.federation,
      gamma=config.fine_tune_gamma,
      rate=rate / config.last_learning_rate,
    )
    lines: list[dict[str, Any]] = []

    shown = experiment.examples
    # The round that is kept is chosen by it: not where clients decide.
    shown.pop("validation", None)
    examples = {} if shown_every else {**shown}
    if self._deciding is not None:
      examples["validation"] = self._deciding

    def tell(done: int, state: Any, metrics: rounds.RoundMetrics) -> None:
      if shown_every and (done % shown_every == 0 or done == most):
        measured = {
          name: evaluate.measure(experiment.model, state.params, one)
          for name, one in shown.items()
        }
        metrics = metrics.replace(accuracies={**metrics.accuracies, **measured})
      line = {"round": done, **workdirs.metrics_line(metrics)}
      lines.append(line)
      if not done:
        # The model as it came in, which no client trained.
        del line["loss"]
        return
      self.console.advance(
        done, line.get("test_accuracy"), line.get("attack_success")
      )
      # Nothing of this phase is saved before its end; it is short.
      if done < most:
        self.check_stop()

    self.console.start(name, most, 0)
    of_training = state.aggregator
    anew = anew or "aggregation" in config.tuning
    if anew:
      state = state.replace(aggregator=experiment.init_tuning(state.params))
    tuned = pipeline.fine_tune(
      block,
      state,
      federation,
      experiment.key,
      rounds=most,
      reported=self._reported_rounds(most),
      examples=examples,
      on_round=tell,
      **until,
    )
    if tuned.bad_round:
      raise errors.DivergedError(
        f"{name} became not finite in its round {tuned.rounds}: lower"
        " --fine_tune_learning_rate or --fine_tune_gamma in another --workdir,"
        " with --trained_in=this one, or limit gradients by"
        " --gradient_clip=1. The last good checkpoint, of"
        f" the phase before, is in {self.workdir.path / workdirs.CHECKPOINTS}."
      )
    facts = {"fine_tune_rounds": tuned.rounds, "kept_round": tuned.kept}
    after = tuned.state
    if anew:
      after = after.replace(aggregator=of_training)
    return after, facts, lambda: iter(lines)

  def _enough(self, trained: Mapping[str, Any]) -> float | None:
    """With what accuracy fine-tuning is done, if that was asked for."""
    drop = self.config.fine_tune_drop
    if drop < 0:
      return None
    # Of the images that decide now.
    everything = self.experiment.validation
    left = self._deciding is not None and self._deciding is not everything
    return float(trained[_LEFT if left else _ACCURACY]) - drop

  def _adjust(self, state: Any) -> Outcome:
    """Adjusting extreme weights (AW)."""
    config, model = self.config, self.experiment.model
    adjusted = pipeline.adjust(
      model,
      state.params,
      state.neuron_mask,
      self._curves().delta,
      start=config.delta_start,
      step=config.delta_step,
      max_drop=config.adjusting_drop,
      statistics_over=config.weight_statistics,
    )
    # JSON knows no infinity: None is "no weight was adjusted".
    finite = [
      float(delta) if np.isfinite(delta) else None for delta in adjusted.deltas
    ]

    def curve() -> Iterator[dict[str, Any]]:
      columns = {
        key: list(
          pipeline.delta_accuracies(
            model,
            state.params,
            examples,
            mean=adjusted.mean,
            std=adjusted.std,
            deltas=adjusted.deltas,
          )
        )
        for key, examples in self._shown().items()
      }
      for step, accuracy in enumerate(adjusted.accuracies):
        yield {
          "delta": finite[step],
          "accuracy": float(accuracy),
          **{key: column[step] for key, column in columns.items()},
        }

    facts = {
      "zeroed_weights": adjusted.zeroed,
      "delta": adjusted.delta if np.isfinite(adjusted.delta) else None,
      "weight_mean": adjusted.mean,
      "weight_std": adjusted.std,
      ACCURACY_BEFORE: float(adjusted.accuracies[0]),
    }
    return state.replace(params=adjusted.params), facts, curve

  def _mitigate(
    self,
    name: str,
    kind: str,
    state: Any,
    validation: evaluate.Examples | None,
  ) -> Outcome:
    """A baseline; it has no curve.

    All but the oracle, which has the test images, see the server's own.
    """
    config, experiment = self.config, self.experiment
    subject = (experiment.model, state.params)
    tuning: dict[str, Any] = {
      "key": jax.random.fold_in(jax.random.key(config.seed), 4),
      "learning_rate": config.server_learning_rate,
      "gradient_clip": config.gradient_clip,
      "mesh": experiment.mesh,
      "on_progress": self._progress(name),
    }
    longer: dict[str, Any] = {
      **tuning,
      "epochs": config.server_epochs,
      "augmentation": config.augment,
    }
    # `Config` demands attackers for the oracle, and validation images for all
    # others of fljax's own.
    if kind in phases.DEFENCES:
      mitigated = self._by_own_defence(kind, state, validation, tuning)
    elif kind == "nc-oracle":
      assert experiment.backdoored is not None
      memory = _Memory(self.workdir, kind, state.params)
      with memory:
        mitigated = phases.cleanse_as_oracle(
          *subject,
          state.neuron_mask,
          experiment.test,
          experiment.backdoored,
          target=config.target_label,
          settings=phases.ORACLE._replace(steps=config.nc_steps),
          max_drop=config.pruning_drop,
          memory=memory,
          **tuning,
        )
      mitigated.facts["seconds_before"] = memory.before
    elif kind == "fine-pruning":
      assert validation is not None
      mitigated = phases.prune_and_tune(
        *subject,
        state.neuron_mask,
        validation,
        max_drop=config.pruning_drop,
        **longer,
      )
    elif kind == "fst":
      assert validation is not None
      mitigated = phases.shift_features(
        *subject,
        state.neuron_mask,
        validation,
        weight=config.fst_weight,
        **longer,
      )
    else:
      assert validation is not None
      suspects, before = self._suspects(name, state, key=tuning["key"])
      mitigated = phases.cleanse(
        *subject,
        state.neuron_mask,
        validation,
        suspects,
        by=kind.removeprefix("nc-"),
        max_drop=config.pruning_drop,
        **tuning,
      )
      mitigated.facts["seconds_before"] = before
    if not all(
      np.isfinite(leaf).all() for leaf in jax.tree.leaves(mitigated.params)
    ):
      raise errors.DivergedError(
        f"{kind} became not finite{_mending(kind)}. The last good checkpoint"
        f" is in {self.workdir.path / workdirs.CHECKPOINTS}."
      )
    after = state.replace(
      params=mitigated.params, neuron_mask=mitigated.neuron_mask
    )
    after = parallel.replicate(after, experiment.mesh)
    return after, mitigated.facts, lambda: iter(())

  def _by_own_defence(
    self,
    kind: str,
    state: Any,
    validation: evaluate.Examples | None,
    tuning: dict[str, Any],
  ) -> phases.Mitigated:
    """What a defence of a user's own makes of a model, looked at.

    What it tells is by itself, as names may be those of facts told here.
    """
    experiment = self.experiment
    mitigated = phases.DEFENCES[kind].run(
      phases.Subject(
        model=experiment.model,
        params=state.params,
        neuron_mask=state.neuron_mask,
        images=validation,
        ask=self._asked,
        config=self.config,
        **{key: tuning[key] for key in ("key", "mesh", "on_progress")},
      ),
      **self.config.parameters_of("defence", kind),
    )
    for name, was in (
      ("params", state.params),
      ("neuron_mask", state.neuron_mask),
    ):
      extensions.require_form(
        f"--cleanse={kind}: its {name}", getattr(mitigated, name), was
      )
    told = {
      name: extensions.plain(value, f"--cleanse={kind}: its fact {name!r}")
      for name, value in mitigated.facts.items()
    }
    # Whatever it did, what is pruned stays so.
    mask = state.neuron_mask & mitigated.neuron_mask
    facts: dict[str, Any] = {}
    if told:
      facts["facts"] = told
    pruned = int((state.neuron_mask & ~mask).sum())
    if pruned:
      facts |= {"pruned_neurons": pruned, "neurons": experiment.model.neurons}
    params = models.mask_neurons(experiment.model, mitigated.params, mask)
    return phases.Mitigated(params, mask, facts)

  def _progress(self, name: str) -> phases.OnProgress:
    """Shows how far a phase is, and ends it if someone asked for that."""
    shown: str | None = None

    def tell(what: str, done: int, total: int) -> None:
      nonlocal shown
      if what != shown:
        self.console.stop()
        self.console.start(f"{name}: {what}", total, 0, unit="step")
        shown = what
      self.console.advance(done)
      # Nothing of this phase is saved before its end.
      if done < total:
        self.check_stop()

    return tell

  def _suspects(
    self, name: str, state: Any, *, key: Array
  ) -> tuple[phases.Suspects, float]:
    """What Neural Cleanse finds, once per model; and seconds spent before."""
    if self._found is not None and self._found[0] is state.params:
      return self._found[1], self._found[2]
    config, experiment = self.config, self.experiment
    assert experiment.validation is not None
    started = time.perf_counter()
    memory = _Memory(self.workdir, "suspects", state.params)
    with memory:
      suspects = phases.find_suspects(
        experiment.model,
        state.params,
        experiment.validation,
        key=key,
        settings=neural_cleanse.OFFICIAL._replace(
          learning_rate=config.nc_learning_rate, steps=config.nc_steps
        ),
        mesh=experiment.mesh,
        on_progress=self._progress(name),
        memory=memory,
      )
    seconds = time.perf_counter() - started + memory.before
    self._found = (state.params, suspects, seconds)
    return suspects, memory.before


@functools.partial(jax.jit, static_argnames=("attack", "kind"))
def _received(
  values: Array,
  triggered: Array | None,
  federation: federations.Federation,
  *,
  attack: attacks.Attack,
  kind: str,
) -> Array:
  """Honest reports as attackers send theirs, in all processes."""
  clients = parallel.without_padding(federation)
  sent = attack.report(values, clients, kind=kind, triggered=triggered)
  return parallel.everywhere(sent, federation.mesh)


class _Memory:
  """Keeps a search of Neural Cleanse in the folder of the run.

  It is kept once a minute, when the run is asked to stop, and at its end, for
  another phase that begins with it.

  Attributes:
    before: seconds spent on it by earlier processes.
  """

  def __init__(
    self,
    workdir: workdirs.Workdir | workdirs.Shared,
    what: str,
    params: models.Params,
  ):
    self._workdir = workdir
    self._key = workdirs.digest_of(parallel.on_host(params), {"what": what})
    self._started = self._kept = time.perf_counter()
    self._last: tuple[neural_cleanse.Search, float] | None = None
    self.before = 0.0

  def __enter__(self) -> _Memory:
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    # Every process of the run gets this one.
    if isinstance(error, errors.InterruptedRunError):
      self._write()

  def load(self, like: neural_cleanse.Search) -> neural_cleanse.Search | None:
    found = self._workdir.kept(self._key, like)
    if found is None:
      return None
    search, self.before = found
    return search

  def keep(self, search: neural_cleanse.Search, *, at_end: bool) -> None:
    now = time.perf_counter()
    self._last = search, self.before + now - self._started
    # One process's clock is not another's.
    due = now - self._kept >= _SECONDS_BETWEEN_KEEPING
    if parallel.anywhere(due) or at_end:
      self._write()

  def _write(self) -> None:
    if self._last is not None:
      search, seconds = self._last
      self._workdir.keep(self._key, parallel.on_host(search), seconds)
      self._last, self._kept = None, time.perf_counter()


def _mending(kind: str) -> str:
  """What to do about a phase that is not finite, where that is known."""
  if kind in phases.DEFENCES:
    return ""
  return (
    ": lower --server_learning_rate, or limit gradients by --gradient_clip=1"
  )
