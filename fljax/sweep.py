"""Many experiments at once: `--sweep`, and training along an experiment axis.

Experiments that differ only in what programs take as data (seed, victim and
target label, the attack's strength, ...) are trained by one compiled program
over their stacked federations, states and keys. What that does not fit into is
run one after another. Those of other programs (another network, another rule
of the server's, ...) come after each other, kind by kind. Those that differ in
cleansing alone are trained once, and the others take the model over. Either way
each leaves the folder that a single run of its config leaves, and goes on from
it: training as one program saves the same checkpoints, and the rest of a run is
`driver.Driver`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import math
import os
import resource
import time
import traceback
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fljax import config as configs
from fljax import console as consoles
from fljax import driver as driving
from fljax import errors
from fljax import evaluate
from fljax import execution
from fljax import experiment as experiments
from fljax import federation as federations
from fljax import population as populations
from fljax import programs
from fljax import rounds
from fljax import workdir as workdirs

Array = jax.Array
Config = configs.Config

PAIRS = "pairs"
_PAIR = ("victim_label", "target_label")
# Of a folder's name, in bytes, on common file systems.
_LONGEST = 255
_NAMES = {int: "an integer", float: "a number", bool: "true or false"}
# What of the attack means nothing before it begins (--attack_start). The
# victim label is not among it: attackers are dealt images of that label, and
# of the target label only with --attackers_hold_target.
_OF_ATTACK = (
  "target_label",
  "gamma",
  "attacker_learning_rate",
  "attack_rounds",
)


# --- which experiments -------------------------------------------------------


def _type(text: str, key: str) -> type:
  """Of a setting's values, if a sweep may vary it.

  Raises:
    errors.ConfigError: it may not; which may, is what `Config` says.
  """
  fields = {field.name: field for field in dataclasses.fields(Config)}
  why = ""
  if key not in fields:
    why = "there is no such setting"
  elif key in _PAIR:
    why = f"labels are swept as pairs, as in {PAIRS}=9:0,9:1"
  elif not fields[key].metadata["identity"]:
    why = "it changes no result"
  if why:
    raise errors.ConfigError(f"--sweep={text}: {key} cannot be swept; {why}.")
  return type(fields[key].default)


def expand(config: Config, text: str) -> dict[str, Config]:
  """The experiments of a sweep.

  Args:
    config: what they have in common; its workdir is their folders' parent.
    text: as in "seed=0,1,2;pairs=9:0,9:1": every combination is one
      experiment. Pairs are victim and target labels; what has commas of its
      own (`config.LISTS`) takes a plus for them, as in "cleanse=fp+ft+aw,aw".

  Returns:
    For each, by the name of its folder, its config.

  Raises:
    errors.ConfigError: with one sentence.
  """
  axes: dict[str, list[tuple[str, dict[str, Any]]]] = {}
  for part in text.split(";"):
    key, equals, values = (piece.strip() for piece in part.partition("="))
    if not equals or not key:
      raise errors.ConfigError(
        f"--sweep={text}: {part!r} is not of the form 'seed=0,1,2'."
      )
    if key in axes:
      raise errors.ConfigError(f"--sweep={text} has {key} twice.")
    axes[key] = [_choice(text, key, value) for value in values.split(",")]
    names = [name for name, _ in axes[key]]
    meant = [repr(settings) for _, settings in axes[key]]
    for index, name in enumerate(names):
      if meant.count(meant[index]) > 1:
        raise errors.ConfigError(f"--sweep={text} has {name} twice.")
      if names.count(name) > 1:
        raise errors.ConfigError(
          f"--sweep={text} has two values for which a folder would be called"
          f" {name}."
        )
  found = {}
  for choices in itertools.product(*axes.values()):
    name = ",".join(part for part, _ in choices)
    if len(os.fsencode(name)) > _LONGEST:
      raise errors.ConfigError(
        f"--sweep={text}: {name} is too long for a folder's name."
      )
    changes: dict[str, Any] = {"workdir": os.path.join(config.workdir, name)}
    for _, settings in choices:
      changes.update(settings)
    found[name] = dataclasses.replace(config, **changes)
  return found


def _choice(text: str, key: str, value: str) -> tuple[str, dict[str, Any]]:
  """One value: its part of the folder's name, and the settings it means."""
  value = value.strip()
  if key == PAIRS:
    pair = value.split(":")
    try:
      victim, target = map(int, pair)
    except ValueError:
      raise errors.ConfigError(
        f"--sweep={text}: {value!r} is no value of {key}; it must be two"
        " labels, as in 9:0."
      ) from None
    return f"{victim}-{target}", dict(zip(_PAIR, (victim, target), strict=True))
  kind = _type(text, key)
  if key in configs.LISTS:
    # Their own commas would part the values of the sweep.
    parts = [part.strip() for part in value.split("+")]
    return _safe(f"{key}={'+'.join(parts)}"), {key: ",".join(parts)}
  try:
    converted = configs.value_of(key, value)
  except ValueError:
    raise errors.ConfigError(
      f"--sweep={text}: {value!r} is no value of {key}; it must be"
      f" {_NAMES.get(kind, kind.__name__)}."
    ) from None
  shown = str(converted)
  if kind is float and float(f"{converted:g}") == converted:
    shown = f"{converted:g}"
  return _safe(f"{key}={shown}"), {key: converted}


def _safe(name: str) -> str:
  """Without what parts folders: one folder's name."""
  return name.replace("=/", "=").replace(os.sep, "-")


# --- training as one program -------------------------------------------------


class Rows(NamedTuple):
  """What differs between experiments, each leaf [experiments, ...].

  Attributes:
    federation: all clients of each.
    key: random keys of the whole trainings.
    examples: by name, what each measures besides what all measure.
  """

  federation: federations.Federation
  key: Array
  examples: dict[str, evaluate.Examples]


SweepBlock = Callable[
  [rounds.ServerState, Rows, Any, dict[str, evaluate.Examples]],
  tuple[rounds.ServerState, rounds.RoundMetrics],
]


def make_block(block: rounds.Block, over: str) -> SweepBlock:
  """A block of rounds of several experiments as one program.

  Args:
    block: of one of them; they have the same structure.
    over: "vmap" advances all at once, "map" one by one. One by one, each gets
      the bits of a single run; at once, the same up to rounding.

  Returns:
    (states [experiments, ...], rows, rounds int32 [experiments], examples
    that all have in common) -> (states, metrics [experiments, ...]). States
    are not donated: if memory ends midway, they are what is saved. An
    experiment with 0 rounds to do keeps its state.
  """

  def run(
    states: rounds.ServerState,
    rows: Rows,
    lengths: Array,
    common: dict[str, evaluate.Examples],
  ) -> tuple[rounds.ServerState, rounds.RoundMetrics]:
    def one(
      row: tuple[rounds.ServerState, Rows, Array],
    ) -> tuple[rounds.ServerState, rounds.RoundMetrics]:
      state, own, length = row
      return block(
        state, own.federation, own.key, length, {**common, **own.examples}
      )

    each = (states, rows, lengths)
    return jax.vmap(one)(each) if over == "vmap" else lax.map(one, each)

  return jax.jit(run)


class _DoesNotFitError(Exception):
  """The program needs more memory than there is."""


@contextlib.contextmanager
def _fitting() -> Any:
  """Tells running out of memory from every other error."""
  try:
    yield
  except MemoryError as error:
    raise _DoesNotFitError("out of memory") from error
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise _DoesNotFitError("out of memory") from error


def _free_memory() -> int | None:
  """Bytes that a new program may take, if anybody knows."""
  statistics = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" in statistics:
    return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
  if jax.default_backend() != "cpu":
    return None
  try:
    with open("/proc/meminfo", encoding="ascii") as lines:
      sizes = dict(line.split(":") for line in lines)
    return 1024 * int(sizes["MemAvailable"].split()[0])
  except (OSError, ValueError, KeyError):
    return None


def _require(needed: int) -> None:
  free = _free_memory()
  if free is not None and needed > free:
    raise _DoesNotFitError(
      f"it needs {needed / 2**30:.2f} GiB of memory,"
      f" {max(free, 0) / 2**30:.2f} are free"
    )


def _compile(block: SweepBlock, *arguments: Any) -> SweepBlock:
  """Compiles, and refuses what would run out of memory."""
  program = block.lower(*arguments).compile()  # type: ignore[attr-defined]
  analysis = program.memory_analysis()
  if analysis is not None:
    _require(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)
  return program


def _row(tree: Any, index: int) -> Any:
  return jax.tree.map(lambda leaf: leaf[index], tree)


def _stack(trees: Sequence[Any]) -> Any:
  """Stacks on the host, then copies to the device once."""
  return jax.tree.map(
    lambda *leaves: (
      jnp.stack(leaves)
      if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key)
      else jnp.asarray(np.stack(leaves))
    ),
    *trees,
  )


def _shapes(driver: driving.Driver) -> Any:
  """What has to be the same for experiments to be stacked."""
  own = (driver.state, _own(driver))
  leaves, tree = jax.tree.flatten(own)
  return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _own(driver: driving.Driver) -> Rows:
  examples = dict(driver.experiment.examples)
  del examples["test"]
  federation = driver.experiment.federation
  assert isinstance(federation, federations.Federation)
  return Rows(federation, driver.experiment.key, examples)


def _train(
  drivers: Sequence[driving.Driver],
  console: consoles.Console,
  stop: driving.Stop,
  *,
  over: str,
  path: str,
) -> dict[int, errors.DivergedError]:
  """Trains experiments by one program until all are done.

  Each does its own rounds up to its own next evaluation or checkpoint, so
  that those which come from different checkpoints train together too.

  Args:
    drivers: of experiments in training, restored, their arrays on the host.
    console: shows where they stand.
    stop: whether to save and end.
    over: see `make_block`.
    path: the folder to name when stopped.

  Returns:
    By position, those that diverged; all others are trained and saved.

  Raises:
    _DoesNotFitError: there is not enough memory. What was trained so far is
      saved, and each driver's state is that.
    errors.InterruptedRunError: stopped; everything is saved.
  """
  first = drivers[0].experiment
  total = first.config.rounds
  common = {"test": first.test}
  done = [int(driver.state.round) for driver in drivers]
  saved = list(done)
  diverged: dict[int, errors.DivergedError] = {}

  def running() -> list[int]:
    return [
      index
      for index in range(len(drivers))
      if done[index] < total and index not in diverged
    ]

  def keep(indices: Iterable[int], states: Any) -> None:
    """Saves training where it stands."""
    for index in indices:
      if saved[index] < done[index]:
        drivers[index].state = _row(states, index)
        drivers[index].save_training(drivers[index].state)
        saved[index] = done[index]

  with _fitting():
    _require(
      sum(
        leaf.nbytes
        for driver in drivers
        for leaf in jax.tree.leaves((driver.state, _own(driver)))
      )
    )
    states = _stack([driver.state for driver in drivers])
    rows = _stack([_own(driver) for driver in drivers])
    lengths = np.zeros(len(drivers), np.int32)
    program = _compile(
      make_block(first.block, over), states, rows, lengths, common
    )
  console.start(driving.TRAINING, total, min(done))
  while now := running():
    started = time.perf_counter()
    lengths = np.zeros(len(drivers), np.int32)
    for index in now:
      lengths[index] = drivers[index].block_length(done[index])
    try:
      with _fitting():
        after, metrics = program(states, rows, lengths, common)
        metrics = jax.device_get(metrics)
    except _DoesNotFitError:
      keep(now, jax.device_get(states))
      raise
    # Each one's share, so that times add up to what was spent.
    share = (time.perf_counter() - started) / len(now)
    lines = []
    for index in now:
      driver, own = drivers[index], _row(metrics, index)
      driver.seconds += share
      if bad := int(own.bad_round):
        diverged[index] = driver.diverged(
          _row(jax.device_get(states), index), bad
        )
        continue
      done[index] += int(lengths[index])
      line = driver.log_training(done[index], own)
      if line is not None:
        lines.append(line)
    states = after
    if lines:
      _advance(console, min(done[index] for index in now), lines)
    stopped = stop.signal is not None
    due = [i for i in running() if stopped or drivers[i].due(done[i])]
    ended = [i for i in now if done[i] == total]
    on_host = jax.device_get(states) if due or ended else None
    keep(due, on_host)
    if ended:
      console.stop()
    for index in ended:
      drivers[index].end_training(
        jax.tree.map(jnp.asarray, _row(on_host, index))
      )
    if stopped and running():
      raise driving.interrupted(stop, path)
  console.stop()
  return diverged


def _begin_together(
  drivers: Iterable[driving.Driver],
  console: consoles.Console,
  stop: driving.Stop,
  path: str,
) -> None:
  """Trains once what is the same in several experiments.

  Until attackers begin, those that differ in `_OF_ATTACK` alone are one.

  Args:
    drivers: of experiments in training, restored; their states are what is
      trained here, up to where attackers begin.
    console: shows where they stand.
    stop: whether to save and end.
    path: the folder to name when stopped.

  Raises:
    errors.InterruptedRunError: stopped; everything is saved.
  """
  groups: dict[str, list[driving.Driver]] = {}
  for driver in drivers:
    config, done = driver.config, int(driver.state.round)
    if config.num_attackers and done < min(config.attack_start, config.rounds):
      settings = config.training()
      for name in _OF_ATTACK:
        if name != "target_label" or not config.attackers_hold_target:
          del settings[name]
      groups.setdefault(repr((done, settings)), []).append(driver)
  for group in groups.values():
    if len(group) > 1 and not _begin(group, console):
      raise driving.interrupted(stop, path)


def _begin(group: list[driving.Driver], console: consoles.Console) -> bool:
  """Trains the first, to where attackers begin, for all of a group.

  Returns:
    False if it was stopped; everything is saved then. A round that is not
    finite also ends it before, and each will find that for itself.
  """
  leader = group[0]
  config, experiment = leader.config, _to_device(leader.experiment)
  state = jax.tree.map(jnp.asarray, leader.state)
  stamped = [
    jax.tree.map(jnp.asarray, driver.experiment.backdoored)
    for driver in group[1:]
  ]
  done, last = int(state.round), min(config.attack_start, config.rounds)
  console.say(
    f"{len(group)} experiments are one until attackers begin, after round"
    f" {last}"
  )
  console.start(driving.TRAINING, config.rounds, done)
  stopping = False
  while done < last and not stopping:
    started = time.perf_counter()
    length = min(leader.block_length(done), last - done)
    last_good = jax.tree.map(jnp.copy, state)
    state, metrics = experiment.block(
      state, experiment.federation, experiment.key, length, experiment.examples
    )
    if int(metrics.bad_round):
      state = last_good
      break
    done += length
    own = [metrics] + [
      metrics.replace(
        accuracies={
          **metrics.accuracies,
          "backdoored": evaluate.measure(
            experiment.model, state.params, examples
          ),
        }
      )
      for examples in stamped
    ]
    for driver, each in zip(group, own, strict=True):
      driver.seconds += (time.perf_counter() - started) / len(group)
      line = driver.log_training(done, each)
      if line is not None and driver is leader:
        _advance(console, done, [line])
    stopping = leader.stopping()
    if stopping or done == last or leader.due(done):
      for driver in group:
        driver.save_training(state)
  console.stop()
  for driver in group:
    # Copies: a block takes its state's memory.
    driver.state = (
      jax.device_get(state)
      if experiment.mesh is None
      else jax.tree.map(jnp.copy, state)
    )
  return not stopping


def _advance(
  console: consoles.Console, done: int, lines: list[dict[str, Any]]
) -> None:
  """Shows the averages."""
  success = [
    line["attack_success"]
    for line in lines
    if line["attack_success"] is not None
  ]
  console.advance(
    done,
    float(np.mean([line["test_accuracy"] for line in lines])),
    float(np.mean(success)) if success else None,
  )


# --- running -----------------------------------------------------------------


class Outcome(NamedTuple):
  """What became of a sweep.

  Attributes:
    results: by name, the contents of results.json of those that ended well.
    failed: by name, why training or cleansing did not.
  """

  results: dict[str, dict[str, Any]]
  failed: dict[str, errors.FljaxError]


def run(
  sweep: dict[str, Config],
  *,
  quiet: bool = False,
  over: str | None = None,
  stop: driving.Stop | None = None,
) -> Outcome:
  """Runs every experiment of a sweep; continues where earlier runs stopped.

  Args:
    sweep: by name, from `expand`.
    quiet: whether to show nothing on the terminal.
    over: how one program trains them, see `make_block`; None is the backend's
      measured choice.
    stop: ends it after the block of rounds, or within the phase, in progress;
      None listens to signals.

  Returns:
    The outcome. An experiment that diverges, whose cleansing cannot be done, or
    in which parts of a user's own fail does not stop the others.

  Raises:
    errors.FljaxError: with one sentence for the user.
  """
  first = next(iter(sweep.values()))
  path = os.path.dirname(first.workdir)
  # Devices are divided once, for those of the largest rounds.
  experiments.use_devices(
    max(
      sweep.values(), key=lambda one: one.clients_per_round or one.num_clients
    )
  )
  experiments.use_compilation_cache(first)
  quiet = quiet or jax.process_index() > 0
  console = consoles.Console(quiet=quiet)
  console.say(f"{consoles.header(first)}, and {len(sweep) - 1} more in {path}")
  results: dict[str, dict[str, Any]] = {}
  failed: dict[str, errors.FljaxError] = {}
  with contextlib.ExitStack() as stack:
    if stop is None:
      stop = stack.enter_context(driving.Stop.on_signals())
    folders: dict[str, workdirs.Workdir | workdirs.Shared] = {}
    _allow_files(len(sweep))
    for name, config in sweep.items():
      folders[name] = workdirs.open_for_all(
        config.workdir, config.identity(), config.defaults()
      )
      stack.push(folders[name])
    drivers = _drivers(sweep, folders, results, stop, quiet=quiet)
    if complete := len(results):
      console.say(f"{complete} of {len(sweep)} experiments are complete.")
    sources = _sources(sweep, drivers, folders)
    if sources:
      console.say(f"{len(sources)} take over the trained model of another one")
    kinds = _kinds(sweep, drivers, sources)
    if len(kinds) > 1:
      console.say(f"they are of {len(kinds)} kinds, one after the other")
    finished = 0
    for names in kinds:
      own = {name: drivers[name] for name in names if name not in sources}
      open_ = [name for name in own if not drivers[name].trained]
      with _keeping_to([sweep[name] for name in open_], console) as raised:
        _train_together(own, failed, console, stop, over=over, path=path)
      for name in open_ if raised else ():
        failed.setdefault(name, raised[0])
      for name in names:
        driver, source = drivers[name], sources.get(name)
        if source in failed and not drivers[source].trained:
          failed[name] = failed[source]
        if name in failed:
          continue
        driver.experiment = _to_device(driver.experiment)
        driver.state = jax.tree.map(jnp.asarray, driver.state)
        with _keeping_to([sweep[name]], console) as raised:
          if source is not None:
            driver.take_over(sweep[source].workdir)
          results[name] = driver.finish()
        if raised:
          console.say(f"{name}: {raised[0]}")
          failed[name] = raised[0]
        # No more than one experiment's images are on the device.
        driver.experiment = _to_host(driver.experiment)
        driver.state = None
        finished += 1
        if finished % programs.FORGET_EVERY == 0:
          jax.clear_caches()
  return Outcome(
    {name: results[name] for name in sweep if name in results}, failed
  )


def _allow_files(folders: int) -> None:
  """Two of each folder are open; often a process may have but 1,024."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = soft + 2 * folders
  if hard != resource.RLIM_INFINITY:
    wanted = min(wanted, hard)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, soft), hard))


@contextlib.contextmanager
def _keeping_to(
  which: Sequence[Config], console: consoles.Console
) -> Iterator[list[errors.FljaxError]]:
  """Keeps to experiments what concerns them alone.

  That is divergence, cleansing that cannot be done, and whatever else is raised
  where parts of a user's own take part, whose traceback is shown.

  Args:
    which: their settings.
    console: where a traceback is shown.

  Yields:
    What was raised, once it has been.
  """
  raised: list[errors.FljaxError] = []
  try:
    yield raised
  except (errors.DivergedError, errors.ConfigError) as error:
    raised.append(error)
  except errors.FljaxError:
    raise
  except Exception as error:
    mistake = _mistake(which, error)
    # Other processes would wait for this one, or go on without it.
    if mistake is None or jax.process_count() > 1:
      raise
    console.say(traceback.format_exc().rstrip())
    raised.append(mistake)


def _mistake(
  which: Iterable[Config], error: Exception
) -> errors.ConfigError | None:
  """What was raised, for the user, if parts of their own take part."""
  own = ", ".join(
    dict.fromkeys(
      part for one in which for code in one.code.values() for part in code
    )
  )
  if not own:
    return None
  return errors.ConfigError(
    f"{type(error).__name__}: {errors.first_line(error)} (with parts of your"
    f" own: {own})"
  )


def _kinds(
  sweep: dict[str, Config],
  drivers: dict[str, driving.Driver],
  sources: dict[str, str],
) -> list[list[str]]:
  """Names of what is to be done, those of one structure together.

  Whoever takes a model over comes after the one that trains it, with its kind.
  """
  found: dict[str, list[str]] = {}
  for name in sorted(drivers, key=lambda name: name in sources):
    structure = sweep[sources.get(name, name)].structure()
    found.setdefault(repr(structure), []).append(name)
  return list(found.values())


def _sources(
  sweep: dict[str, Config],
  drivers: dict[str, driving.Driver],
  folders: dict[str, workdirs.Workdir | workdirs.Shared],
) -> dict[str, str]:
  """Whose trained model an experiment takes over, by name.

  Those that differ in cleansing alone train once: the one that is farthest.
  """

  def rounds_done(name: str) -> float:
    driver = drivers.get(name)
    if driver is None:
      # Complete; its checkpoints may be gone.
      return math.inf if folders[name].has_model() else -1
    return math.inf if driver.trained else int(driver.state.round)

  groups: dict[str, list[str]] = {}
  for name, config in sweep.items():
    groups.setdefault(repr(config.training()), []).append(name)
  found = {}
  for names in groups.values():
    farthest = {name: rounds_done(name) for name in names}
    source = max(names, key=farthest.__getitem__)
    for name in names:
      if name != source and 0 <= farthest[name] < math.inf:
        found[name] = source
  return found


def _drivers(
  sweep: dict[str, Config],
  folders: dict[str, workdirs.Workdir | workdirs.Shared],
  results: dict[str, dict[str, Any]],
  stop: driving.Stop,
  *,
  quiet: bool,
) -> dict[str, driving.Driver]:
  """Sets up what is not complete yet; adds what is to the results.

  A data set is loaded once, and only the first experiment of a structure makes
  programs. Nothing is begun before all of them are known good; what is wrong
  with one names it.
  """
  known: dict[str, experiments.Experiment] = {}
  ready = {}
  for name, config in sweep.items():
    found = folders[name].results()
    if found is not None:
      results[name] = found
      continue
    try:
      experiment = experiments.setup(
        config, like=experiments.closest(config, known.values())
      )
    except errors.FljaxError as error:
      raise type(error)(f"{name}: {error}") from error
    except Exception as error:
      mistake = _mistake([config], error)
      if mistake is None:
        raise
      consoles.Console(quiet=quiet).say(traceback.format_exc().rstrip())
      raise errors.ConfigError(f"{name}: {mistake}") from error
    ready[name] = _to_host(experiment)
    known.setdefault(repr((config.structure(), config.tuning)), ready[name])
  # Each data set is looked at once.
  digests = {_data(one.config): one.digests for one in ready.values()}
  complete: dict[tuple[str, str], list[str]] = {}
  for name in results:
    complete.setdefault(_data(sweep[name]), []).append(name)
  for of, names in complete.items():
    experiments.check_finished(
      [folders[name] for name in names], sweep[names[0]], digests.get(of)
    )
  for name, found in results.items():
    driving.write_report(sweep[name], found, folders[name])
  drivers = {}
  for name, experiment in ready.items():
    drivers[name] = driving.Driver(
      experiment,
      folders[name],
      consoles.Console(quiet=quiet, prefix=f"{name} "),
      stop,
    )
  for name, driver in drivers.items():
    try:
      driver.check()
    except errors.WorkdirError as error:
      raise errors.WorkdirError(f"{name}: {error}") from error
  for driver in drivers.values():
    driver.claim()
  for driver in drivers.values():
    driver.restore()
    if driver.experiment.mesh is None:
      driver.state = jax.device_get(driver.state)
  return drivers


def _data(config: Config) -> tuple[str, str]:
  """What names an experiment's data."""
  return config.dataset, config.server_data


def _train_together(
  drivers: dict[str, driving.Driver],
  failed: dict[str, errors.FljaxError],
  console: consoles.Console,
  stop: driving.Stop,
  *,
  over: str | None,
  path: str,
) -> None:
  """Trains as one program what can be; says what cannot, and why."""
  names = [name for name, driver in drivers.items() if not driver.trained]
  training = [drivers[name] for name in names]
  if len(training) < 2:
    return
  _begin_together(training, console, stop, path)
  names = [
    name
    for name in names
    if int(drivers[name].state.round) < drivers[name].config.rounds
  ]
  training = [drivers[name] for name in names]
  if len(training) < 2:
    return
  why = ""
  alike: dict[Any, list[str]] = {}
  if training[0].experiment.mesh is not None:
    why = "clients are spread over several devices"
  elif isinstance(training[0].experiment.federation, populations.Population):
    why = "clients are on the host"
  else:
    for name in names:
      alike.setdefault(_shapes(drivers[name]), []).append(name)
    if len(alike) == len(names):
      why = (
        "their clients have unequal numbers of images, or one's trigger is"
        " blended and another's is not"
      )
  if why:
    console.say(f"the experiments run one after another: {why}")
    return
  for group in alike.values():
    if len(group) > 1:
      own = {name: drivers[name] for name in group}
      failed.update(_train_alike(own, console, stop, over=over, path=path))
    else:
      console.say(f"{group[0]} is trained by itself: none has arrays like it")


def _train_alike(
  drivers: dict[str, driving.Driver],
  console: consoles.Console,
  stop: driving.Stop,
  *,
  over: str | None,
  path: str,
) -> dict[str, errors.DivergedError]:
  """Trains as one program what can be stacked, or says why not.

  Returns:
    Those that diverged.
  """
  names = [*drivers]
  over = over or execution.plan_for().sweep
  console.say(
    f"{len(names)} experiments are trained as one program,"
    f" {'all at once' if over == 'vmap' else 'one by one in it'}"
  )
  try:
    diverged = _train([*drivers.values()], console, stop, over=over, path=path)
  except _DoesNotFitError as error:
    why = str(error)
  except NotImplementedError as error:
    # A part of a user's own that has no batched form.
    why = errors.first_line(error)
  else:
    for index, reason in diverged.items():
      console.say(f"{names[index]}: {reason}")
    return {names[index]: reason for index, reason in diverged.items()}
  finally:
    console.stop()
  console.say(f"the experiments run one after another: {why}")
  return {}


def _to_host(experiment: experiments.Experiment) -> experiments.Experiment:
  """Takes what is an experiment's own off the device."""
  return _own_through(jax.device_get, experiment)


def _to_device(experiment: experiments.Experiment) -> experiments.Experiment:
  return _own_through(lambda tree: jax.tree.map(jnp.asarray, tree), experiment)


def _own_through(
  move: Callable[[Any], Any], experiment: experiments.Experiment
) -> experiments.Experiment:
  # What is spread over a mesh stays there, and so does what is on the host.
  if experiment.mesh is not None or isinstance(
    experiment.federation, populations.Population
  ):
    return experiment
  return experiment._replace(
    federation=move(experiment.federation),
    client_validation=move(experiment.client_validation),
    validation=move(experiment.validation),
    backdoored=move(experiment.backdoored),
  )
