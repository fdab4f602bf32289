"""The experiments behind the paper's figures."""

from __future__ import annotations

import numpy as np

from fljax.cleanse import selection
from fljax.reproduction import plan
from fljax.reproduction.plan import AA
from fljax.reproduction.plan import TA
from fljax.reproduction.plan import Bases
from fljax.reproduction.plan import Cell
from fljax.reproduction.plan import Figure
from fljax.reproduction.plan import Record

_TWO = ((9, 0), (9, 2))
# Of adjusting, as long as there is something to see.
_LONG_CURVE = {"delta_start": 10.0, "delta_step": 0.25, "adjusting_drop": 0.5}
_BEFORE = "“none” is the model that comes in"


def figure_3(bases: Bases) -> Figure:
  """Training under 3, 5 and 7 labels per client."""
  base = plan.changed(bases["mnist"], cleanse="", eval_every=3)

  def easier(records: dict[str, list[Record]]) -> tuple[str, str]:
    final = {
      label: np.mean([run.phase("training")[TA] for run in runs])
      for label, runs in records.items()
    }
    three, five, seven = (final[f"{labels}-label"] for labels in (3, 5, 7))
    return (
      plan.verdict(three <= five, five <= seven),
      ", ".join(f"{k}: TA {100 * v:.1f}" for k, v in final.items()),
    )

  return Figure(
    "figure-3",
    "Figure 3: training under different data distributions",
    "",
    "training",
    {
      f"{labels}-label": Cell(plan.changed(base, labels_per_client=labels))
      for labels in (3, 5, 7)
    },
    (("The fewer labels per client, the harder the training.", easier),),
  )


def figure_5(bases: Bases) -> Figure:
  """Pruning curves by rank and by vote."""

  def redundant(records: dict[str, list[Record]]) -> tuple[str, str]:
    lost = {
      label: float(
        np.mean([r.curve("fp")[0][TA] - r.curve("fp")[30][TA] for r in runs])
      )
      for label, runs in records.items()
    }
    return (
      plan.verdict(*(value <= 0.01 for value in lost.values())),
      "TA lost by 30 neurons: "
      + ", ".join(f"{k} {100 * v:.2f}" for k, v in lost.items()),
    )

  return Figure(
    "figure-5",
    "Figure 5: federated pruning",
    "",
    "pruning",
    {
      f"{plan.arrow(pair)}, {name}": Cell(
        plan.changed(
          plan.of_pair(bases["mnist"], pair), cleanse="fp", pruning=method
        )
      )
      for pair in _TWO
      for name, method in (("rank", "rap"), ("vote", "mvp"))
    },
    (("Both methods prune over 30 redundant neurons.", redundant),),
  )


def figure_6(bases: Bases) -> Figure:
  """Δ curves."""
  return Figure(
    "figure-6",
    "Figure 6: adjusting extreme weights",
    "After pruning and fine-tuning, until half of the accuracy is lost;"
    f" {_BEFORE}.",
    "delta",
    {
      plan.arrow(pair): Cell(
        plan.changed(
          plan.of_pair(bases["mnist"], pair), cleanse="fp,ft,aw", **_LONG_CURVE
        )
      )
      for pair in _TWO
    },
    (("AA falls before TA does.", _falls_first),),
  )


# Accuracy on validation images that adjusting may take for AA to fall "before".
_GIVEN = 0.02


def _falls_first(records: dict[str, list[Record]]) -> tuple[str, str]:
  told, seen = [], []
  for label, runs in records.items():
    for run in runs:
      curve = run.curve("all")
      accuracies = np.asarray([line["accuracy"] for line in curve])
      floor = accuracies[0] - _GIVEN
      kept = curve[selection.last_above(accuracies, floor)]
      seen.append(kept[AA] < 0.1)
      trained = run.phase("training")[AA]
      # The curve begins with the model as it came into the phase.
      place = "no Δ" if kept["delta"] is None else f"Δ = {kept['delta']:g}"
      told.append(
        f"{label}: {100 * trained:.1f} after training, {100 * curve[0][AA]:.1f}"
        f" before adjusting, {100 * kept[AA]:.1f} at {place}"
      )
  return (
    plan.verdict(*seen),
    f"AA, at the last Δ before validation has lost more than {100 * _GIVEN:g}"
    " points: " + "; ".join(told),
  )


def figure_7(bases: Bases) -> Figure:
  """50 clients, 10% attackers, 5 to 25 selected per round."""
  base = plan.changed(
    bases["mnist"],
    num_clients=50,
    num_attackers=5,
    samples_per_client=600,
    **_LONG_CURVE,
  )
  return Figure(
    "figure-7",
    "Figure 7: adjusting weights, 50 clients, so many selected per round",
    "600 images per client, five attackers; until half of the accuracy is lost;"
    f" {_BEFORE}.",
    "delta",
    {
      f"{count} selected": Cell(plan.changed(base, clients_per_round=count))
      for count in (5, 10, 15, 20, 25)
    },
    (("Attack success is greatly mitigated in all of them.", _falls_first),),
  )


def figure_8(bases: Bases) -> Figure:
  """One to ten attackers."""
  # All ten attackers need images of the victim label, of which there are 5,000.
  base = plan.changed(bases["mnist"], samples_per_client=1500)

  def protects(records: dict[str, list[Record]]) -> tuple[str, str]:
    many = {
      label: float(np.mean([run.phase("all")[AA] for run in runs]))
      for label, runs in records.items()
      if int(label) > 5
    }
    return (
      plan.verdict(*(value < 0.2 for value in many.values())),
      "AA of All with so many attackers: "
      + ", ".join(f"{k}: {100 * v:.1f}" for k, v in many.items()),
    )

  return Figure(
    "figure-8",
    "Figure 8: influence of the number of attackers",
    f"γ = {base.gamma:g} for one attacker, and that divided by their number for"
    " more, at least 1. 1,500 images per client, so that ten attackers find"
    " enough of the victim label.",
    "attackers",
    {
      str(count): Cell(
        plan.changed(
          base,
          num_attackers=count,
          gamma=max(1.0, base.gamma / count),
        )
      )
      for count in range(1, 11)
    },
    (
      (
        "With more than half of the clients malicious, the complete process"
        " still mitigates most backdoor attacks.",
        protects,
      ),
    ),
  )


def figure_9(bases: Bases) -> Figure:
  """Time per phase."""

  def short(records: dict[str, list[Record]]) -> tuple[str, str]:
    told, seen = [], []
    for label, runs in records.items():
      training = np.mean([run.phase("training")["seconds"] for run in runs])
      rest = np.mean(
        [
          sum(run.phase(name)["seconds"] for name in ("fp", "fp+ft", "all"))
          for run in runs
        ]
      )
      seen.append(bool(rest < training / 2))
      told.append(f"{label}: training {training:.0f} s, cleansing {rest:.0f} s")
    return plan.verdict(*seen), "; ".join(told)

  return Figure(
    "figure-9",
    "Figure 9: time of each process",
    "Seconds of finished work on the machine that the runs name, compilation"
    " included where a run compiled.",
    "seconds",
    {
      label: Cell(plan.of_pair(bases[name], (9, 0)))
      for name, label in (
        ("mnist", "MNIST"),
        ("fashion_mnist", "Fashion-MNIST"),
        ("cifar10", "CIFAR-10"),
      )
      if name in bases
    },
    (("Cleansing takes little beside training.", short),),
  )


def _lambda(value: float) -> str:
  return f"λ = {value:g}"


def figure_10(bases: Bases) -> Figure:
  """λ on the last convolution."""
  base = plan.changed(bases["mnist"], cleanse="", eval_every=3)

  def harder(records: dict[str, list[Record]]) -> tuple[str, str]:
    ends = {
      label: [
        100 * float(np.mean([run.phase("training")[key] for run in runs]))
        for key in (TA, AA)
      ]
      for label, runs in records.items()
    }
    first, last = ends[_lambda(0.0)], ends[_lambda(0.1)]
    return (
      plan.verdict(last[1] < first[1] - 5, last[0] < first[0]),
      ", ".join(f"{k}: {v[0]:.1f}/{v[1]:.1f}" for k, v in ends.items()),
    )

  return Figure(
    "figure-10",
    "Figure 10: L2 on the last convolution",
    "λ as in (λ/2)·Σw².",
    "training",
    {
      _lambda(value): Cell(plan.changed(base, last_conv_l2=value))
      for value in (0.0, 0.01, 0.03, 0.1)
    },
    (
      (
        "A large λ makes the attack much more challenging, at some loss of"
        " test accuracy.",
        harder,
      ),
    ),
  )


def figure_1(bases: Bases) -> Figure:
  """Triggers of 1 to 9 pixels on a real image."""
  return Figure(
    "figure-1",
    "Figure 1: pixel patterns",
    "",
    "triggers",
    {
      f"{pixels} pixels": Cell(
        plan.changed(bases["mnist"], trigger=f"pixel{pixels}")
      )
      for pixels in (1, 3, 5, 7, 9)
    },
  )


def figure_4(bases: Bases) -> Figure:
  """DBA's pieces on a real image."""
  return Figure(
    "figure-4",
    "Figure 4: the Distributed Backdoor Attack's pieces",
    plan.JPEG,
    "triggers",
    {"dba": Cell(bases["cifar10"])},
  )
