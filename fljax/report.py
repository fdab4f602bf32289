"""Result files -> figures and one self-contained HTML page.

Reads what a run left in its workdir and draws it; computes nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
import html
import io
import json
from typing import Any

from matplotlib import figure as figures
import numpy as np

from fljax import console
from fljax import workdir as workdirs

# Colour-blind safe (Okabe and Ito).
_TEST, _ATTACK, _VALIDATION, _CHOICE = "#0072B2", "#D55E00", "#009E73", "#555"

Line = dict[str, Any]


def write(
  workdir: workdirs.Workdir,
  results: dict[str, Any],
  images: list[tuple[str, np.ndarray]],
) -> None:
  """Draws all figures of a run and writes report.html.

  Args:
    workdir: the run's folder.
    results: the contents of results.json.
    images: clean and stamped examples with captions, uint8 [height, width,
      channels].
  """
  lines = workdir.metrics()
  drawn: dict[str, figures.Figure] = {}
  if images:
    drawn["trigger"] = trigger_figure(images)
  by_phase: dict[str, list[Line]] = {}
  for line in lines:
    by_phase.setdefault(line["phase"], []).append(line)
  for phase in results["phases"]:
    own = by_phase.get(phase["name"], [])
    name = phase["name"].replace("+", "_")
    if own and "pruned_neurons" in own[0]:
      drawn[f"pruning_{name}"] = pruning_figure(own, phase)
    elif own and "delta" in own[0]:
      drawn[f"delta_{name}"] = delta_figure(own, phase)
    elif own:
      drawn[name] = rounds_figure(own, phase)
  pictures = {name: _png(figure) for name, figure in drawn.items()}
  for name, picture in pictures.items():
    workdir.write_bytes(f"{workdirs.FIGURES}/{name}.png", picture)
  workdir.write_text(workdirs.REPORT, page(results, pictures))


def _png(figure: figures.Figure) -> bytes:
  stream = io.BytesIO()
  figure.savefig(stream, format="png", dpi=120)
  return stream.getvalue()


def _axes(x_label: str, title: str) -> tuple[figures.Figure, Any]:
  figure = figures.Figure(figsize=(6.4, 3.8), layout="constrained")
  axes = figure.subplots()
  axes.set_xlabel(x_label)
  axes.set_ylabel("accuracy, %")
  axes.set_title(title, fontsize=11)
  axes.set_ylim(-3, 103)
  axes.grid(alpha=0.3, linewidth=0.6)
  axes.spines[["top", "right"]].set_visible(False)
  return figure, axes


def _draw(axes: Any, x: list[float], lines: list[Line], marker: str) -> None:
  """Draws the curves that the lines have, in percent."""
  for key, label, colour, style in (
    ("test_accuracy", "test accuracy (TA)", _TEST, "-"),
    ("attack_success", "attack success (AA)", _ATTACK, "-"),
    ("accuracy", "accuracy as the server knows it", _VALIDATION, "--"),
  ):
    # Not every round is evaluated on everything.
    known = [
      (place, 100 * line[key])
      for place, line in zip(x, lines, strict=True)
      if line.get(key) is not None
    ]
    if known:
      axes.plot(
        *zip(*known, strict=True),
        style,
        color=colour,
        label=label,
        marker=marker,
        markersize=3,
        linewidth=1.5,
      )


def _mark(axes: Any, x: float, label: str) -> None:
  """A vertical line at what was chosen."""
  axes.axvline(x, color=_CHOICE, linestyle=":", label=label)


def rounds_figure(lines: list[Line], phase: dict[str, Any]) -> figures.Figure:
  """TA and AA over rounds, of training or fine-tuning (Fig. 3)."""
  figure, axes = _axes("round", phase["name"])
  _draw(axes, [line["round"] for line in lines], lines, "o")
  if phase.get("kept_round") is not None:
    _mark(axes, phase["kept_round"], f"kept: round {phase['kept_round']}")
  axes.legend(frameon=False, fontsize=9)
  return figure


def pruning_figure(lines: list[Line], phase: dict[str, Any]) -> figures.Figure:
  """Accuracies over the number of pruned neurons (Fig. 5)."""
  figure, axes = _axes("neurons pruned", f"{phase['name']}: pruning curve")
  _draw(axes, [line["pruned_neurons"] for line in lines], lines, "")
  chosen = phase["pruned_neurons"]
  _mark(axes, chosen, f"chosen: {chosen}")
  axes.legend(frameon=False, fontsize=9)
  return figure


def delta_places(deltas: Sequence[float | None]) -> list[float]:
  """Where thresholds stand on an axis; None is the model before adjusting.

  It stands left of the first threshold, so far that the labels do not touch.
  """
  finite = [delta for delta in deltas if delta is not None]
  span = finite[0] - finite[-1] if len(finite) > 1 else 1.0
  first = (finite[0] if finite else 0.0) + span / 10
  return [first if delta is None else delta for delta in deltas]


def name_delta_places(axes: Any, places: list[float]) -> None:
  """Makes Δ fall to the right, from "none" on; once all is drawn."""
  low, first = min(places), max(places)
  ticks = [tick for tick in axes.get_xticks() if low <= tick < first]
  axes.set_xticks([*ticks, first], [*(f"{t:g}" for t in ticks), "none"])
  axes.invert_xaxis()


def delta_figure(lines: list[Line], phase: dict[str, Any]) -> figures.Figure:
  """Accuracies over the threshold Δ, falling to the right (Fig. 6)."""
  figure, axes = _axes(
    "threshold Δ (standard deviations)", f"{phase['name']}: extreme weights"
  )
  x = delta_places([line["delta"] for line in lines])
  _draw(axes, x, lines, "o")
  chosen = phase["delta"]
  if chosen is None:
    _mark(axes, max(x), "chosen: no change")
  else:
    _mark(axes, chosen, f"chosen: Δ = {chosen:g}")
  name_delta_places(axes, x)
  axes.legend(frameon=False, fontsize=9)
  return figure


def trigger_figure(
  images: list[tuple[str, np.ndarray]],
) -> figures.Figure:
  """A real image, and what attackers and the test make of it (Fig. 1, 4)."""
  figure = figures.Figure(figsize=(2 * len(images), 2.3), layout="constrained")
  for axes, (caption, image) in zip(
    figure.subplots(1, len(images), squeeze=False)[0], images, strict=True
  ):
    # Three channels are colours; of any other number, the first is shown.
    shown = image if image.shape[-1] == 3 else image[..., 0]
    axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(caption, fontsize=10)
    # A trigger at the border shall not look like a piece missing there.
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
      side.set_color("#888")
  return figure


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd;
  text-align: left; }
td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto;
  font-size: .85rem; }
"""


def page(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
  """The HTML page: everything inline, no script.

  Args:
    results: the contents of results.json.
    pictures: PNG files by name.

  Returns:
    The page.
  """
  config = results["config"]
  attack = "no attacker"
  if config["num_attackers"]:
    attack = (
      f"{config['num_attackers']} attacking {config['victim_label']} →"
      f" {config['target_label']} with {config['trigger']}, γ ="
      f" {config['gamma']:g}"
    )
  title = (
    f"{config['dataset']}, {config['model']}, {config['num_clients']} clients,"
    f" {attack}"
  )
  rows = "".join(
    f"<tr><td>{html.escape(phase['name'])}</td>"
    f"<td class=number>{console.percent(phase['test_accuracy'])}</td>"
    f"<td class=number>{console.percent(phase['attack_success'])}</td>"
    f"<td class=number>{phase['seconds']:.1f}</td>"
    f"<td>{html.escape(console.detail(phase))}</td></tr>"
    for phase in results["phases"]
  )
  shown = "".join(
    f'<h2>{html.escape(name.replace("_", " "))}</h2><img alt="{name}"'
    ' src="data:image/png;base64,'
    f'{base64.b64encode(picture).decode()}">'
    for name, picture in pictures.items()
  )
  return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fljax: {html.escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{html.escape(title)}</h1>
<p>Seed {results["seed"]}. TA is the accuracy on the whole test split; AA the
share of stamped test images of {
    "the victim label"
    if config["attack_images"] == "victim"
    else "all labels but the target"
  } that are taken for the target.</p>
<table><thead><tr><th>phase</th><th class=number>TA, %</th>
<th class=number>AA, %</th><th class=number>seconds</th><th>what was done</th>
</tr></thead><tbody>{rows}</tbody></table>
{shown}
<h2>config</h2><pre>{html.escape(json.dumps(config, indent=2))}</pre>
<h2>environment</h2>
<pre>{html.escape(json.dumps(results["environment"], indent=2))}</pre>
</body></html>
"""
