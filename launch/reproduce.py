"""Regenerates the paper's tables and figures.

  python launch/reproduce.py --table=1
  python launch/reproduce.py --figure=5,6 --seeds=0,1,2
  python launch/reproduce.py --discussion=1
  python launch/reproduce.py --beyond=1
  python launch/reproduce.py --all

Every cell is an experiment with a config and a seed. What was trained is kept
in --workdir under its settings' hash and used by every table and figure that
needs it; the same command goes on where it was interrupted. Tables (Markdown,
CSV, JSON), figures (PNG, SVG) and index.html, one page over everything that was
ever made there, are written to --out.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from pathlib import Path
import shlex
import sys

from absl import app
from absl import flags
from absl import logging
import tqdm

from fljax import config as configs
from fljax import driver
from fljax import errors
from fljax import execution
from fljax import experiment
from fljax.reproduction import catalogue
from fljax.reproduction import plan
from fljax.reproduction import store as stores

_LAUNCH = Path(__file__).resolve().parent
_FLAGFILES = {
  "mnist": "mnist.flags",
  "fashion_mnist": "fashion_mnist.flags",
  "cifar10": "cifar10_dba.flags",
}


def _numbers(known: Sequence[int]) -> str:
  return ", ".join(map(str, known))


_KINDS = {
  "table": "Tables to make",
  "figure": "Figures to make",
  "discussion": "Attacks of Section VI-B",
  "beyond": "What goes beyond the paper",
}
_WANTED = {
  kind: flags.DEFINE_list(
    kind, [], f"{text}: some of {_numbers([*catalogue.KINDS[kind]])}."
  )
  for kind, text in _KINDS.items()
}
_ALL = flags.DEFINE_boolean("all", False, "Make everything.")
_PAIRS = flags.DEFINE_list(
  "pairs",
  [],
  "Only experiments of these pairs of victim and attack label, as in 9:0,4:9;"
  " empty: all. Averages are then those of the pairs.",
)
_DATASETS = flags.DEFINE_list(
  "datasets",
  [],
  f"Only experiments on these data sets, of {', '.join(_FLAGFILES)}; empty: all"
  " that can be had. Those on cifar10 are for accelerators.",
)
_SEEDS = flags.DEFINE_list(
  "seeds", ["0"], "Seeds; all cells of the first one are run first."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "runs/paper", "Folder in which experiments are kept."
)
_OUT = flags.DEFINE_string(
  "out", "", "Folder for tables and figures; empty: 'results' in --workdir."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", "", "As in launch/main.py, for what is not bundled."
)
_RESULTS = flags.DEFINE_string(
  "results",
  "",
  "Folder of finished runs that were made elsewhere, such as a sweep's on an"
  " accelerator, or of tables' JSON files, such as launch/results; what they"
  " recorded is copied into --workdir first. Figures, and the second attack,"
  " need the runs.",
)
_RUN = flags.DEFINE_boolean(
  "run", True, "With --norun, only draw what has results already."
)
_TOGETHER = flags.DEFINE_enum(
  "together",
  "auto",
  ["auto", "yes", "no"],
  "Whether what cells are trained for is trained first, as one program for all"
  " that differ in data alone; 'auto': on accelerators, which that fills.",
)
_OVERRIDE = flags.DEFINE_multi_string(
  "override",
  [],
  "A setting of launch/main.py that replaces the flagfiles', as in"
  " rounds=2; for trying things out. Where an experiment is about a setting,"
  " it keeps its own.",
)
# What --override cannot be given.
_DECIDED = {
  "cleanse": "the phases are what tables and figures show",
  "dataset": "use --datasets",
  "seed": "use --seeds",
  "workdir": "use --workdir",
  "trained_in": "trained models are found in --workdir",
}


def bases(overrides: Sequence[str], data_dir: str) -> plan.Bases:
  """The settings of each data set, from its flagfile."""
  for text in overrides:
    name = text.partition("=")[0]
    if name in _DECIDED:
      raise errors.ConfigError(f"--override={name}: {_DECIDED[name]}.")
  found = {}
  for name, file in _FLAGFILES.items():
    values = flags.FlagValues()
    configs.define_flags(values)
    arguments = ["reproduce", f"--flagfile={_LAUNCH / file}"]
    if data_dir and name != "mnist":
      arguments.append(f"--data_dir={data_dir}")
    try:
      values(arguments + [f"--{text}" for text in overrides])
    except flags.Error as error:
      raise errors.ConfigError(f"--override: {error}") from error
    found[name] = dataclasses.replace(
      configs.from_flags(values), compilation_cache="default"
    )
  return found


def parse_pair(text: str) -> tuple[int, int]:
  """Victim and attack label of an item of --pairs."""
  labels = text.split(":")
  if len(labels) != 2 or not all(label.isdigit() for label in labels):
    raise errors.ConfigError(
      f"--pairs={text}: give a victim and an attack label, as in 9:0."
    )
  return int(labels[0]), int(labels[1])


def limits() -> str:
  """--pairs and --datasets, as they were given."""
  return "".join(
    f" --{flag.name}={','.join(flag.value)}"
    for flag in (_PAIRS, _DATASETS)
    if flag.value
  )


def chosen(base: plan.Bases) -> dict[str, plan.Table | plan.Figure]:
  """What was asked for, by flag and number."""
  pairs = [parse_pair(text) for text in _PAIRS.value]
  for name in _DATASETS.value:
    if name not in base:
      raise errors.ConfigError(
        f"--datasets={name}: choose some of {', '.join(base)}."
      )

  def belongs(config: configs.Config) -> bool:
    pair = config.victim_label, config.target_label
    return (not pairs or pair in pairs) and (
      not _DATASETS.value or config.dataset in _DATASETS.value
    )

  def warn_of_fixed(command: str, artefact: plan.Table | plan.Figure) -> None:
    """Says which --override does nothing to some of its experiments."""
    configs_of = [cell.config for cell in cells_of(artefact).values()]
    for text in _OVERRIDE.value:
      name = text.partition("=")[0]
      # The same in every base.
      wanted = getattr(base["mnist"], name, None)
      fixed = sum(
        getattr(config, name, None) != wanted for config in configs_of
      )
      if fixed:
        print(
          f"{command}: {fixed} of its {len(configs_of)} experiments have a"
          f" {name} of their own, which --override={text} leaves as it is.",
          file=sys.stderr,
        )

  found: dict[str, plan.Table | plan.Figure] = {}
  for kind, flag in _WANTED.items():
    known = catalogue.KINDS[kind]
    wanted = list(map(str, known)) if _ALL.value else flag.value
    for text in wanted:
      if not text.isdigit() or int(text) not in known:
        raise errors.ConfigError(
          f"--{kind}={text}: there is no such {kind} here; choose"
          f" some of {_numbers([*known])}."
        )
      artefact = plan.only(known[int(text)](base), belongs)
      if artefact is None:
        print(
          f"--{kind}={text}: left out, none of its experiments is of"
          f"{limits()}.",
          file=sys.stderr,
        )
        continue
      warn_of_fixed(f"--{kind}={text}", artefact)
      found[f"--{kind}={text}"] = artefact
  if not found:
    raise errors.ConfigError(
      "nothing to make: give --table, --figure, --discussion, --beyond or"
      " --all, and pairs and data sets that are in them."
    )
  return found


def cells_of(
  artefact: plan.Table | plan.Figure,
) -> dict[tuple[str, str], plan.Cell]:
  """Its experiments, by row (or curve) and variant."""
  if isinstance(artefact, plan.Table):
    return {
      (row.label, variant): cell
      for row in artefact.rows
      for variant, cell in row.cells.items()
    }
  if artefact.kind == "triggers":
    return {}
  return {(label, ""): cell for label, cell in artefact.cells.items()}


def run(
  artefacts: dict[str, plan.Table | plan.Figure],
  seeds: Sequence[int],
  store: stores.Store,
) -> None:
  """Runs what has no result yet; a missing data set leaves its cells out."""
  total, open_cells = 0, []
  for seed in seeds:
    for command, artefact in artefacts.items():
      curves = isinstance(artefact, plan.Figure)
      for (label, _), cell in cells_of(artefact).items():
        total += 1
        if store.record(cell, seed, curves=curves) is None:
          open_cells.append((command, label, cell, seed))
  missing: dict[str, str] = {}
  print(
    f"{total - len(open_cells)} of {total} cells are complete in {store.path}",
    file=sys.stderr,
  )
  together = execution.plan_for().sweep == "vmap"
  if _TOGETHER.value != "auto":
    together = _TOGETHER.value == "yes"
  if together:
    store.train_together(
      (f"{command[2:]} {label}, seed {seed}", cell, seed)
      for command, label, cell, seed in open_cells
    )
  bar = tqdm.tqdm(open_cells, unit="cell", dynamic_ncols=True, file=sys.stderr)
  for command, label, cell, seed in bar:
    bar.set_description(f"{command} {label}, seed {seed}")
    if cell.config.dataset in missing:
      continue
    try:
      store.run(cell, seed)
      if reason := store.failure(cell, seed):
        bar.write(
          f"{command} {label}, seed {seed}: no result, and it is not tried"
          f" again: {reason} (Settings are changed by --override=NAME=VALUE.)",
          file=sys.stderr,
        )
    except errors.ConfigError as error:
      # Of a cell whose settings another one's result made, as in attack 2.
      if cell.after is None:
        raise
      bar.write(f"{command} {label}: {error}", file=sys.stderr)
    except errors.DataError as error:
      missing[cell.config.dataset] = str(error)
      bar.write(
        f"{command}: left out, {cell.config.dataset} cannot be had: {error}",
        file=sys.stderr,
      )


def write(
  artefacts: dict[str, plan.Table | plan.Figure],
  seeds: tuple[int, ...],
  store: stores.Store,
  out: Path,
) -> None:
  """Draws everything that was asked for, and the page."""
  # matplotlib is slow to import.
  from fljax.reproduction import render

  out.mkdir(parents=True, exist_ok=True)
  sections_folder = out / ".sections"
  sections_folder.mkdir(exist_ok=True)
  for command, artefact in artefacts.items():
    records, failures = {}, {}
    curves = isinstance(artefact, plan.Figure)
    for (label, variant), cell in cells_of(artefact).items():
      for seed in seeds:
        record = store.record(cell, seed, curves=curves)
        if record is not None:
          records[label, variant, seed] = record
        elif reason := store.failure(cell, seed):
          failures[label, variant, seed] = reason
    whole = (
      f"python launch/reproduce.py {command}"
      f" --seeds={','.join(map(str, seeds))}{limits()}"
    )
    whole += "".join(
      f" --override={shlex.quote(text)}" for text in _OVERRIDE.value
    )
    if isinstance(artefact, plan.Table):
      made = render.table(artefact, records, failures, seeds, whole)
    else:
      try:
        made = render.figure(artefact, records, failures, seeds, whole)
      except errors.DataError as error:
        print(f"{artefact.name}: no result, {error}", file=sys.stderr)
        continue
    section = sections_folder / f"{artefact.name}.html"
    shown = isinstance(artefact, plan.Figure) and artefact.kind == "triggers"
    if not records and not shown and section.exists():
      print(
        f"{artefact.title}: no result in {store.path}; what {out} has of it is"
        " left as it is"
      )
      continue
    for name, content in made.files.items():
      (out / name).write_bytes(content)
    section.write_text(made.section, encoding="utf-8")
    total = len(seeds) * len(cells_of(artefact))
    partly = len(records) < total
    known = f" ({len(records)} of {total} experiments)" if partly else ""
    print(f"{artefact.title}{known}: {made.summary or 'drawn'}")
  page = {}
  for makers in catalogue.KINDS.values():
    for make in makers.values():
      artefact = make(bases((), ""))
      path = sections_folder / f"{artefact.name}.html"
      page[artefact.title] = (
        path.read_text(encoding="utf-8")
        if path.exists()
        else "<p>No result yet.</p>"
      )
  (out / "index.html").write_text(render.page(page), encoding="utf-8")
  print(f"tables, figures and index.html are in {out}")


def main(arguments: Sequence[str]) -> int:
  if len(arguments) > 1:
    print(f"fljax: unexpected argument {arguments[1]!r}.", file=sys.stderr)
    return 2
  logging.set_verbosity(logging.WARNING)
  try:
    if not all(text.isdigit() for text in _SEEDS.value) or not _SEEDS.value:
      raise errors.ConfigError(
        f"--seeds={','.join(_SEEDS.value)} must be numbers."
      )
    seeds = tuple(dict.fromkeys(map(int, _SEEDS.value)))
    for flag in (_WORKDIR, _OUT, _RESULTS):
      configs.require_home(f"--{flag.name}", flag.value)
    base = bases(_OVERRIDE.value, _DATA_DIR.value)
    artefacts = chosen(base)
    experiment.use_devices(base["mnist"])
    experiment.use_compilation_cache(base["mnist"])
    out = Path(_OUT.value or Path(_WORKDIR.value) / "results").expanduser()
    with driver.Stop.on_signals() as stop:
      store = stores.Store(_WORKDIR.value, stop)
      if _RESULTS.value:
        taken = store.take_over(_RESULTS.value)
        print(f"{taken} experiments in {_RESULTS.value}", file=sys.stderr)
      if _RUN.value:
        run(artefacts, seeds, store)
      write(artefacts, seeds, store, out)
  except errors.FljaxError as error:
    print(f"fljax: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    print(f"fljax: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  app.run(main)
