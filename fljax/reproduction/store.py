"""Runs experiments once and keeps them under their settings' hash.

Under the store's folder, `trained/<hash>` holds a training alone and
`runs/<hash>` a whole experiment, which takes its trained model over. Both are
workdirs like any other: `config.json` tells what they are, and whatever was
interrupted goes on where it stopped. `tables/<hash>.json` is what a table made
elsewhere says about an experiment.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
import re
import shutil
from typing import Any

import jax

from fljax import console as consoles
from fljax import driver as driving
from fljax import errors
from fljax import experiment as experiments
from fljax import programs
from fljax import sweep as sweeps
from fljax import workdir as workdirs
from fljax.config import Config
from fljax.reproduction import archive
from fljax.reproduction.plan import Cell
from fljax.reproduction.plan import Record

FAILED = "failed.txt"
# What `launch/reproduce.py` names its JSON files.
_ARTEFACT = re.compile(r"(table|figure|discussion|beyond)-\d+\.json")


def digest(settings: dict[str, Any]) -> str:
  """Twelve hexadecimal digits that stand for settings.

  Those at their default are left out, so that results outlive a setting that
  is added later.
  """
  defaults = Config.defaults()
  own = {
    key: value
    for key, value in settings.items()
    if key not in defaults or defaults[key] != value
  }
  text = json.dumps(own, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


class Store:
  """A folder of experiments."""

  def __init__(self, path: str, stop: driving.Stop):
    """Opens the folder; nothing is written yet.

    Args:
      path: the folder.
      stop: ends a run at its next checkpoint.
    """
    self.path = Path(path).expanduser()
    self._stop = stop
    # The last experiment of each structure: its programs are compiled.
    self._like: dict[str, experiments.Experiment] = {}
    self._runs = 0

  # --- where ----------------------------------------------------------------

  def settings(self, cell: Cell, seed: int) -> Config | None:
    """What is run for a cell; None if what it builds on is not known yet."""
    config = dataclasses.replace(cell.config, seed=seed)
    if cell.after is not None:
      before = self.record(cell.after, seed, curves=True)
      if before is None:
        return None
      assert cell.adapt is not None
      config = cell.adapt(config, before)
    return self._placed(config)

  def _placed(self, config: Config) -> Config:
    folder = self.path / "runs" / digest(config.identity())
    return dataclasses.replace(
      config,
      workdir=str(folder),
      trained_in=self._training(config).workdir,
      figures=False,
    )

  def _training(self, config: Config) -> Config:
    """The training that an experiment takes its model from."""
    training = config.training()
    defaults: dict[str, Any] = {
      field.name: field.default
      for field in dataclasses.fields(Config)
      if field.metadata["identity"] and field.name not in training
    }
    defaults["parameters"] = config.training_parameters
    alone = dataclasses.replace(config, **{**defaults, "cleanse": ""})
    folder = self.path / "trained" / digest(training)
    return dataclasses.replace(
      alone, workdir=str(folder), trained_in="", figures=False
    )

  # --- what -----------------------------------------------------------------

  def record(
    self, cell: Cell, seed: int, *, curves: bool = False
  ) -> Record | None:
    """The record of a finished experiment, or None.

    Args:
      cell: the experiment.
      seed: of it.
      curves: whether its curves are needed, of which what was taken over from
        a table has none.

    Raises:
      errors.WorkdirError: its folder is damaged.
    """
    config = self.settings(cell, seed)
    if config is None:
      return None
    folder = Path(config.workdir)
    if not (folder / workdirs.RESULTS).exists():
      return None if curves else self._of_table(folder.name)
    try:
      results = workdirs.read_results(folder / workdirs.RESULTS)
      lines = (folder / workdirs.METRICS).read_text("utf-8").splitlines()
      return Record(results, [json.loads(line) for line in lines])
    except (OSError, ValueError, errors.WorkdirError) as error:
      raise errors.WorkdirError(
        f"{folder} is damaged ({error}); delete it to have it made again."
      ) from error

  def _of_table(self, name: str) -> Record | None:
    path = self.path / "tables" / f"{name}.json"
    if not path.exists():
      return None
    try:
      return Record(json.loads(path.read_text("utf-8")), [])
    except (OSError, ValueError) as error:
      raise errors.WorkdirError(
        f"{path} is damaged ({error}); delete it to have it made again."
      ) from error

  def failure(self, cell: Cell, seed: int) -> str | None:
    """Why an experiment has no result and will have none; or None."""
    config = self.settings(cell, seed)
    while config is not None:
      path = Path(config.workdir) / FAILED
      if path.exists():
        return path.read_text(encoding="utf-8").strip()
      config = self._training(config) if config.trained_in else None
    if cell.after is not None:
      return self.failure(cell.after, seed)
    return None

  def run(self, cell: Cell, seed: int) -> None:
    """Runs an experiment, and first what it builds on, unless that is done.

    An experiment that diverges leaves its reason instead of results.

    Raises:
      errors.FljaxError: for any other reason.
    """
    if cell.after is not None:
      self.run(cell.after, seed)
    config = self.settings(cell, seed)
    if config is None:
      return
    if self._run(self._training(config)):
      self._run(config)

  def train_together(
    self, cells: Iterable[tuple[str, Cell, int]], *, over: str | None = None
  ) -> None:
    """Trains what cells build on, each structure's as one program.

    What is trained already, is alone in its structure, depends on what
    another cell finds or misses its data set is left to `run`.

    Args:
      cells: names for the terminal, cells and seeds.
      over: see `sweep.run`.

    Raises:
      errors.FljaxError: for any reason but that one diverges.
    """
    groups: dict[str, dict[str, Config]] = {}
    seen = set()
    for name, cell, seed in cells:
      config = self.settings(cell, seed)
      if config is None:
        continue
      training = self._training(config)
      folder = Path(training.workdir)
      if folder in seen or any(
        (folder / done).exists() for done in (workdirs.RESULTS, FAILED)
      ):
        continue
      seen.add(folder)
      key = digest(training.structure())
      # Rows of a table may have several trainings under one name.
      groups.setdefault(key, {})[f"{name} ({folder.name})"] = training
    for group in groups.values():
      if len(group) < 2:
        continue
      try:
        outcome = sweeps.run(group, over=over, stop=self._stop)
      except errors.DataError:
        continue
      for name, error in outcome.failed.items():
        if not isinstance(error, errors.DivergedError):
          # Whatever else it is, `run` will meet it.
          continue
        with workdirs.Workdir(
          group[name].workdir, group[name].identity(), Config.defaults()
        ) as workdir:
          _note_failure(workdir, error)

  def take_over(self, folder: str) -> int:
    """Copies the records of experiments that were made elsewhere.

    Args:
      folder: of workdirs of finished runs, of which checkpoints are not
        needed, or of JSON files of tables and figures, which have no curves,
        at any depth; or such a file.

    Returns:
      How many experiments there are. Those whose settings have results here
      already are left as they are.

    Raises:
      errors.WorkdirError: the folder holds no experiment, one is damaged, or
        the store cannot be written.
    """
    source = Path(folder).expanduser()
    runs = [path.parent for path in sorted(source.rglob(workdirs.RESULTS))]
    made = [
      path
      for path in ([source] if source.is_file() else sorted(source.rglob("*")))
      if _ARTEFACT.fullmatch(path.name)
    ]
    taken = set()
    for folder_of_run in runs:
      taken.add(self._take_run(folder_of_run))
    for path in made:
      with _reading(path):
        cells = archive.load(path.read_bytes())
      for results in cells:
        taken.add(self._take_cell(results))
    if not taken:
      raise errors.WorkdirError(
        f"{folder} holds no finished run, and no table's JSON file."
      )
    return len(taken)

  def _take_run(self, source: Path) -> str:
    """Returns its settings' digest."""
    with _reading(source):
      settings = json.loads((source / workdirs.CONFIG).read_text("utf-8"))
      settings.pop(workdirs.DATA_SHA256)
      settings.pop(workdirs.SERVER_SHA256, None)
      workdirs.read_results(source / workdirs.RESULTS)
    name = digest(settings)
    target = self.path / "runs" / name
    if (target / workdirs.RESULTS).exists():
      return name
    with workdirs.writing(target):
      target.mkdir(parents=True, exist_ok=True)
      # The results last: with them the record counts as whole.
      for file in (workdirs.CONFIG, workdirs.METRICS, workdirs.RESULTS):
        shutil.copyfile(source / file, target / file)
    return name

  def _take_cell(self, results: dict[str, Any]) -> str:
    """Returns its settings' digest."""
    name = digest(results["config"])
    path = self.path / "tables" / f"{name}.json"
    if path.exists():
      return name
    with workdirs.writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      partial = path.with_suffix(".partial")
      partial.write_text(json.dumps(results), encoding="utf-8")
      partial.replace(path)
    return name

  def _run(self, config: Config) -> bool:
    """Returns whether the experiment has results."""
    failed = Path(config.workdir) / FAILED
    if failed.exists():
      return False
    with workdirs.Workdir(
      config.workdir, config.identity(), config.defaults()
    ) as workdir:
      if workdir.results() is not None:
        return True
      self._runs += 1
      if self._runs % programs.FORGET_EVERY == 0:
        self._like.clear()
        jax.clear_caches()
      key = digest(config.structure())
      experiment = experiments.setup(
        config, like=experiments.closest(config, self._like.values())
      )
      self._like[key] = experiment
      try:
        experiments.drive(
          experiment, workdir, consoles.Console(quiet=True), self._stop
        )
      except errors.DivergedError as error:
        _note_failure(workdir, error)
        return False
    return True


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
  """Names what cannot be taken over."""
  try:
    yield
  except errors.WorkdirError as error:
    raise errors.WorkdirError(f"{source}: {error}") from error
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise errors.WorkdirError(
      f"{source} cannot be taken over ({error!r})."
    ) from error


def _note_failure(workdir: workdirs.Workdir, error: errors.FljaxError) -> None:
  """Keeps the reason, so that it is not tried again."""
  path = workdir.path / FAILED
  with workdir.writing(path):
    path.write_text(f"{error}\n", encoding="utf-8")
