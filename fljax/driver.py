"""Drives one experiment through its phases: checkpoints, metrics, the console.

What is computed is in `experiment` (as values) and in the rooms below it; here
is when, and what becomes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import importlib.metadata
from pathlib import Path
import platform
import signal
import time
from typing import TYPE_CHECKING
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fljax
from fljax import attacks
from fljax import config as configs
from fljax import console as consoles
from fljax import data
from fljax import errors
from fljax import evaluate
from fljax import extensions
from fljax import federation as federations
from fljax import models
from fljax import parallel
from fljax import population as populations
from fljax import rounds
from fljax import triggers
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
Config = configs.Config

TRAINING = "training"
# Of a search: the accuracy, as it sees it, of the model that it began with.
ACCURACY_BEFORE = "accuracy_before"
# Of the trained model, where fine-tuning may end at what it had: on all of the
# server's images, or as clients report it; and on those of the server's that
# its own training leaves out.
_ACCURACY, _LEFT = "accuracy", "accuracy_left_out"
# How much of a search is lost by `kill -9`.
_SECONDS_BETWEEN_KEEPING = 60


def interrupted(stop: Stop, path: Any) -> errors.InterruptedRunError:
  """What is said when a run stops because it was asked to."""
  # Only some of several processes may have got a signal.
  by = "another process"
  if stop.signal is not None:
    by = signal.Signals(stop.signal).name
  return errors.InterruptedRunError(
    f"stopped by {by}; the same command continues the run in {path}."
  )


class Stop:
  """Whether someone asked the run to stop.

  The first SIGTERM or Ctrl-C lets the block of rounds finish and be saved, or
  a phase come to the next place where it can be left; the second has its
  usual effect.
  """

  def __init__(self) -> None:
    self.signal: int | None = None
    self._before: dict[int, Any] = {}

  @classmethod
  @contextlib.contextmanager
  def on_signals(cls) -> Iterator[Stop]:
    """Listens while the block runs; not possible in other threads."""
    stop = cls()
    try:
      for number in (signal.SIGINT, signal.SIGTERM):
        stop._before[number] = signal.signal(number, stop._handle)
    except ValueError:  # Not the main thread.
      pass
    try:
      yield stop
    finally:
      stop._restore()

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    self.signal = number
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}


class Driver:
  """Drives one experiment through its phases.

  Attributes:
    experiment: the experiment.
    workdir: its folder, opened under its identity.
    console: where it is told.
    state: the server's state, from `restore` on.
    seconds: spent in training so far.
    phases: what results.json will say about those that are done.
  """

  def __init__(
    self,
    experiment: Experiment,
    workdir: workdirs.Workdir | workdirs.Shared,
    console: consoles.Console,
    stop: Stop,
  ):
    self.experiment = experiment
    self.config = experiment.config
    self.workdir = workdir
    self.console = console
    self.stop = stop
    self.state: Any = None
    self.seconds = 0.0
    self.phases: list[dict[str, Any]] = []
    self._traced = False
    # The server's images that decide in the phase in progress.
    self._deciding: evaluate.Examples | None = None
    # The model that Neural Cleanse looked at last, what it found, in seconds.
    self._found: tuple[Any, phases.Suspects, float] | None = None

  # --- the course of the run -------------------------------------------------

  def check(self) -> None:
    """Refuses what `claim` refuses, and writes nothing."""
    self.workdir.check(*self._claimed())

  def claim(self) -> None:
    """Makes the folder this run's; see `Workdir.claim`."""
    self.workdir.claim(*self._claimed())

  def _claimed(self) -> tuple[dict[str, str], str, dict[str, Any]]:
    config = self.config
    return self.experiment.digests, config.trained_in, config.training()

  def restore(self) -> None:
    """Takes up the newest checkpoint of a claimed folder, or begins."""
    self.state = self.experiment.init_state()
    restored = self.workdir.restore(self.state, self.console.say)
    if restored is None and self.config.trained_in:
      restored = self.workdir.adopt(
        self.config.trained_in, self.config.training(), self.state
      )
    if restored is not None:
      self._go_on_from(*restored)

  def take_over(self, folder: str) -> None:
    """Goes on from the trained model of another run, instead of training.

    Raises:
      errors.WorkdirError, errors.CheckpointError: see `Workdir.adopt`.
    """
    self._go_on_from(
      *self.workdir.adopt(folder, self.config.training(), self.state)
    )

  def _go_on_from(self, loaded: Any, progress: workdirs.Progress) -> None:
    self.state = parallel.replicate(
      jax.tree.map(jnp.asarray, loaded), self.experiment.mesh
    )
    self.phases, self.seconds = progress.phases, progress.seconds
    where = f"after round {int(self.state.round)}"
    if progress.complete:
      where = f"after phase {progress.phase}"
    self.console.say(f"continuing in {self.workdir.path} {where}")

  @property
  def trained(self) -> bool:
    """Whether training is done."""
    return any(phase["name"] == TRAINING for phase in self.phases)

  def finish(self) -> dict[str, Any]:
    """Runs every phase that is not done yet, and writes the results.

    Returns:
      The contents of results.json.
    """
    try:
      if not self.trained:
        self._train()
      if self.config.profile and not self._traced:
        self.console.say(
          "no round was traced (--profile): that is the first one after the"
          " first block of rounds that a run trains by itself."
        )
      if self.config.fine_tune_drop >= 0 and len(self.phases) == 1:
        # What `_enough` is relative to, before any phase changes the model.
        self.phases[0] |= self._accuracies_before()
      done = {phase["name"] for phase in self.phases}
      for name, kind, side in course(self.config.phases):
        if name not in done:
          self._check_stop()
          after = self._phase(name, kind, self.state)
          self._finish(name, after, side=side)
          if not side:
            self.state = after
    finally:
      self.console.stop()
      # A sweep keeps its drivers; a model each need not stay on the device.
      self._found = None
    results = {
      "config": self.config.identity(),
      "environment": environment(self.experiment.mesh),
      "phases": self.phases,
      "seed": self.config.seed,
    }
    self.workdir.forget()
    self.workdir.write_json(workdirs.RESULTS, results)
    write_report(self.config, results, self.workdir, self.experiment.dataset)
    return results

  def stopping(self) -> bool:
    """Whether someone asked the run, or another process of it, to stop."""
    return parallel.anywhere(self.stop.signal is not None)

  def _check_stop(self) -> None:
    if self.stopping():
      raise interrupted(self.stop, self.workdir.path)

  def _finish(self, name: str, state: Any, *, side: bool) -> None:
    """Tells, and saves, the end of a phase."""
    phase = self.phases[-1]
    self.console.say(
      f"{name}: TA {consoles.percent(phase['test_accuracy'])}  AA"
      f" {consoles.percent(phase['attack_success'])} "
      f" {consoles.detail(phase)}".rstrip()
    )
    self.workdir.save(
      state,
      phase=name,
      complete=True,
      side=side,
      phases=self.phases,
      seconds=0.0,
    )

  def _record(
    self, name: str, state: Any, seconds: float, **facts: Any
  ) -> None:
    accuracy, success = self._measure(state.params)
    self.phases.append(
      {
        "name": name,
        "test_accuracy": accuracy,
        "attack_success": success,
        "seconds": seconds,
        **facts,
      }
    )

  def _measure(self, params: models.Params) -> tuple[float, float | None]:
    """TA and AA."""
    experiment = self.experiment
    accuracy = evaluate.measure(experiment.model, params, experiment.test)
    if experiment.backdoored is None:
      return float(accuracy), None
    success = evaluate.measure(experiment.model, params, experiment.backdoored)
    return float(accuracy), float(success)

  # --- training --------------------------------------------------------------

  def _train(self) -> None:
    """Federated training, in blocks between evaluations."""
    config = self.config
    state, self.state = self.state, None
    started = time.perf_counter() - self.seconds
    done = int(state.round)
    self.console.start(TRAINING, config.rounds, done)
    # The second block is looked at: the first one compiles.
    looked_at = 1 if config.profile else -1
    blocks = 0
    while done < config.rounds:
      length = 1 if blocks == looked_at else self.block_length(done)
      last_good = jax.tree.map(jnp.copy, state)
      with self._trace() if blocks == looked_at else contextlib.nullcontext():
        state, metrics = self.experiment.block(
          state,
          self.experiment.federation,
          self.experiment.key,
          length,
          self.experiment.examples,
        )
        bad = int(metrics.bad_round)
      blocks += 1
      self.seconds = time.perf_counter() - started
      if bad:
        raise self.diverged(last_good, bad)
      done += length
      line = self.log_training(done, metrics)
      if line is not None:
        self.console.advance(
          done, line["test_accuracy"], line["attack_success"]
        )
      self.seconds = time.perf_counter() - started
      if done < config.rounds and self.stopping():
        self.save_training(state)
        self._check_stop()
      if self.due(done):
        self.save_training(state)
    self.console.stop()
    self.seconds = time.perf_counter() - started
    self.end_training(state)

  @contextlib.contextmanager
  def _trace(self) -> Iterator[None]:
    """Writes what happens on the devices, for TensorBoard and Perfetto."""
    self._traced = True
    if jax.process_index():
      yield
      return
    folder = self.workdir.path / workdirs.PROFILE
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
      yield
    self.console.say(
      f"trace of a round in {folder}: TensorBoard, or"
      " perfetto_trace.json.gz at https://ui.perfetto.dev"
    )

  def block_length(self, done: int) -> int:
    """Rounds until the next evaluation, checkpoint or the end.

    Every block ends at a multiple, wherever the run was interrupted.
    """
    config = self.config
    return min(
      config.eval_every - done % config.eval_every,
      config.checkpoint_every - done % config.checkpoint_every,
      config.rounds - done,
    )

  def log_training(
    self, done: int, metrics: rounds.RoundMetrics
  ) -> dict[str, Any] | None:
    """Logs a block's metrics, if they are to be seen after so many rounds."""
    config = self.config
    if done % config.eval_every and done != config.rounds:
      return None
    line = _line(metrics)
    self.workdir.log(phase=TRAINING, round=done, **line)
    return line

  def due(self, done: int) -> bool:
    """Whether a checkpoint is to be saved after so many rounds."""
    return (
      done % self.config.checkpoint_every == 0 and done < self.config.rounds
    )

  def save_training(self, state: Any) -> None:
    """Saves a checkpoint within training."""
    self.workdir.save(
      state,
      phase=TRAINING,
      complete=False,
      side=False,
      phases=self.phases,
      seconds=self.seconds,
    )

  def end_training(self, state: Any) -> None:
    """Measures and saves the trained model, which the run goes on from."""
    self.state = state
    # Of another run that takes this model over, it is not the environment.
    where = environment(self.experiment.mesh)
    self._record(TRAINING, state, self.seconds, environment=where)
    self._finish(TRAINING, state, side=False)

  def diverged(self, last_good: Any, bad_round: int) -> errors.DivergedError:
    """Saves the last good state, and says what happened after it."""
    self.save_training(last_good)
    return errors.DivergedError(
      f"training became not finite in round {bad_round}: lower"
      " --learning_rate or --gamma, or limit gradients by --gradient_clip=1."
      " The last good checkpoint, of round"
      f" {int(last_good.round)}, is in"
      f" {self.workdir.path / workdirs.CHECKPOINTS}."
    )

  # --- cleansing -------------------------------------------------------------

  def _phase(self, name: str, kind: str, state: Any) -> Any:
    started = time.perf_counter()
    run_phase = {
      "fp": self._prune,
      "ft": self._fine_tune,
      "aw": self._adjust,
      "ffst": self._shift_features,
    }
    self._deciding, teaching = self._server_images(name)
    if kind in run_phase:
      state, facts, curve = run_phase[kind](name, state)
    else:
      state, facts, curve = self._mitigate(name, kind, state, teaching)
    jax.block_until_ready(state)
    self.console.stop()
    # What another phase found for this one counts as if it had been done here.
    seconds = time.perf_counter() - started + facts.pop("seconds_before", 0.0)
    self._record(name, state, seconds, **facts)
    # TA and AA along the curve are for the figures, not for the choice, and
    # are no part of the phase's time.
    for line in curve():
      self.workdir.log(phase=name, **line)
    return state

  def _server_images(
    self, name: str
  ) -> tuple[evaluate.Examples | None, evaluate.Examples | None]:
    """The server's images that decide in a phase, and those it may train on.

    Accuracy on images that a model was trained on says little: in a chain, the
    server's own training leaves some for the phases after it to decide by.
    None decide where clients do.
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

  def _prune(self, name: str, state: Any) -> tuple[Any, dict[str, Any], Any]:
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
    self, name: str, state: Any
  ) -> tuple[Any, dict[str, Any], Any]:
    """Federated fine-tuning (FT), attackers included."""
    config = self.config
    return self._tune(
      name,
      state,
      self.experiment.tuning_block,
      config.fine_tune_rounds,
      patience=config.fine_tune_patience,
      enough=self._enough(),
    )

  def _shift_features(
    self, name: str, state: Any
  ) -> tuple[Any, dict[str, Any], Any]:
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
    **until: Any,
  ) -> tuple[Any, dict[str, Any], Any]:
    """Rounds with everybody, of which the best is kept (`fine_tune`).

    Another rule than training's begins with a state of its own, which is left
    behind, and so does the same one if it is to begin anew.
    """
    config, experiment = self.config, self.experiment
    rate = config.fine_tune_learning_rate or config.last_learning_rate
    federation = populations.for_fine_tuning(
      experiment.federation,
      gamma=config.fine_tune_gamma,
      rate=rate / config.last_learning_rate,
    )
    lines: list[dict[str, Any]] = []

    def tell(done: int, state: Any, metrics: rounds.RoundMetrics) -> None:
      del state
      line = {"round": done, **_line(metrics)}
      lines.append(line)
      if not done:
        # The model as it came in, which no client trained.
        del line["loss"]
        return
      self.console.advance(done, line["test_accuracy"], line["attack_success"])
      # Nothing of this phase is saved before its end; it is short.
      if done < most:
        self._check_stop()

    self.console.start(name, most, 0)
    examples = experiment.examples
    # The round that is kept is chosen by it: not where clients decide.
    examples.pop("validation", None)
    if self._deciding is not None:
      examples["validation"] = self._deciding
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

  def _enough(self) -> float | None:
    """With what accuracy fine-tuning is done, if that was asked for."""
    drop = self.config.fine_tune_drop
    if drop < 0:
      return None
    # Of the images that decide now.
    everything = self.experiment.validation
    left = self._deciding is not None and self._deciding is not everything
    trained = self.phases[0][_LEFT if left else _ACCURACY]
    return float(trained) - drop

  def _accuracies_before(self) -> dict[str, float]:
    """The trained model's, by all that fine-tuning may decide by."""
    params = self.state.params
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

  def _adjust(self, name: str, state: Any) -> tuple[Any, dict[str, Any], Any]:
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
  ) -> tuple[Any, dict[str, Any], Any]:
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
      memory = _Memory(self, kind, state.params)
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
        self._check_stop()

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
    memory = _Memory(self, "suspects", state.params)
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

  def __init__(self, driver: Driver, what: str, params: models.Params):
    self._driver = driver
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
    found = self._driver.workdir.kept(self._key, like)
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
      self._driver.workdir.keep(self._key, parallel.on_host(search), seconds)
      self._last, self._kept = None, time.perf_counter()


def _mending(kind: str) -> str:
  """What to do about a phase that is not finite, where that is known."""
  if kind in phases.DEFENCES:
    return ""
  return (
    ": lower --server_learning_rate, or limit gradients by --gradient_clip=1"
  )


def _line(metrics: rounds.RoundMetrics) -> dict[str, Any]:
  """What a block's metrics say, as metrics.jsonl has it."""
  measured = {name: float(value) for name, value in metrics.accuracies.items()}
  line = {
    "loss": float(metrics.loss),
    "test_accuracy": measured["test"],
    "attack_success": measured.get("backdoored"),
  }
  # As in the searches: what the server can go by.
  for name in ("validation", "reported"):
    if name in measured:
      line["accuracy"] = measured[name]
  return line


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


def write_report(
  config: Config,
  results: dict[str, Any],
  workdir: workdirs.Workdir | workdirs.Shared,
  dataset: data.Dataset | None = None,
) -> None:
  """Draws figures and the report of a complete run, if wanted and missing.

  Args:
    config: its settings.
    results: the contents of its results.json.
    workdir: its folder.
    dataset: its data; None loads it if need be.
  """
  # An earlier version's results lack what it did not have.
  results = {**results, "config": {**config.defaults(), **results["config"]}}

  def write(workdir: workdirs.Workdir) -> None:
    if (workdir.path / workdirs.REPORT).exists():
      return
    # matplotlib is slow to import, and not needed to train.
    from fljax import report

    images = dataset or data.load(
      config.dataset, config.data_dir or None, download=config.download
    )
    shown = trigger_images(config, images)
    report.write(workdir, results, shown)

  if config.figures:
    workdir.report(write)


def trigger_images(
  config: Config, dataset: data.Dataset
) -> list[tuple[str, np.ndarray]]:
  """A test image of the victim label, clean and stamped, with captions.

  It is the first of those that are darkest where the trigger goes.
  """
  if not config.num_attackers:
    return []
  pieces = triggers.pieces(
    config.trigger,
    dataset.train_images.shape[1:],
    **config.parameters_of("trigger", config.trigger),
  )
  whole = triggers.union(pieces)
  victims = dataset.test_images[dataset.test_labels == config.victim_label]
  victims = victims if len(victims) else dataset.test_images
  covered = victims[:, np.asarray(whole.mask)[..., 0] > 0]
  brightness = covered.reshape(len(victims), -1).mean(axis=1)
  image = victims[int(np.argmin(brightness))]
  stamped = [("original", image)]
  if len(pieces) > 1:
    for index, piece in enumerate(pieces):
      stamped.append(
        (f"attacker {index}", np.asarray(triggers.stamp(image, piece)))
      )
  stamped.append(
    (
      f"{config.victim_label} → {config.target_label}",
      np.asarray(triggers.stamp(image, whole)),
    )
  )
  return stamped


def _processor() -> str:
  """The CPU's model, by which runs differ as sums are ordered otherwise."""
  with contextlib.suppress(OSError):
    # Where Linux has it; `platform` knows no more than the architecture there.
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      name, _, value = line.partition(":")
      if name.strip() == "model name":
        return value.strip()
  return platform.processor() or platform.machine()


def environment(mesh: parallel.Mesh | None) -> dict[str, Any]:
  """What the run ran on; the mesh says on how many of the devices."""
  return {
    "fljax": fljax.__version__,
    "python": platform.python_version(),
    **{
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "flax", "optax")
    },
    "platform": platform.platform(),
    "processor": _processor(),
    "backend": jax.default_backend(),
    "devices": 1 if mesh is None else mesh.size,
    "device_kind": jax.devices()[0].device_kind,
  }
