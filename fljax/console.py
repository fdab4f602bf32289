"""What a run shows on the terminal while it goes on: a bar, lines."""

from __future__ import annotations

import sys
import time
from typing import Any

import tqdm

from fljax import __version__

# Where there is no terminal, what measures no TA says this often that it lives.
_SECONDS_BETWEEN = 30


def percent(fraction: float | None) -> str:
  """A fraction as people read it."""
  return "-" if fraction is None else f"{100 * fraction:.1f}"


class Console:
  """Progress on stderr: a bar on a terminal, plain lines elsewhere."""

  def __init__(self, *, quiet: bool = False, prefix: str = ""):
    """Shows nothing at all if quiet; the prefix begins every line."""
    self._quiet = quiet
    self._prefix = prefix
    self._bar: tqdm.tqdm | None = None
    self._total = 0

  def say(self, text: str) -> None:
    """Prints a line, above the bar if there is one."""
    if self._quiet:
      return
    text = self._prefix + text
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      print(text, file=sys.stderr, flush=True)

  def start(
    self, name: str, total: int, done: int, unit: str = "round"
  ) -> None:
    """Begins a series of rounds, or of other units."""
    self._name, self._total, self._unit = name, total, unit
    self._told = time.monotonic()
    if not self._quiet and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        desc=self._prefix + name,
        total=total,
        initial=done,
        unit=unit,
        dynamic_ncols=True,
        file=sys.stderr,
      )

  def advance(
    self,
    done: int,
    accuracy: float | None = None,
    success: float | None = None,
  ) -> None:
    """Shows where the series stands after `done` units.

    Args:
      done: of the total.
      accuracy: TA, where it was measured. What is not measured is told less
        often where there is no terminal.
      success: AA, likewise.
    """
    measured = ""
    if accuracy is not None:
      measured = f"TA {percent(accuracy)}  AA {percent(success)}"
    if self._bar is not None:
      self._bar.set_postfix_str(measured.replace("  ", " "), refresh=False)
      self._bar.update(done - self._bar.n)
      return
    now = time.monotonic()
    if measured or now - self._told >= _SECONDS_BETWEEN:
      self._told = now
      self.say(
        f"{self._name}: {self._unit} {done}/{self._total}  {measured}".rstrip()
      )

  def stop(self) -> None:
    """Ends the series."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None


def header(config: Any) -> str:
  """One line that says what is about to run."""
  attack = (
    f"{config.num_attackers} attacking {config.victim_label} ->"
    f" {config.target_label} ({config.trigger}, gamma {config.gamma:g}"
    f"{_when(config)})"
    if config.num_attackers
    else "none attacking"
  )
  return (
    f"fljax {__version__}: {config.dataset}, {config.model},"
    f" {config.num_clients} clients, {attack}, seed {config.seed}"
  )


def _when(config: Any) -> str:
  """In which rounds of training attackers attack, if not in all."""
  first, last = config.attack_start + 1, config.rounds
  if config.attack_rounds:
    last = min(last, config.attack_start + config.attack_rounds)
  if (first, last) == (1, config.rounds):
    return ""
  if first > last:
    return ", in no round of training"
  return f", in rounds {first} to {last}"


def detail(phase: dict[str, Any]) -> str:
  """What a phase did, in a few words."""
  parts = []
  if "taken_from" in phase:
    parts.append(f"taken from {phase['taken_from']}")
  if "flagged_labels" in phase:
    labels = ", ".join(map(str, phase["flagged_labels"]))
    parts.append(f"flagged: {labels or 'none'}")
  if "oracle" in phase:
    best = phase["oracle"]
    parts.append(
      f"oracle: {best['by']}, rate {best['nc_learning_rate']:g}, of"
      f" {len(phase['oracle_tried'])} by AA"
    )
  if "pruned_neurons" in phase:
    parts.append(f"{phase['pruned_neurons']} of {phase['neurons']} pruned")
  for fact, value in phase.get("facts", {}).items():
    # Of a defence of a user's own: what fits here.
    if isinstance(value, str | int):
      parts.append(f"{fact} {value}"[:40])
    elif isinstance(value, float):
      parts.append(f"{fact} {value:.4g}"[:40])
  if "largest_anomaly" in phase:
    parts.append(f"anomaly index up to {phase['largest_anomaly']:.1f}")
  if "fine_tune_rounds" in phase:
    ran, kept = phase["fine_tune_rounds"], phase.get("kept_round")
    undone = "" if kept in (None, ran) else f" of {ran}"
    parts.append(f"{ran if kept is None else kept}{undone} rounds")
  if "delta" in phase:
    delta = phase["delta"]
    threshold = "no change" if delta is None else f"delta {delta:g}"
    parts.append(f"{phase['zeroed_weights']} weights zeroed ({threshold})")
  return ", ".join(parts)
