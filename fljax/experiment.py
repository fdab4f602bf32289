"""One experiment, from a config to results: phases, checkpoints, metrics.

`setup` builds everything that a config describes as values and pure
functions; `run` drives them. Only `run` touches files and the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import importlib.metadata
import platform
import signal
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fljax
from fljax import aggregators
from fljax import attacks
from fljax import config as configs
from fljax import console as consoles
from fljax import data
from fljax import errors
from fljax import evaluate
from fljax import execution
from fljax import federation as federations
from fljax import layers
from fljax import local
from fljax import models
from fljax import partition as partitions
from fljax import rounds
from fljax import triggers
from fljax import workdir as workdirs
from fljax.cleanse import pipeline
from fljax.cleanse import pruning
from fljax.cleanse import reports

Array = jax.Array
Config = configs.Config

TRAINING = "training"


class Experiment(NamedTuple):
  """Everything a config describes.

  Attributes:
    config: the settings.
    dataset: images and labels.
    pieces: the attackers' triggers.
    trigger: their union, stamped at test time.
    model: the network.
    federation: all clients, poisoned.
    attack: the attackers' hooks.
    aggregator: the server's rule.
    block: rounds of training as one program; it donates its state.
    key: the random key of training.
    validation: the server's own images, or None.
    test: the whole test split, for TA.
    backdoored: stamped test images, for AA; None without attackers.
  """

  config: Config
  dataset: data.Dataset
  pieces: list[triggers.Trigger]
  trigger: triggers.Trigger
  model: models.Model
  federation: federations.Federation
  attack: attacks.Attack
  aggregator: aggregators.Aggregator
  block: rounds.Block
  key: Array
  validation: evaluate.Examples | None
  test: evaluate.Examples
  backdoored: evaluate.Examples | None

  def init_state(self) -> rounds.ServerState:
    """The server's state before the first round."""
    key = jax.random.fold_in(jax.random.key(self.config.seed), 2)
    return rounds.init_state(self.model, self.aggregator, key)


def setup(config: Config) -> Experiment:
  """Builds an experiment.

  Args:
    config: its settings.

  Returns:
    The experiment; nothing has been trained, and nothing written but caches.

  Raises:
    errors.DataError: the data set cannot be had.
    errors.ConfigError: a setting does not fit the data set or the network.
  """
  dataset = data.load(
    config.dataset, config.data_dir or None, download=config.download
  )
  image_shape = dataset.train_images.shape[1:]
  _check_labels(config, dataset)
  held_out, partition = _partition(config, dataset)
  pieces = triggers.pieces(config.trigger, image_shape)
  root = jax.random.key(config.seed)

  attack = attacks.chain(
    attacks.backdoor(
      victim_label=config.victim_label,
      target_label=config.target_label,
      fraction=config.poison_fraction,
    ),
    attacks.model_replacement(config.gamma),
    attacks.REPORTS[config.attacker_reports],
  )
  federation = federations.create(
    dataset.train_images,
    dataset.train_labels,
    partition,
    num_attackers=config.num_attackers,
    pieces=pieces,
    attack_start=config.attack_start,
  )
  federation = jax.jit(attack.data)(federation, jax.random.fold_in(root, 1))
  poisons = np.any(federation.poisoned, axis=1).tolist()
  for client in range(config.num_attackers):
    if not poisons[client]:
      raise errors.ConfigError(
        f"attacker {client} has no image of --victim_label="
        f"{config.victim_label} to backdoor, or too few samples for"
        f" --poison_fraction={config.poison_fraction:g}."
      )

  plan = execution.plan_for()
  normalisation: dict[str, tuple[float, ...]] = {}
  if config.normalisation == "standard":
    normalisation = {"mean": dataset.mean, "std": dataset.std}
  model = models.build(
    config.model,
    image_shape=image_shape,
    num_classes=dataset.num_classes,
    **normalisation,
    initialisation=config.initialisation,
    forms=layers.Forms(
      conv=plan.forms.conv if config.conv == "auto" else config.conv,
      pooling=plan.forms.pooling
      if config.pooling == "auto"
      else config.pooling,
    ),
  )
  aggregator = aggregators.AGGREGATORS[config.aggregation]()
  chunk = config.client_chunk
  run_round = rounds.make_round(
    model,
    local.sgd_training(
      model,
      optimizer(config),
      epochs=config.local_epochs,
      batch_size=config.batch_size,
      last_conv_l2=config.last_conv_l2,
    ),
    attack=attack,
    aggregator=aggregator,
    cohort_size=config.clients_per_round,
    server_rate=config.server_rate,
    client_chunk=plan.client_chunk if chunk < 0 else chunk,
  )
  trigger = triggers.union(pieces)
  validation, stamped = None, None
  if len(held_out):
    validation = evaluate.batched(
      dataset.train_images[held_out],
      dataset.train_labels[held_out],
      batch_size=plan.evaluation_batch,
    )
  if config.num_attackers:
    stamped = evaluate.backdoored(
      dataset.test_images,
      dataset.test_labels,
      trigger=trigger,
      victim_label=config.victim_label,
      target_label=config.target_label,
      over=config.attack_images,
      batch_size=plan.evaluation_batch,
    )
  return Experiment(
    config=config,
    dataset=dataset,
    pieces=pieces,
    trigger=trigger,
    model=model,
    federation=federation,
    attack=attack,
    aggregator=aggregator,
    block=rounds.make_block(run_round),
    key=jax.random.fold_in(root, 3),
    validation=validation,
    test=evaluate.batched(
      dataset.test_images,
      dataset.test_labels,
      batch_size=plan.evaluation_batch,
    ),
    backdoored=stamped,
  )


def optimizer(config: Config) -> optax.GradientTransformation:
  """Local SGD with momentum and weight decay."""
  sgd = optax.sgd(config.learning_rate, momentum=config.momentum or None)
  if not config.weight_decay:
    return sgd
  return optax.chain(optax.add_decayed_weights(config.weight_decay), sgd)


def _check_labels(config: Config, dataset: data.Dataset) -> None:
  if not config.num_attackers:
    return
  for name in ("victim_label", "target_label"):
    label = getattr(config, name)
    if label >= dataset.num_classes:
      raise errors.ConfigError(
        f"--{name}={label} is out of range: {dataset.name} has labels 0 to"
        f" {dataset.num_classes - 1}."
      )
  if not (dataset.test_labels == config.victim_label).any():
    raise errors.ConfigError(
      f"{dataset.name} has no test image of --victim_label="
      f"{config.victim_label}."
    )


def _partition(
  config: Config, dataset: data.Dataset
) -> tuple[np.ndarray, partitions.Partition]:
  """The server's validation indices, and who gets which of the rest."""
  labels = dataset.train_labels
  rng = np.random.default_rng(config.seed)
  held_out, pool = partitions.hold_out(len(labels), config.validation_size, rng)
  sizes: dict[str, Any] = {
    "num_clients": config.num_clients,
    "samples_per_client": config.samples_per_client,
    "rng": rng,
  }
  if config.partition == "iid":
    return held_out, partitions.iid(pool, **sizes)
  sizes["num_classes"] = dataset.num_classes
  sizes["required"] = {
    client: config.victim_label for client in range(config.num_attackers)
  }
  if config.partition == "dirichlet":
    return held_out, partitions.dirichlet(
      labels, pool, alpha=config.dirichlet_alpha, **sizes
    )
  return held_out, partitions.by_labels(
    labels, pool, labels_per_client=config.labels_per_client, **sizes
  )


# --- running -----------------------------------------------------------------


def run(config: Config, *, quiet: bool = False) -> dict[str, Any]:
  """Trains, cleanses and reports; continues where an earlier run stopped.

  Args:
    config: the experiment and its workdir.
    quiet: whether to show nothing on the terminal.

  Returns:
    The contents of results.json.

  Raises:
    errors.FljaxError: with one sentence for the user.
  """
  _use_compilation_cache(config)
  console = consoles.Console(quiet=quiet)
  with workdirs.Workdir(config.workdir, config.identity()) as workdir:
    results = workdir.results()
    if results is not None:
      console.say(f"{workdir.path} is complete; nothing is left to do.")
      if config.figures and not (workdir.path / workdirs.REPORT).exists():
        experiment = setup(config)
        workdir.claim(data.digest(experiment.dataset))
        _write_report(workdir, experiment, results)
      return results
    console.say(consoles.header(config))
    with _Stop.on_signals() as stop:
      experiment = setup(config)
      workdir.claim(data.digest(experiment.dataset))
      driver = _Driver(experiment, workdir, console, stop)
      try:
        phases = driver.run()
      finally:
        console.stop()
      results = {
        "config": config.identity(),
        "environment": environment(),
        "phases": phases,
        "seed": config.seed,
      }
      workdir.write_json(workdirs.RESULTS, results)
      if config.figures:
        _write_report(workdir, experiment, results)
    return results


def _write_report(
  workdir: workdirs.Workdir,
  experiment: Experiment,
  results: dict[str, Any],
) -> None:
  # matplotlib is slow to import, and not needed to train.
  from fljax import report

  report.write(workdir, results, trigger_images(experiment))


def trigger_images(experiment: Experiment) -> list[tuple[str, np.ndarray]]:
  """A test image of the victim label, clean and stamped, with captions."""
  if experiment.backdoored is None:
    return []
  config, dataset = experiment.config, experiment.dataset
  victim = dataset.test_labels == config.victim_label
  image = dataset.test_images[int(np.argmax(victim))]
  stamped = [("original", image)]
  if len(experiment.pieces) > 1:
    for index, piece in enumerate(experiment.pieces):
      stamped.append(
        (f"attacker {index}", np.asarray(triggers.stamp(image, piece)))
      )
  stamped.append(
    (
      f"{config.victim_label} → {config.target_label}",
      np.asarray(triggers.stamp(image, experiment.trigger)),
    )
  )
  return stamped


def environment() -> dict[str, Any]:
  """What the run ran on."""
  return {
    "fljax": fljax.__version__,
    "python": platform.python_version(),
    **{
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "flax", "optax")
    },
    "platform": platform.platform(),
    "backend": jax.default_backend(),
    "devices": jax.device_count(),
    "device_kind": jax.devices()[0].device_kind,
  }


def _use_compilation_cache(config: Config) -> None:
  """Keeps compiled programs between runs, unless told not to."""
  if config.compilation_cache == "off":
    return
  folder = (
    str(data.cache_dir() / "programs")
    if config.compilation_cache == "default"
    else config.compilation_cache
  )
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class _Stop:
  """Whether someone asked the run to stop.

  The first SIGTERM or Ctrl-C lets the block of rounds finish and be saved;
  the second has its usual effect.
  """

  def __init__(self) -> None:
    self.signal: int | None = None
    self._before: dict[int, Any] = {}

  @classmethod
  @contextlib.contextmanager
  def on_signals(cls) -> Iterator[_Stop]:
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


class _Driver:
  """Drives one experiment through its phases."""

  def __init__(
    self,
    experiment: Experiment,
    workdir: workdirs.Workdir,
    console: consoles.Console,
    stop: _Stop,
  ):
    self.experiment = experiment
    self.config = experiment.config
    self.workdir = workdir
    self.console = console
    self.stop = stop
    self.phases: list[dict[str, Any]] = []
    self._accuracy = jax.jit(
      lambda params, examples: evaluate.accuracy(
        experiment.model, params, examples
      )
    )

  # --- the course of the run -------------------------------------------------

  def run(self) -> list[dict[str, Any]]:
    """Runs every phase that is not done yet."""
    state = self.experiment.init_state()
    seconds = 0.0
    restored = self.workdir.restore(state)
    if restored is not None:
      loaded, progress = restored
      state = jax.tree.map(jnp.asarray, loaded)
      self.phases, seconds = progress.phases, progress.seconds
      where = f"after round {int(state.round)}"
      if progress.complete:
        where = f"after phase {progress.phase}"
      self.console.say(f"continuing in {self.workdir.path} {where}")
    done = {phase["name"] for phase in self.phases}
    if TRAINING not in done:
      state = self._train(state, seconds)
    for name, kind, side in course(self.config.phases):
      if name not in done:
        self._check_stop()
        after = self._phase(name, kind, state)
        self._finish(name, after, side=side)
        if not side:
          state = after
    return self.phases

  def _check_stop(self) -> None:
    if self.stop.signal is not None:
      raise errors.InterruptedRunError(
        f"stopped by {signal.Signals(self.stop.signal).name}; the same"
        f" command continues the run in {self.workdir.path}."
      )

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
    accuracy = self._accuracy(params, self.experiment.test)
    if self.experiment.backdoored is None:
      return float(accuracy), None
    success = self._accuracy(params, self.experiment.backdoored)
    return float(accuracy), float(success)

  # --- training --------------------------------------------------------------

  def _train(self, state: Any, seconds: float) -> Any:
    """Federated training, in blocks between evaluations."""
    config = self.config
    started = time.perf_counter() - seconds
    done = int(state.round)
    self.console.start(TRAINING, config.rounds, done)
    while done < config.rounds:
      # Every block ends at a multiple, wherever the run was interrupted.
      length = min(
        config.eval_every - done % config.eval_every,
        config.checkpoint_every - done % config.checkpoint_every,
        config.rounds - done,
      )
      last_good = jax.tree.map(jnp.copy, state)
      state, metrics = self.experiment.block(
        state, self.experiment.federation, self.experiment.key, length
      )
      if bad := int(metrics.bad_round):
        self._save_training(last_good, time.perf_counter() - started)
        raise errors.DivergedError(
          f"training became not finite in round {bad}: lower"
          " --learning_rate or --gamma. The last good checkpoint, of round"
          f" {done}, is in {self.workdir.path / workdirs.CHECKPOINTS}."
        )
      done += length
      if done % config.eval_every == 0 or done == config.rounds:
        accuracy, success = self._measure(state.params)
        self.workdir.log(
          phase=TRAINING,
          round=done,
          loss=float(metrics.loss),
          test_accuracy=accuracy,
          attack_success=success,
        )
        self.console.advance(done, accuracy, success)
      seconds = time.perf_counter() - started
      if self.stop.signal is not None and done < config.rounds:
        self._save_training(state, seconds)
        self._check_stop()
      if done % config.checkpoint_every == 0 and done < config.rounds:
        self._save_training(state, seconds)
    self.console.stop()
    self._record(TRAINING, state, time.perf_counter() - started)
    self._finish(TRAINING, state, side=False)
    return state

  def _save_training(self, state: Any, seconds: float) -> None:
    self.workdir.save(
      state,
      phase=TRAINING,
      complete=False,
      side=False,
      phases=self.phases,
      seconds=seconds,
    )

  # --- cleansing -------------------------------------------------------------

  def _phase(self, name: str, kind: str, state: Any) -> Any:
    started = time.perf_counter()
    run_phase = {"fp": self._prune, "ft": self._fine_tune, "aw": self._adjust}
    state, facts, curve = run_phase[kind](name, state)
    jax.block_until_ready(state)
    self._record(name, state, time.perf_counter() - started, **facts)
    # TA and AA along the curve are for the figures, not for the choice, and
    # are no part of the phase's time.
    for line in curve():
      self.workdir.log(phase=name, **line)
    return state

  def _curves(self) -> pipeline.Curves:
    experiment = self.experiment
    if experiment.validation is not None:
      return pipeline.validation_curves(experiment.model, experiment.validation)
    return pipeline.reported_curves(
      experiment.model,
      experiment.federation,
      trim=self.config.report_trim,
      report=functools.partial(
        experiment.attack.report,
        federation=experiment.federation,
        kind="accuracies",
      ),
    )

  def _shown(self) -> dict[str, evaluate.Examples]:
    shown = {"test_accuracy": self.experiment.test}
    if self.experiment.backdoored is not None:
      shown["attack_success"] = self.experiment.backdoored
    return shown

  def _prune(self, name: str, state: Any) -> tuple[Any, dict[str, Any], Any]:
    """Federated pruning (FP)."""
    experiment, config, model = (
      self.experiment,
      self.config,
      self.experiment.model,
    )
    means = reports.client_activations(
      model, state.params, experiment.federation
    )
    means = experiment.attack.report(
      means, experiment.federation, kind="activations"
    )
    pruned = pipeline.prune(
      model,
      state.params,
      means,
      self._curves().pruning,
      method=config.pruning,
      rate=config.pruning_rate,
      max_drop=config.pruning_drop,
    )

    def curve() -> Iterator[dict[str, Any]]:
      order = jnp.asarray(pruned.order)
      columns = {
        key: np.asarray(
          pruning.pruning_curve(model, state.params, order, examples)
        )
        for key, examples in self._shown().items()
      }
      for step, accuracy in enumerate(pruned.accuracies):
        yield {
          "pruned_neurons": step,
          "neuron": int(pruned.order[step - 1]) if step else None,
          "accuracy": float(accuracy),
          **{key: float(column[step]) for key, column in columns.items()},
        }

    after = state.replace(params=pruned.params, neuron_mask=pruned.neuron_mask)
    facts = {"pruned_neurons": pruned.num_pruned, "neurons": model.neurons}
    return after, facts, curve

  def _fine_tune(
    self, name: str, state: Any
  ) -> tuple[Any, dict[str, Any], Any]:
    """Federated fine-tuning (FT), attackers included."""
    config, experiment = self.config, self.experiment
    federation = experiment.federation
    federation = federation.replace(
      scale=jnp.where(
        federation.attacker,
        jnp.float32(config.fine_tune_gamma),
        federation.scale,
      )
    )
    validate = None
    if experiment.validation is not None:
      validate = functools.partial(
        self._accuracy, examples=experiment.validation
      )
    lines: list[dict[str, Any]] = []

    def tell(done: int, state: Any, loss: float, validated: float) -> None:
      accuracy, success = self._measure(state.params)
      line = {
        "round": done,
        "loss": loss,
        "test_accuracy": accuracy,
        "attack_success": success,
      }
      if validate is not None:
        line["accuracy"] = validated
      lines.append(line)
      self.console.advance(done, accuracy, success)
      # Nothing of this phase is saved before its end; it is short.
      self._check_stop()

    self.console.start(name, config.fine_tune_rounds, 0)
    tuned = pipeline.fine_tune(
      experiment.block,
      state,
      federation,
      experiment.key,
      rounds=config.fine_tune_rounds,
      patience=config.fine_tune_patience,
      accuracy=validate,
      on_round=tell,
    )
    self.console.stop()
    if tuned.bad_round:
      raise errors.DivergedError(
        f"fine-tuning became not finite in its round {tuned.rounds}: lower"
        " --learning_rate or --fine_tune_gamma. The last good checkpoint, of"
        f" the phase before, is in {self.workdir.path / workdirs.CHECKPOINTS}."
      )
    facts = {"fine_tune_rounds": tuned.rounds}
    return tuned.state, facts, lambda: iter(lines)

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
    }
    return state.replace(params=adjusted.params), facts, curve


def course(phases: tuple[str, ...]) -> list[tuple[str, str, bool]]:
  """The phases of a run in order.

  Args:
    phases: some of "fp", "ft", "aw", in the order wanted.

  Returns:
    For each: its name in results.json, its kind, and whether it is a side
    result that the next phase does not build on. The paper's full process,
    fp, ft, aw, ends in "all" and also shows "fp+aw".
  """
  steps = [
    ("+".join(phases[: index + 1]), kind, False)
    for index, kind in enumerate(phases)
  ]
  if phases == configs.PHASES:
    steps[-1] = ("all", "aw", False)
    steps.insert(1, ("fp+aw", "aw", True))
  return steps
