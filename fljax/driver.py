"""Drives one experiment through its phases: checkpoints, metrics, the console.

What is computed is in `experiment` (as values), in `cleansing` (the phases
after training) and in the rooms below them; here is when, and what becomes of
it.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
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
from fljax import cleansing
from fljax import config as configs
from fljax import console as consoles
from fljax import data
from fljax import errors
from fljax import evaluate
from fljax import models
from fljax import parallel
from fljax import rounds
from fljax import triggers
from fljax import workdir as workdirs

if TYPE_CHECKING:
  from fljax.experiment import Experiment

Config = configs.Config

TRAINING = "training"


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
      after_training = cleansing.Phases(
        self.experiment, self.workdir, self.console, self._check_stop
      )
      if self.config.profile and not self._traced:
        self.console.say(
          "no round was traced (--profile): that is the first one after the"
          " first block of rounds that a run trains by itself."
        )
      if self.config.fine_tune_drop >= 0 and len(self.phases) == 1:
        self.phases[0] |= after_training.accuracies_before(self.state.params)
      done = {phase["name"] for phase in self.phases}
      for name, kind, side in cleansing.course(self.config.phases):
        if name not in done:
          self._check_stop()
          after = self._phase(after_training, name, kind)
          self._finish(name, after, side=side)
          if not side:
            self.state = after
    finally:
      self.console.stop()
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

  def _phase(
    self, after_training: cleansing.Phases, name: str, kind: str
  ) -> Any:
    """The state after a phase, which is recorded."""
    started = time.perf_counter()
    state, facts, curve = after_training.run(
      name, kind, self.state, self.phases[0]
    )
    jax.block_until_ready(state)
    self.console.stop()
    # What another phase found for this one counts as if it had been done here.
    seconds = time.perf_counter() - started + facts.pop("seconds_before", 0.0)
    self._record(name, state, seconds, **facts)
    # For the figures alone, and no part of the phase's time.
    for line in curve():
      self.workdir.log(phase=name, **line)
    return state

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
    line = workdirs.metrics_line(metrics)
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
    dataset: its data; None loads it if need be, and shows no trigger where it
      is gone.
  """
  # An earlier version's results lack what it did not have.
  results = {**results, "config": {**config.defaults(), **results["config"]}}

  def write(workdir: workdirs.Workdir) -> None:
    if (workdir.path / workdirs.REPORT).exists():
      return
    # matplotlib is slow to import, and not needed to train.
    from fljax import report

    shown: list[tuple[str, np.ndarray]] = []
    # Results outlive their data: but for the trigger all is in the folder.
    with contextlib.suppress(errors.DataError):
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
