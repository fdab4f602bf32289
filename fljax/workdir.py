"""The folder of a run: its files, its lock, its checkpoints.

Files that are read again are written beside their place and moved there, so
a run killed at any moment leaves either the old or the new one. Nothing is
loaded that could run code.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
from pathlib import Path
import re
import shutil
import tempfile
from typing import Any
from typing import TextIO

import jax
import numpy as np

from fljax import errors
from fljax import parallel

CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
# In config.json beside the settings: which images and labels the run has, and
# which the server has from elsewhere, if it has.
DATA_SHA256 = "data_sha256"
SERVER_SHA256 = "server_sha256"
DIGESTS = (DATA_SHA256, SERVER_SHA256)
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
FIGURES = "figures"
PROFILE = "profile"
# Of training: the folder whose model was taken over.
TAKEN_FROM = "taken_from"
# What a phase in progress is taken up from; gone when the run is complete.
KEPT = "in_progress.npz"
_OWN = (CONFIG, METRICS, RESULTS, CHECKPOINTS, REPORT, FIGURES, KEPT)
_LOCK = ".lock"
# Of checkpoints within training, so many are kept; one is enough to go on.
_KEPT_IN_TRAINING = 2


@dataclasses.dataclass(frozen=True)
class Progress:
  """What a checkpoint says beside its arrays.

  Attributes:
    sequence: checkpoints are numbered from 1 in the order of writing.
    phase: the phase that it ends, or lies in.
    complete: whether the phase ended here.
    side: whether this is a side result from which the run does not go on.
    phases: entries of results.json so far.
    metrics_lines: lines of metrics.jsonl so far.
    metrics_sha256: their digest.
    seconds: spent in the phase so far, if it is not complete.
  """

  sequence: int
  phase: str
  complete: bool
  side: bool
  phases: list[dict[str, Any]]
  metrics_lines: int
  metrics_sha256: str
  seconds: float


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
  """Turns a failure to write into one sentence."""
  try:
    yield
  except OSError as error:
    raise errors.WorkdirError(
      f"{path} cannot be written: {error.strerror or error}."
    ) from error


def open_for_all(
  path: str, identity: dict[str, Any], defaults: dict[str, Any] | None = None
) -> Workdir | Shared:
  """Opens a run's folder: by itself, or as one of several processes."""
  if jax.process_count() == 1:
    return Workdir(path, identity, defaults)
  return Shared(path, identity, defaults)


class Workdir:
  """A run's folder, open and locked for one process."""

  def __init__(
    self,
    path: str,
    identity: dict[str, Any],
    defaults: dict[str, Any] | None = None,
  ):
    """Opens or creates the folder.

    Args:
      path: the folder.
      identity: what makes the run the experiment that it is; a folder of
        another one is refused.
      defaults: what a folder is taken to say about settings that did not
        exist yet when it was made.

    Raises:
      errors.WorkdirError: it cannot be written, is in use, or holds something
        else.
    """
    self.path = Path(path).expanduser()
    self._metrics: TextIO | None = None
    self._lines, self._digest = 0, hashlib.sha256()
    with self.writing(self.path):
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = open(self.path / _LOCK, "a", encoding="utf-8")  # noqa: SIM115
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._lock.close()
      raise errors.WorkdirError(
        f"{self.path} is in use by another run."
      ) from error
    # What JSON makes of it, so that both sides compare alike.
    self._identity = json.loads(json.dumps(identity))
    self._defaults = json.loads(json.dumps(defaults or {}))
    try:
      self._compare(self._identity)
    except BaseException:
      self.close()
      raise

  def _compare(self, identity: dict[str, Any]) -> None:
    """Refuses a folder that holds another run, or something else."""
    config = self.path / CONFIG
    if config.exists():
      there = {**self._defaults, **_read_json(config)}
      for key in {*DIGESTS} - identity.keys():
        there.pop(key, None)
      if there != identity:
        raise errors.WorkdirError(
          f"{self.path} holds a run of another config"
          f" ({_differences(there, identity)}); choose another --workdir, or"
          " delete it."
        )
      return
    strangers = [name for name in _OWN if (self.path / name).exists()]
    if strangers:
      raise errors.WorkdirError(
        f"{self.path} holds {', '.join(strangers)} but no {CONFIG}; nothing"
        " is overwritten, choose another --workdir."
      )

  def claim(
    self,
    digests: dict[str, str],
    trained_in: str = "",
    training: dict[str, Any] | None = None,
  ) -> None:
    """Makes the folder this run's, once everything about it is known good.

    Args:
      digests: of the data, by `DIGESTS`; a run begun on other data is refused.
      trained_in: the folder of the run whose trained model will be taken over
        (`adopt`), or of a sweep with such a run, if there is one.
      training: the settings that the two must have in common.

    Raises:
      errors.WorkdirError: the folder's run has other data, the other run's
        model cannot be taken over, or the folder cannot be written.
    """
    self.check(digests, trained_in, training)
    if not (self.path / CONFIG).exists():
      self.write_json(CONFIG, {**self._identity, **digests})

  def check(
    self,
    digests: dict[str, str],
    trained_in: str = "",
    training: dict[str, Any] | None = None,
  ) -> None:
    """Refuses what `claim` refuses, and writes nothing."""
    self._compare({**self._identity, **digests})
    if trained_in and not (self.path / CONFIG).exists():
      self._trained(trained_in, training or {}, digests[DATA_SHA256])

  def _trained(
    self, other: str, training: dict[str, Any], data_sha256: str
  ) -> tuple[Path, Path, Progress]:
    """The run with the right trained model, and that model's checkpoint.

    Of a sweep's folder it is the run that has these settings.
    """
    source = Path(other).expanduser()
    runs = [source]
    if not (source / CONFIG).exists():
      runs = sorted(path.parent for path in source.glob(f"*/{CONFIG}"))
    if not runs:
      raise errors.WorkdirError(f"--trained_in={other} holds no run.")
    wanted = {**json.loads(json.dumps(training)), DATA_SHA256: data_sha256}
    fitting, others = [], []
    for run in runs:
      there = {**self._defaults, **_read_json(run / CONFIG)}
      differences = _differences(
        {key: there[key] for key in wanted if key in there}, wanted
      )
      if differences:
        others.append(f"{differences}{'' if run == source else f' in {run}'}")
      else:
        fitting.append(run)
    if not fitting:
      what = "a model that was" if runs == [source] else "models that were"
      raise errors.WorkdirError(
        f"--trained_in={other} holds {what} trained otherwise"
        f" ({min(others, key=len)})."
      )
    damage: errors.CheckpointError | None = None
    for run in fitting:
      for path, progress in _records(run):
        if isinstance(progress, errors.CheckpointError):
          # It may be another one, which that run passed over.
          damage = damage or progress
        elif _is_trained(progress):
          return run, path, progress
    raise damage or errors.WorkdirError(
      f"the run in --trained_in={fitting[0] if fitting != [source] else other}"
      " has not ended its training."
    )

  def close(self) -> None:
    """Releases the folder."""
    self._close_metrics()
    self._lock.close()

  def _close_metrics(self) -> None:
    if self._metrics is not None:
      # Everything that matters was flushed line by line.
      with contextlib.suppress(OSError):
        self._metrics.close()
      self._metrics = None

  def __enter__(self) -> Workdir:
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

  def report(self, write: Callable[[Workdir], None]) -> None:
    """Lets a function write more into the folder."""
    write(self)

  # --- files -----------------------------------------------------------------

  def writing(self, path: Path) -> contextlib.AbstractContextManager[None]:
    """Turns a failure to write into one sentence."""
    return writing(path)

  def write_json(self, name: str, value: Any) -> None:
    """Writes a JSON file of the folder in one piece."""
    path = self.path / name
    with self.writing(path):
      _replace(
        path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
      )

  def write_text(self, name: str, text: str) -> None:
    """Writes a text file of the folder in one piece."""
    path = self.path / name
    with self.writing(path):
      _replace(path, text.encode())

  def write_bytes(self, name: str, content: bytes) -> None:
    """Writes a binary file of the folder in one piece."""
    path = self.path / name
    with self.writing(path):
      _replace(path, content)

  def keep(self, key: str, state: Any, seconds: float) -> None:
    """Keeps where a phase in progress stands; there is one such thing.

    Args:
      key: says what it belongs to.
      state: a pytree of NumPy arrays.
      seconds: spent on it so far.
    """
    stream = io.BytesIO()
    leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(stream, key=key, seconds=np.float64(seconds), **leaves)
    self.write_bytes(KEPT, stream.getvalue())

  def kept(self, key: str, like: Any) -> tuple[Any, float] | None:
    """What was kept under a key, and the seconds; None if there is nothing.

    Damage, and what belongs to something else, count as nothing: what was kept
    saves time, and no more.

    Args:
      key: as it was kept.
      like: a pytree of arrays of the expected structure, shapes and dtypes.
    """
    expected, structure = jax.tree.flatten(like)
    try:
      content = io.BytesIO((self.path / KEPT).read_bytes())
      with np.load(content, allow_pickle=False) as stored:
        if str(stored["key"]) != key:
          return None
        leaves = [stored[str(index)] for index in range(len(expected))]
        seconds = float(stored["seconds"])
    except Exception:  # Damage shows itself in many ways.
      return None
    for leaf, other in zip(leaves, expected, strict=True):
      if leaf.shape != other.shape or leaf.dtype != other.dtype:
        return None
    return jax.tree.unflatten(structure, leaves), seconds

  def forget(self) -> None:
    """Removes what was kept, and opens nothing until there is more to log."""
    path = self.path / KEPT
    with self.writing(path):
      path.unlink(missing_ok=True)
    self._close_metrics()

  def has_model(self) -> bool:
    """Whether the folder holds a trained model that `adopt` could take."""
    return any(
      isinstance(progress, Progress) and _is_trained(progress)
      for _, progress in _records(self.path)
    )

  def results(self) -> dict[str, Any] | None:
    """The results of a finished run, or None."""
    path = self.path / RESULTS
    return read_results(path) if path.exists() else None

  # --- metrics ---------------------------------------------------------------

  def log(self, **metrics: Any) -> None:
    """Appends one line to metrics.jsonl."""
    path = self.path / METRICS
    with self.writing(path):
      if self._metrics is None:
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115
      line = json.dumps(metrics) + "\n"
      self._metrics.write(line)
      self._metrics.flush()
    self._lines += 1
    self._digest.update(line.encode())

  def metrics(self) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    path = self.path / METRICS
    if not path.exists():
      return []
    try:
      lines = path.read_text(encoding="utf-8").splitlines()
      return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
      raise errors.WorkdirError(f"{path} is damaged ({error}).") from error

  def _rewind_metrics(self, lines: int, sha256: str) -> None:
    """Forgets lines that were written after the checkpoint."""
    path = self.path / METRICS
    kept = _first_lines(path, lines, sha256)
    if path.exists() and path.stat().st_size != len(kept):
      with self.writing(path):
        _replace(path, kept)
    self._lines, self._digest = lines, hashlib.sha256(kept)

  # --- checkpoints -----------------------------------------------------------

  def save(self, state: Any, **progress: Any) -> Path:
    """Writes a checkpoint in one piece, and drops what it supersedes.

    Args:
      state: a pytree of arrays.
      **progress: fields of `Progress` other than `sequence` and those of
        metrics.jsonl.

    Returns:
      The checkpoint's folder.

    Raises:
      errors.WorkdirError: it could not be written, or the disk is full.
    """
    existing = self._checkpoints()
    sequence = existing[-1][0] + 1 if existing else 1
    record = Progress(
      sequence=sequence,
      metrics_lines=self._lines,
      metrics_sha256=self._digest.hexdigest(),
      **progress,
    )
    state = jax.device_get(state)
    path = self.path / CHECKPOINTS / f"{sequence:04d}-{record.phase}"
    with self.writing(path):
      if self._metrics is not None:
        os.fsync(self._metrics.fileno())
      path.parent.mkdir(exist_ok=True)
      _write_checkpoint(path, state, record)
    if record.complete:
      stale = [old for _, old in existing if self._is_partial(old)]
    else:
      partial = [old for _, old in existing if self._is_partial(old)]
      stale = partial[: len(partial) + 1 - _KEPT_IN_TRAINING]
    for old in stale:
      shutil.rmtree(old, ignore_errors=True)
    return path

  def restore(
    self, like: Any, tell: Callable[[str], None] | None = None
  ) -> tuple[Any, Progress] | None:
    """Reads where the run goes on, and rewinds metrics.jsonl to it.

    A damaged checkpoint stays where it is, and the run goes on from the one
    before: it does the same again.

    Args:
      like: a pytree of arrays of the expected structure, shapes and dtypes.
      tell: called with a sentence if checkpoints are damaged.

    Returns:
      The state and its progress, of the newest checkpoint that is whole; its
      state is that of the newest one that is no side result. None if there is
      none.

    Raises:
      errors.CheckpointError: all are damaged, or belong to another model.
    """
    for _, path in self._checkpoints(partial=True):
      if path.name.startswith("."):
        shutil.rmtree(path, ignore_errors=True)
    paths = [path for _, path in self._checkpoints()]
    if not paths:
      self._rewind_metrics(0, hashlib.sha256().hexdigest())
      return None
    first: errors.CheckpointError | None = None
    for last in reversed(range(len(paths))):
      try:
        state, newest = self._at(paths[: last + 1], like)
      except errors.CheckpointError as error:
        first = first or error
        continue
      self._rewind_metrics(newest.metrics_lines, newest.metrics_sha256)
      if first is not None and tell is not None:
        tell(f"{first} The run goes on from an earlier one.")
      return state, newest
    assert first is not None
    raise first

  def _at(self, paths: list[Path], like: Any) -> tuple[Any, Progress]:
    """Where a run goes on that ends with the last of these checkpoints."""
    newest = read_progress(paths[-1])
    for path in reversed(paths):
      if not read_progress(path).side:
        return read_checkpoint(path, like), newest
    raise errors.CheckpointError(f"{self.path} holds side results only.")

  def adopt(
    self, other: str, training: dict[str, Any], like: Any
  ) -> tuple[Any, Progress]:
    """Takes over the trained model of another run, and its training's record.

    Args:
      other: that run's folder, or that of a sweep which it is one of; nothing
        is written there.
      training: the settings that the two must have in common.
      like: as in `restore`.

    Returns:
      The state and its progress, as `restore` gives them from now on.

    Raises:
      errors.WorkdirError: there is no such run, its settings or its data are
        others, or its training has not ended.
      errors.CheckpointError: the trained model's checkpoint is damaged.
    """
    data_sha256 = _read_json(self.path / CONFIG)[DATA_SHA256]
    source, path, progress = self._trained(other, training, data_sha256)
    state = read_checkpoint(path, like)
    lines = _first_lines(
      source / METRICS, progress.metrics_lines, progress.metrics_sha256
    )
    with self.writing(self.path / METRICS):
      _replace(self.path / METRICS, lines)
    self._lines, self._digest = progress.metrics_lines, hashlib.sha256(lines)
    # The first is training, alone so far; where its model came from stays.
    phases = [{**progress.phases[0]}]
    phases[0].setdefault(TAKEN_FROM, str(source))
    progress = dataclasses.replace(progress, phases=phases)
    self.save(
      state,
      **{
        name: getattr(progress, name)
        for name in ("phase", "complete", "side", "phases", "seconds")
      },
    )
    return state, progress

  def _checkpoints(self, partial: bool = False) -> list[tuple[int, Path]]:
    return list_checkpoints(self.path, partial=partial)

  @staticmethod
  def _is_partial(path: Path) -> bool:
    # What is damaged stays where it is, and stops nobody who does not need it.
    with contextlib.suppress(errors.CheckpointError):
      return not read_progress(path).complete
    return False


class Shared:
  """A run's folder that one process has open while others run with it.

  Process 0 reads and writes. The others need not see the folder: they learn
  what was read, and a failure there is raised in all. Every method must be
  called in every process at the same place. See `Workdir`.
  """

  def __init__(
    self,
    path: str,
    identity: dict[str, Any],
    defaults: dict[str, Any] | None = None,
  ):
    """Opens or creates the folder in process 0."""
    self.path = Path(path).expanduser()
    self._own: Any = None

    def open_it() -> None:
      self._own = Workdir(path, identity, defaults)

    parallel.on_first(open_it)

  def __enter__(self) -> Shared:
    return self

  def __exit__(self, *exception: Any) -> None:
    if self._own is not None:
      self._own.close()

  def claim(self, *claimed: Any) -> None:
    """See `Workdir.claim`."""
    parallel.on_first(lambda: self._own.claim(*claimed))

  def check(self, *claimed: Any) -> None:
    """See `Workdir.check`."""
    parallel.on_first(lambda: self._own.check(*claimed))

  def results(self) -> dict[str, Any] | None:
    """See `Workdir.results`."""
    found: dict[str, Any] | None = parallel.on_first(
      lambda: self._own.results()
    )
    return found

  def write_json(self, name: str, value: Any) -> None:
    """See `Workdir.write_json`."""
    parallel.on_first(lambda: self._own.write_json(name, value))

  def log(self, **metrics: Any) -> None:
    """See `Workdir.log`."""
    parallel.on_first(lambda: self._own.log(**metrics))

  def keep(self, key: str, state: Any, seconds: float) -> None:
    """See `Workdir.keep`."""
    parallel.on_first(lambda: self._own.keep(key, state, seconds))

  def kept(self, key: str, like: Any) -> tuple[Any, float] | None:
    """See `Workdir.kept`."""
    return self._from_first(like, lambda: self._own.kept(key, like))

  def has_model(self) -> bool:
    """See `Workdir.has_model`."""
    return bool(parallel.on_first(lambda: self._own.has_model()))

  def forget(self) -> None:
    """See `Workdir.forget`."""
    parallel.on_first(lambda: self._own.forget())

  def save(self, state: Any, **progress: Any) -> None:
    """See `Workdir.save`; the state is the same in all processes."""
    parallel.on_first(lambda: str(self._own.save(state, **progress)))

  def restore(
    self, like: Any, tell: Callable[[str], None] | None = None
  ) -> tuple[Any, Progress] | None:
    """See `Workdir.restore`; process 0 tells."""
    found = self._from_first(like, lambda: self._own.restore(like, tell))
    return found and (found[0], Progress(**found[1]))

  def adopt(
    self, other: str, training: dict[str, Any], like: Any
  ) -> tuple[Any, Progress]:
    """See `Workdir.adopt`."""
    found = self._from_first(
      like, lambda: self._own.adopt(other, training, like)
    )
    assert found is not None
    return found[0], Progress(**found[1])

  def _from_first(
    self, like: Any, read: Callable[[], tuple[Any, Any] | None]
  ) -> tuple[Any, Any] | None:
    """What process 0 reads, in all of them: arrays, and what goes as JSON."""
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)

    def read_here() -> Any:
      nonlocal state
      found = read()
      if found is None:
        return None
      state, beside = found
      return (
        dataclasses.asdict(beside) if isinstance(beside, Progress) else beside
      )

    beside = parallel.on_first(read_here)
    if beside is None:
      return None
    return parallel.from_first(state), beside

  def report(self, write: Callable[[Workdir], None]) -> None:
    """Lets process 0 write more into the folder."""
    parallel.on_first(lambda: write(self._own))


def metrics_line(metrics: Any) -> dict[str, Any]:
  """What a block of rounds tells, as metrics.jsonl has it.

  Args:
    metrics: `rounds.RoundMetrics`, with accuracies on some of the experiment's
      `examples`; "backdoored" comes with "test".
  """
  measured = {name: float(value) for name, value in metrics.accuracies.items()}
  line: dict[str, Any] = {"loss": float(metrics.loss)}
  if "test" in measured:
    line["test_accuracy"] = measured["test"]
    line["attack_success"] = measured.get("backdoored")
  # As in the searches: what the server can go by.
  for name in ("validation", "reported"):
    if name in measured:
      line["accuracy"] = measured[name]
  return line


def read_settings(workdir: Path) -> tuple[dict[str, Any], dict[str, str]]:
  """The settings of a run, and the digests of its data, by `DIGESTS`.

  Raises:
    errors.WorkdirError: the folder holds no run, or config.json is damaged.
  """
  path = workdir / CONFIG
  if not path.exists():
    raise errors.WorkdirError(f"{workdir} holds no run: there is no {CONFIG}.")
  settings = _read_json(path)
  digests = {key: settings.pop(key) for key in DIGESTS if key in settings}
  return settings, digests


def read_state(workdir: Path, like: Any, phase: str = "") -> Any:
  """A state of a run; nothing in its folder is touched.

  Args:
    workdir: the folder.
    like: as in `Workdir.restore`.
    phase: the phase that it ended; empty is where the run stands.

  Returns:
    A pytree of NumPy arrays.

  Raises:
    errors.WorkdirError: that phase has not ended there.
    errors.CheckpointError: the checkpoint is damaged.
  """
  damage: errors.CheckpointError | None = None
  ended: list[str] = []
  for path, progress in reversed([*_records(workdir)]):
    if isinstance(progress, errors.CheckpointError):
      damage = damage or progress
      if not phase:
        # It may be where the run stands.
        break
      continue
    wanted = progress.complete and progress.phase == phase
    if wanted or not (phase or progress.side):
      return read_checkpoint(path, like)
    if progress.complete:
      ended.insert(0, progress.phase)
  which = f"the end of phase {phase}" if phase else "a model"
  raise damage or errors.WorkdirError(
    f"{workdir} has no checkpoint of {which}; there are those of"
    f" {', '.join(ended) or 'none'}."
  )


def _records(
  workdir: Path,
) -> Iterator[tuple[Path, Progress | errors.CheckpointError]]:
  """Checkpoints in order, and what they say, or what is wrong with that."""
  for _, path in list_checkpoints(workdir):
    try:
      yield path, read_progress(path)
    except errors.CheckpointError as error:
      yield path, error


def _is_trained(progress: Progress) -> bool:
  return progress.complete and len(progress.phases) == 1


def read_results(path: Path) -> dict[str, Any]:
  """The contents of a results.json.

  Args:
    path: of the file.

  Returns:
    Its contents: there is a phase, and all phases have what every phase has.

  Raises:
    errors.WorkdirError: it cannot be read, or is something else.
  """
  if not path.exists():
    raise errors.WorkdirError(f"there is no {path}.")
  results = _read_json(path)
  phases = results.get("phases")
  if (
    not isinstance(results.get("config"), dict)
    or not isinstance(results.get("environment"), dict)
    or "seed" not in results
    or not (isinstance(phases, list) and phases)
    or not all(is_phase(phase) for phase in phases)
  ):
    raise errors.WorkdirError(
      f"{path} is damaged: it is not what a finished run writes; nothing was"
      " overwritten."
    )
  return results


def is_phase(value: Any) -> bool:
  """Whether a value has what is shown of every phase of a run."""
  number = (int, float)
  try:
    return (
      isinstance(value["name"], str)
      and isinstance(value["test_accuracy"], number)
      and isinstance(value["seconds"], number)
      # Where nobody attacks there is none.
      and isinstance(value["attack_success"], (*number, type(None)))
    )
  except (TypeError, KeyError):
    return False


def _read_json(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
      raise ValueError("no JSON object")
  except (OSError, ValueError) as error:
    raise errors.WorkdirError(
      f"{path} is damaged ({error}); nothing was overwritten."
    ) from error
  return value


def list_checkpoints(
  workdir: Path, *, partial: bool = False
) -> list[tuple[int, Path]]:
  """Checkpoints of a run by their number, or what a killed run left of one."""
  folder = workdir / CHECKPOINTS
  found = []
  for path in folder.iterdir() if folder.is_dir() else ():
    # A phase is called as a user calls a defence; what is being written is
    # hidden.
    whole = re.fullmatch(r"(\d+)-[A-Za-z0-9_.+-]+", path.name)
    if whole and not partial:
      found.append((int(whole[1]), path))
    elif not whole and partial:
      found.append((0, path))
  return sorted(found)


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
  """Settings that are not alike, in words; empty if all are."""
  return ", ".join(
    f"{key}: {there.get(key, 'unset')} there, {here.get(key, 'unset')} here"
    for key in sorted({*there, *here})
    if there.get(key) != here.get(key)
  )


def _first_lines(path: Path, lines: int, sha256: str) -> bytes:
  """The lines of metrics.jsonl that a checkpoint knows.

  Raises:
    errors.WorkdirError: it does not begin with them.
  """
  try:
    text = path.read_bytes() if path.exists() else b""
  except OSError as error:
    raise errors.WorkdirError(
      f"{path} cannot be read ({error}); nothing was overwritten."
    ) from error
  kept = b"".join(text.splitlines(keepends=True)[:lines])
  if hashlib.sha256(kept).hexdigest() != sha256:
    raise errors.WorkdirError(
      f"{path} is damaged: it does not begin with the {lines} lines that"
      " the checkpoint knows; nothing was overwritten."
    )
  return kept


def _replace(path: Path, content: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with open(handle, "wb") as stream:
      stream.write(content)
      stream.flush()
      os.fsync(stream.fileno())
    # mkstemp makes files private; results are for others to read as usual.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)
    os.replace(name, path)
    _sync_folder(path.parent)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(name)
    raise


def _sync_folder(path: Path) -> None:
  """Makes a rename survive a loss of power."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


# --- one checkpoint ----------------------------------------------------------
# <sequence>-<phase>/state    the arrays, through orbax
# <sequence>-<phase>/progress.json    Progress, and the arrays' digest


def digest_of(state: Any, record: dict[str, Any]) -> str:
  """SHA-256 over the record and all arrays' names, types, shapes and bytes."""
  digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  for path, leaf in leaves:
    array = np.ascontiguousarray(leaf)
    digest.update(
      f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode()
    )
    digest.update(array.tobytes())
  return digest.hexdigest()


def _checkpointer() -> Any:
  # Slow to import, and not needed before the first checkpoint.
  import orbax.checkpoint as ocp

  # Process 0 alone: the others do not come to orbax's barriers.
  alone = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="fljax"
  )
  return ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
    multiprocessing_options=alone,
  )


def _write_checkpoint(path: Path, state: Any, progress: Progress) -> None:
  arrays = _as_dict(state)
  partial = path.with_name(f".{path.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir()
    _reserve(partial / "room", 2 * sum(x.nbytes for x in arrays.values()))
    try:
      _checkpointer().save((partial / "state").absolute(), arrays)
    except OSError:
      raise
    except Exception as error:  # TensorStore has errors of its own.
      raise OSError(errors.first_line(error)) from error
    record = dataclasses.asdict(progress)
    record["sha256"] = digest_of(state, record)
    _replace(partial / "progress.json", json.dumps(record, indent=2).encode())
    os.replace(partial, path)
    _sync_folder(path.parent)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _reserve(path: Path, size: int) -> None:
  """Fails if there is no room for so many bytes, and takes none.

  On a full disk orbax writes pages of tracebacks from its threads before it
  raises; this raises at once, and in one sentence.
  """
  with open(path, "wb") as stream:
    while size > 0:
      size -= stream.write(bytes(min(size, 1 << 20)))
    stream.flush()
    os.fsync(stream.fileno())
  path.unlink()


def _as_dict(state: Any) -> dict[str, Any]:
  """Leaves by name: a form that any orbax version reads back alike."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def read_progress(path: Path) -> Progress:
  """Reads what a checkpoint says beside its arrays.

  Args:
    path: the checkpoint's folder.

  Returns:
    Its progress.

  Raises:
    errors.CheckpointError: it is damaged.
  """
  return _read_record(path)[0]


def _read_record(path: Path) -> tuple[Progress, str]:
  try:
    record = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    digest = record.pop("sha256")
    return Progress(**record), digest
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise errors.CheckpointError(
      f"checkpoint {path} is damaged: its progress.json cannot be read"
      f" ({errors.first_line(error)}); nothing was overwritten."
    ) from error


def read_checkpoint(path: Path, like: Any) -> Any:
  """Reads a checkpoint's arrays and checks them bit by bit.

  Args:
    path: the checkpoint's folder.
    like: a pytree of arrays (or shapes) of the expected structure.

  Returns:
    A pytree of NumPy arrays.

  Raises:
    errors.CheckpointError: it is damaged or belongs to another model.
  """
  progress, digest = _read_record(path)
  try:
    stored = _checkpointer().restore((path / "state").absolute())
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(leaf_path) for leaf_path, _ in leaves]
    arrays = [np.asarray(stored[name]) for name in names]
  except Exception as error:  # Orbax and TensorStore raise all kinds.
    raise errors.CheckpointError(
      f"checkpoint {path} is damaged or of another model"
      f" ({type(error).__name__}: {errors.first_line(error)}); nothing was"
      " overwritten."
    ) from error
  for name, array, (_, leaf) in zip(names, arrays, leaves, strict=True):
    if array.shape != leaf.shape or array.dtype != leaf.dtype:
      raise errors.CheckpointError(
        f"checkpoint {path} is of another model: {name} is {array.dtype}"
        f" {array.shape}, not {leaf.dtype} {leaf.shape}."
      )
  state = jax.tree.unflatten(tree, arrays)
  if digest_of(state, dataclasses.asdict(progress)) != digest:
    raise errors.CheckpointError(
      f"checkpoint {path} is damaged: it is not what was saved; nothing was"
      " overwritten."
    )
  return state
