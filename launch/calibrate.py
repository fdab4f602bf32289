"""Compares settings on calibration seeds, without looking at what it must not.

  python launch/calibrate.py --flagfile=launch/mnist.flags --seeds=100,101
    --pairs=9:0,4:9 --variant=adjusting_drop=0.02
    --variant='cleanse=fp,aw,ft,aw fine_tune_drop=0.01'

Every variant, and the settings as they are, is run for all pairs and seeds.
What differs in cleansing alone shares its trained models; on accelerators,
trainings that differ in data alone are one program. Shown is, for each phase,
the accuracy on the server's validation images and how far the search went
(pruned neurons, Δ and zeroed weights, the round that was kept), and AA after
training alone: whether an attack has taken may decide on the attack, but
neither test images nor AA may decide on a defence. `--oracle` shows test
accuracy and AA of every phase. Seeds begin at 100, those below are for
results.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import math
import statistics
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
import tqdm

from fljax import config as configs
from fljax import driver
from fljax import errors
from fljax import execution
from fljax import experiment
from fljax import sweep
from fljax.reproduction import plan
from fljax.reproduction import store as stores

_FIRST_SEED = 100

_SEEDS = flags.DEFINE_list("seeds", ["100"], "Calibration seeds, from 100 on.")
_PAIRS = flags.DEFINE_list(
  "pairs",
  [],
  "Victim and attack labels, as in 9:0,4:9; empty: those of the flagfile.",
)
_VARIANT = flags.DEFINE_multi_string(
  "variant",
  [],
  "Settings of launch/main.py that replace the flagfile's, as in"
  " 'adjusting_drop=0.02 pruning=rap'. May be given several times.",
)
_STORE = flags.DEFINE_string(
  "store", "runs/calibration", "Folder in which experiments are kept."
)
_ORACLE = flags.DEFINE_boolean(
  "oracle", False, "Also show test accuracy and AA of every phase."
)


def replaced(base: configs.Config, text: str) -> configs.Config:
  """The settings with those of a variant in their place.

  Raises:
    errors.ConfigError: a setting does not exist or has no such value.
  """
  fields = {field.name: field for field in dataclasses.fields(base)}
  changes: dict[str, Any] = {}
  for item in text.split():
    name, equals, value = item.partition("=")
    if name in ("seed", "workdir"):
      raise errors.ConfigError(
        f"--variant={text}: seeds are those of --seeds, folders of --store."
      )
    if not equals or name not in fields:
      raise errors.ConfigError(
        f"--variant={text}: {item!r} is no setting of launch/main.py with a"
        " value, as in adjusting_drop=0.02."
      )
    if not fields[name].metadata["identity"]:
      # It would be the same experiment under two names.
      raise errors.ConfigError(
        f"--variant={text}: {name} changes no result; give it as a flag."
      )
    try:
      changes[name] = configs.value_of(name, value)
    except ValueError:
      kind = type(fields[name].default).__name__
      raise errors.ConfigError(
        f"--variant={text}: {value!r} is no value of {name}, which is of type"
        f" {kind}."
      ) from None
  return dataclasses.replace(base, **changes)


def cells_of(
  base: configs.Config,
) -> dict[str, list[tuple[str, plan.Cell, int]]]:
  """By variant, its experiments: a name for the terminal, cell and seed."""
  texts = list(dict.fromkeys(_SEEDS.value))
  seeds = [int(text) for text in texts if text.isdigit()]
  if len(seeds) != len(texts) or min(seeds, default=0) < _FIRST_SEED:
    raise errors.ConfigError(
      f"--seeds={','.join(_SEEDS.value)}: calibration seeds are numbers from"
      f" {_FIRST_SEED} on; results are reported on those below."
    )
  sweeps = [base]
  if _PAIRS.value:
    text = f"{sweep.PAIRS}={','.join(_PAIRS.value)}"
    sweeps = list(sweep.expand(base, text).values())
  found = {}
  for variant in dict.fromkeys(["", *_VARIANT.value]):
    found[variant] = [
      (
        f"{variant or 'as is'}: {one.victim_label} → {one.target_label},"
        f" seed {seed}",
        plan.Cell(replaced(one, variant)),
        seed,
      )
      for one in sweeps
      for seed in seeds
    ]
  return found


# Of a phase: which of its facts tells the line of its curve that it kept, and
# what that is called there.
_KEPT = {
  "pruned_neurons": "pruned_neurons",
  "delta": "delta",
  "kept_round": "round",
}
# How far a phase went, and what that is called in the table.
_REACHED = {
  "pruned_neurons": "pruned",
  "delta": "Δ",
  "zeroed_weights": "zeroed",
  "kept_round": "round",
}


def validated(record: plan.Record) -> dict[str, float]:
  """By phase, the accuracy on validation images of the model it ended with.

  Phases that have none, as Neural Cleanse, are left out.
  """
  found = {}
  for phase in record.results["phases"]:
    lines = record.curve(phase["name"])
    for fact, name in _KEPT.items():
      if fact in phase:
        lines = [line for line in lines if line[name] == phase[fact]]
    if lines and lines[-1].get("accuracy") is not None:
      found[phase["name"]] = lines[-1]["accuracy"]
  return found


def shown(records: Sequence[plan.Record]) -> dict[str, str]:
  """The columns of a variant: means, and the worst, in percent."""
  if not records:
    return {}
  columns = {"runs": str(len(records))}
  accuracies = [validated(record) for record in records]
  for phase in records[0].results["phases"]:
    name = phase["name"]
    known = [one[name] for one in accuracies if name in one]
    text = f"{_percent(statistics.mean(known))}" if known else "–"
    phases = [record.phase(name) for record in records]
    text += "".join(
      f", {label} {statistics.mean(_number(p[fact]) for p in phases):.4g}"
      for fact, label in _REACHED.items()
      if fact in phases[0]
    )
    if name == driver.TRAINING or _ORACLE.value:
      # None where nobody attacks.
      success = [one[plan.AA] for one in phases if one[plan.AA] is not None]
      if success:
        text += f", AA {_percent(statistics.mean(success))}"
        text += f" (worst {_percent(_worst(name, success))})"
    if _ORACLE.value:
      text += f", TA {_percent(statistics.mean(p[plan.TA] for p in phases))}"
    columns[name] = text
  return columns


def _worst(name: str, success: Sequence[float]) -> float:
  """Of an attack the weakest, of a defence what it left the most of."""
  return min(success) if name == driver.TRAINING else max(success)


def _number(fact: float | None) -> float:
  """A Δ that changed nothing is infinite, which JSON does not know."""
  return math.inf if fact is None else float(fact)


def _percent(value: float) -> str:
  return f"{100 * value:.1f}"


def table(columns: dict[str, dict[str, str]]) -> str:
  """Markdown, a row per variant."""
  names = list(dict.fromkeys(n for row in columns.values() for n in row))
  lines = [
    "| variant | " + " | ".join(names) + " |",
    "| --- |" + " ---: |" * len(names),
  ]
  for variant, row in columns.items():
    values = " | ".join(row.get(name, "") for name in names)
    lines.append(f"| {variant or 'as is'} | {values} |")
  return "\n".join(lines)


def run(base: configs.Config, store: stores.Store) -> None:
  """Runs what is open, then prints."""
  cells = cells_of(base)
  work = [
    item
    for items in cells.values()
    for item in items
    if store.record(*item[1:], curves=True) is None
  ]
  if execution.plan_for().sweep == "vmap":
    store.train_together(work)
  bar = tqdm.tqdm(work, unit="run", dynamic_ncols=True, file=sys.stderr)
  for name, cell, seed in bar:
    bar.set_description(name)
    store.run(cell, seed)
  columns = {}
  for variant, items in cells.items():
    records = []
    for name, cell, seed in items:
      record = store.record(cell, seed, curves=True)
      if record is None:
        print(f"{name}: {store.failure(cell, seed)}", file=sys.stderr)
      else:
        records.append(record)
    columns[variant] = shown(records)
  kind = "test" if _ORACLE.value else "validation"
  print(table(columns))
  path = store.path / f"calibration-{kind}.json"
  text = json.dumps(columns, indent=2, ensure_ascii=False) + "\n"
  path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
  if len(arguments) > 1:
    print(f"fljax: unexpected argument {arguments[1]!r}.", file=sys.stderr)
    return 2
  logging.set_verbosity(logging.WARNING)
  try:
    if flags.FLAGS.sweep:
      raise errors.ConfigError("--sweep is launch/main.py's: give --variant.")
    for name, instead in (("seed", "--seeds"), ("trained_in", "--store")):
      if flags.FLAGS[name].present:
        raise errors.ConfigError(f"--{name} is launch/main.py's: {instead}.")
    base = configs.from_flags()
    configs.require_home("--store", _STORE.value)
    experiment.use_devices(base)
    experiment.use_compilation_cache(base)
    with driver.Stop.on_signals() as stop:
      run(base, stores.Store(_STORE.value, stop))
  except (errors.FljaxError, OSError) as error:
    print(f"fljax: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  configs.define_flags()
  flags.adopt_module_key_flags(configs)
  app.run(main)
