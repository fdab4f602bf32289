"""Results -> Markdown, CSV, JSON, figures, and one page over everything."""

from __future__ import annotations

import base64
from collections.abc import Callable
import csv
import html
import io
import json
import re
from typing import Any
from typing import NamedTuple
import warnings

import matplotlib
from matplotlib import figure as figures
import numpy as np

from fljax import data
from fljax import driver as driving
from fljax import report
from fljax.config import Config
from fljax.reproduction import archive
from fljax.reproduction.plan import AA
from fljax.reproduction.plan import TA
from fljax.reproduction.plan import Column
from fljax.reproduction.plan import Figure
from fljax.reproduction.plan import Record
from fljax.reproduction.plan import Row
from fljax.reproduction.plan import Table
from fljax.reproduction.plan import cases_of
from fljax.reproduction.plan import variants_of

# One colour per curve (Okabe and Ito), in the order of labels.
_COLOURS = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#E69F00",
  "#56B4E9",
  "#000000",
)
_NONE = "–"
_TRAINING = tuple(Config().training())

# By experiment: row (or curve), variant and seed.
Records = dict[tuple[str, str, int], Record]
Failures = dict[tuple[str, str, int], str]


class Rendered(NamedTuple):
  """A table or figure as files.

  Attributes:
    files: contents by name.
    section: its part of the page, HTML.
    summary: its averages or statements, for the terminal.
  """

  files: dict[str, bytes]
  section: str
  summary: str


# --- tables ------------------------------------------------------------------


def values_of(
  table: Table, records: Records, seeds: tuple[int, ...]
) -> np.ndarray:
  """What a table shows: float [rows, seeds, columns], NaN where unknown."""
  values = np.full((len(table.rows), len(seeds), len(table.columns)), np.nan)
  for i, row in enumerate(table.rows):
    for j, seed in enumerate(seeds):
      cases = _cases(row, records, seed)
      for k, column in enumerate(table.columns):
        found = [
          records[row.label, variant, seed].phase(column.phase)[column.key]
          for variant in variants_of(row, column)
          if (row.label, variant, seed) in records
          and variant.partition("/")[2] in ("", *cases)
        ]
        known = [value for value in found if value is not None]
        if known:
          value = float(np.mean(known))
          values[i, j, k] = 100 * value if column.percent else value
  return values


def _cases(row: Row, records: Records, seed: int) -> list[str]:
  return cases_of(row, lambda name: (row.label, name, seed) in records)


def _trained_apart(row: Row, records: Records, seed: int) -> bool:
  """Whether the same training had several outcomes, on several machines."""
  outcomes: dict[str, set[tuple[Any, ...]]] = {}
  for variant in row.cells:
    if (row.label, variant, seed) in records:
      record = records[row.label, variant, seed]
      config = record.results["config"]
      settings = {key: config.get(key) for key in _TRAINING}
      trained = record.results["phases"][0]
      outcomes.setdefault(json.dumps(settings, sort_keys=True), set()).add(
        (trained[TA], trained[AA])
      )
  return any(len(several) > 1 for several in outcomes.values())


def _mean_and_deviation(values: np.ndarray) -> tuple[float, float, int]:
  known = values[~np.isnan(values)]
  if not len(known):
    return np.nan, np.nan, 0
  spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
  return float(known.mean()), spread, len(known)


def _by_seed(values: np.ndarray) -> np.ndarray:
  """Of every seed the mean over rows; one of all, if rows differ in seeds.

  A deviation over seeds would then be one between rows.
  """
  known = ~np.isnan(values)
  some = known.any(axis=1)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # A mean of nothing.
    if (known[some] == known[some][:1]).all():
      return np.nanmean(values, axis=0)
    return np.nanmean(np.nanmean(values, axis=1), keepdims=True)


def _digits(column: Column) -> int:
  return 1 if column.percent else 0


def _shown(column: Column, values: np.ndarray, published: float | None) -> str:
  """Ours, over seeds, and the paper's in parentheses."""
  mean, spread, count = _mean_and_deviation(values)
  digits = _digits(column)
  text = f"{mean:.{digits}f}" if count else _NONE
  if count > 1:
    text += f" ± {spread:.{digits}f}"
  if published is not None:
    text += f" ({published:.{digits}f})"
  return text


def table(
  table: Table,
  records: Records,
  failures: Failures,
  seeds: tuple[int, ...],
  command: str,
) -> Rendered:
  """A table beside the paper's, in all its forms.

  Args:
    table: what it is.
    records: the experiments that are done.
    failures: why others have no result.
    seeds: those that were asked for.
    command: what makes it again.

  Returns:
    Markdown, CSV and JSON files.
  """
  values = values_of(table, records, seeds)
  complete = [
    seed for j, seed in enumerate(seeds) if not np.isnan(values[:, j, 0]).all()
  ]
  heads = [f"{column.group} {column.name}".strip() for column in table.columns]
  rows = [
    [
      row.label,
      *(
        _shown(column, values[i, :, k], row.paper[k])
        for k, column in enumerate(table.columns)
      ),
    ]
    for i, row in enumerate(table.rows)
  ]
  average, differences = ["mean"], ["difference"]
  for k, column in enumerate(table.columns):
    by_seed = _by_seed(values[:, :, k])
    # The paper's over the same rows, unless there is none of ours yet.
    ours = ~np.isnan(values[:, :, k]).all(axis=1)
    known = [
      value
      for value, has in zip(
        (row.paper[k] for row in table.rows), ours, strict=True
      )
      if value is not None and (has or not ours.any())
    ]
    expected = float(np.mean(known)) if known else None
    average.append(_shown(column, by_seed, expected))
    mean, _, count = _mean_and_deviation(by_seed)
    differences.append(
      f"{mean - expected:+.{_digits(column)}f}"
      if count and expected is not None
      else ""
    )
  if table.averaged:
    rows.append(average)
    if any(differences[1:]):
      rows.append(differences)
  statements = _statements(table.statements, values, bool(records))
  notes = [
    f"Ours (the paper's), TA and AA in percent. {table.note}".strip(),
    f"Seeds {', '.join(map(str, complete)) or 'none yet'}; `{command}`.",
    *(
      f"{row.label}, seed {seed}: means over {', '.join(cases)}."
      for row in table.rows
      for seed in complete
      if (cases := _cases(row, records, seed))
    ),
    *(
      f"{row.label}, seed {seed}: trained more than once, from the same"
      " settings, and not to the same model; columns are of different ones."
      for row in table.rows
      for seed in complete
      if _trained_apart(row, records, seed)
    ),
    *(
      f"{label}, {variant}, seed {seed}: {reason}"
      for (label, variant, seed), reason in failures.items()
    ),
  ]
  if not records:
    notes.append("No result yet.")
  markdown = "\n".join(
    [
      f"# {table.title}",
      "",
      *_markdown_table(["", *heads], rows),
      "",
      *(f"{note}\n" for note in notes),
      *_markdown_statements(statements),
      "",
    ]
  )
  section = (
    _html_table(["", *heads], rows)
    + _html_notes(notes)
    + _html_statements(statements)
  )
  return Rendered(
    {
      f"{table.name}.md": markdown.encode(),
      f"{table.name}.csv": _csv(table, values, seeds),
      f"{table.name}.json": archive.dump(
        table.title, command, records, statements
      ),
    },
    section,
    "  ".join(
      f"{head} {text}"
      for head, text in zip(heads, average[1:], strict=True)
      if table.averaged and text != _NONE
    ),
  )


def _csv(table: Table, values: np.ndarray, seeds: tuple[int, ...]) -> bytes:
  stream = io.StringIO()
  writer = csv.writer(stream, lineterminator="\n")
  writer.writerow(
    [
      "row",
      "column",
      "paper",
      "mean",
      "deviation",
      "difference",
      *(f"seed {seed}" for seed in seeds),
    ]
  )
  for i, row in enumerate(table.rows):
    for k, column in enumerate(table.columns):
      mean, spread, count = _mean_and_deviation(values[i, :, k])
      published = row.paper[k]
      writer.writerow(
        [
          row.label,
          f"{column.group} {column.name}".strip(),
          "" if published is None else published,
          f"{mean:.3f}" if count else "",
          f"{spread:.3f}" if count > 1 else "",
          f"{mean - published:.3f}" if count and published is not None else "",
          *("" if np.isnan(v) else f"{v:.3f}" for v in values[i, :, k]),
        ]
      )
  return stream.getvalue().encode()


def _statements(
  statements: Any, values: Any, known: bool
) -> list[tuple[str, str, str]]:
  """(statement, verdict, numbers)."""
  told = []
  for text, check in statements if known else ():
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        verdict, numbers = check(values)
    except (KeyError, IndexError, ValueError):
      # Parts that it needs have no result yet.
      continue
    told.append((text, verdict, numbers))
  return told


def _markdown_table(heads: list[str], rows: list[list[str]]) -> list[str]:
  lines = [heads, ["---", *("---:" for _ in heads[1:])], *rows]
  return ["| " + " | ".join(line) + " |" for line in lines]


def _markdown_statements(told: list[tuple[str, str, str]]) -> list[str]:
  return [
    f"- “{text}” **{verdict}**: {numbers}." for text, verdict, numbers in told
  ]


def _html_table(heads: list[str], rows: list[list[str]]) -> str:
  def line(cells: list[str], tag: str) -> str:
    return (
      "<tr>"
      + "".join(
        f"<{tag}{' class=number' if i else ''}>{html.escape(cell)}</{tag}>"
        for i, cell in enumerate(cells)
      )
      + "</tr>"
    )

  body = "".join(line(row, "td") for row in rows)
  return (
    f"<table><thead>{line(heads, 'th')}</thead><tbody>{body}</tbody></table>"
  )


def _html_notes(notes: list[str]) -> str:
  """A paragraph for each; what stands in backticks is code."""
  paragraphs = (
    re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(note)) for note in notes
  )
  return "".join(f"<p>{text}</p>" for text in paragraphs)


def _html_statements(told: list[tuple[str, str, str]]) -> str:
  items = "".join(
    f"<li>“{html.escape(text)}” <b>{html.escape(verdict)}</b>:"
    f" {html.escape(numbers)}.</li>"
    for text, verdict, numbers in told
  )
  return f"<ul>{items}</ul>" if items else ""


# --- figures -----------------------------------------------------------------

Runs = dict[str, list[Record]]


def figure(
  figure: Figure,
  records: Records,
  failures: Failures,
  seeds: tuple[int, ...],
  command: str,
) -> Rendered:
  """A figure as PNG and SVG, its cells as JSON; see `table`."""
  runs: Runs = {}
  for (label, _, _), record in records.items():
    runs.setdefault(label, []).append(record)
  if figure.kind == "triggers":
    drawn = _triggers(figure)
  elif runs:
    drawn = _DRAWINGS[figure.kind](runs)
  else:
    drawn = None
  statements = _statements(figure.statements, runs, bool(runs))
  notes = [figure.note] if figure.note else []
  notes.append(f"`{command}`.")
  notes += [
    f"{label}, seed {seed}: {reason}"
    for (label, _, seed), reason in failures.items()
  ]
  if drawn is None:
    notes.append("No result yet.")
  elif runs:
    done = sorted({seed for _, _, seed in records})
    notes.append(f"Seeds {', '.join(map(str, done))}.")
  files = {}
  section = ""
  if drawn is not None:
    for suffix in ("png", "svg"):
      stream = io.BytesIO()
      with matplotlib.rc_context({"svg.hashsalt": figure.name}):
        drawn.savefig(stream, format=suffix, dpi=150, metadata=_PLAIN[suffix])
      files[f"{figure.name}.{suffix}"] = stream.getvalue()
    picture = base64.b64encode(files[f"{figure.name}.png"]).decode()
    section = (
      f'<img alt="{html.escape(figure.title)}"'
      f' src="data:image/png;base64,{picture}">'
    )
  if runs:
    files[f"{figure.name}.json"] = archive.dump(
      figure.title, command, records, statements
    )
  section += _html_notes(notes)
  return Rendered(
    files,
    section + _html_statements(statements),
    "; ".join(f"{verdict}: {numbers}" for _, verdict, numbers in statements),
  )


# Without the date, and with ids that are not random, the same results give the
# same bytes.
_PLAIN: dict[str, dict[str, Any]] = {
  "png": {"Software": None},
  "svg": {"Date": None},
}


def _axes(
  count: int = 1, columns: int = 1, *, x: str, y: str = "accuracy, %"
) -> tuple[figures.Figure, list[Any]]:
  rows = -(-count // columns)
  drawn = figures.Figure(
    figsize=(5.2 * columns + 1.2, 3.2 * rows + 0.6), layout="constrained"
  )
  grid = drawn.subplots(rows, columns, squeeze=False).ravel()
  for axes in grid[:count]:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
  for axes in grid[count:]:
    axes.set_axis_off()
  return drawn, list(grid[:count])


def _mean_curve(
  runs: list[Record], phase: str, x: str, key: str
) -> tuple[list[float], np.ndarray]:
  """A curve averaged over seeds, in percent, where all of them have it."""
  curves = [{line[x]: line[key] for line in run.curve(phase)} for run in runs]
  shared = [place for place in curves[0] if all(place in c for c in curves)]
  return shared, np.array(
    [100 * np.mean([curve[place] for curve in curves]) for place in shared]
  )


def _training(runs: Runs) -> figures.Figure:
  """TA solid, AA dashed, over rounds (Figures 3 and 10)."""
  drawn, (axes,) = _axes(x="round")
  for colour, (label, group) in zip(_COLOURS, runs.items(), strict=False):
    for key, style, name in ((TA, "-", f"{label}, TA"), (AA, "--", None)):
      x, y = _mean_curve(group, "training", "round", key)
      axes.plot(x, y, style, color=colour, label=name, linewidth=1.5)
  axes.plot([], [], "--", color="#555", label="AA of the same")
  axes.set_ylim(-3, 103)
  axes.legend(frameon=False, fontsize=9)
  return drawn


def _panels(runs: Runs, phase: str, x: str, x_label: str) -> figures.Figure:
  drawn, grid = _axes(len(runs), min(2, len(runs)), x=x_label)
  for axes, (label, group) in zip(grid, runs.items(), strict=True):
    for key, name, colour in (
      (TA, "test accuracy (TA)", _COLOURS[0]),
      (AA, "attack success (AA)", _COLOURS[1]),
    ):
      places, values = _mean_curve(group, phase, x, key)
      if x == "delta":
        places = report.delta_places(places)
      axes.plot(places, values, color=colour, label=name, linewidth=1.5)
    axes.set_title(label, fontsize=10)
    axes.set_ylim(-3, 103)
    if x == "delta":
      report.name_delta_places(axes, places)
  grid[0].legend(frameon=False, fontsize=9)
  return drawn


def _pruning(runs: Runs) -> figures.Figure:
  return _panels(runs, "fp", "pruned_neurons", "neurons pruned")


def _delta(runs: Runs) -> figures.Figure:
  return _panels(runs, "all", "delta", "threshold Δ, standard deviations")


def _attackers(runs: Runs) -> figures.Figure:
  """TA and AA after pruning, and after everything (Figure 8)."""
  drawn, (axes,) = _axes(x="attackers among ten clients")
  counts = [int(label) for label in runs]
  for phase, name, colour in (
    ("fp", "pruning", _COLOURS[0]),
    ("all", "complete", _COLOURS[1]),
  ):
    for key, style, what in ((TA, "-", "TA"), (AA, "--", "AA")):
      values = [
        100 * np.mean([run.phase(phase)[key] for run in group])
        for group in runs.values()
      ]
      axes.plot(
        counts, values, style, color=colour, marker="o", label=f"{name}, {what}"
      )
  axes.set_ylim(-3, 103)
  axes.set_xticks(counts)
  axes.legend(frameon=False, fontsize=9)
  return drawn


def _seconds(runs: Runs) -> figures.Figure:
  """Seconds of each process (Figure 9)."""
  phases = {
    "training": "training",
    "fp": "pruning",
    "fp+ft": "fine-tuning",
    "all": "adjusting weights",
  }
  drawn, (axes,) = _axes(x="", y="seconds")
  width = 0.8 / len(runs)
  for index, (label, group) in enumerate(runs.items()):
    values = [
      float(np.mean([run.phase(phase)["seconds"] for run in group]))
      for phase in phases
    ]
    places = np.arange(len(phases)) + (index - (len(runs) - 1) / 2) * width
    bars = axes.bar(places, values, width, color=_COLOURS[index], label=label)
    axes.bar_label(bars, fmt="%.1f", fontsize=8)
  axes.set_xticks(range(len(phases)), list(phases.values()))
  axes.set_yscale("log")
  axes.legend(frameon=False, fontsize=9)
  return drawn


def _triggers(figure: Figure) -> figures.Figure | None:
  """Triggers on a real image (Figures 1 and 4); None without the data."""
  images: list[tuple[str, np.ndarray]] = []
  for label, cell in figure.cells.items():
    config = cell.config
    dataset = data.load(config.dataset, config.data_dir or None, download=False)
    shown = driving.trigger_images(config, dataset)
    if len(figure.cells) == 1:
      return report.trigger_figure(shown)
    images = images or shown[:1]
    images.append((label, shown[-1][1]))
  return report.trigger_figure(images)


_DRAWINGS: dict[str, Callable[[Runs], figures.Figure]] = {
  "training": _training,
  "pruning": _pruning,
  "delta": _delta,
  "attackers": _attackers,
  "seconds": _seconds,
}


# --- the page ----------------------------------------------------------------

# Ten columns fit a wide window; a table that is wider scrolls by itself, and
# numbers stay on a line.
_WIDE_TABLES = """
body { max-width: 76rem; }
table { display: block; overflow-x: auto; font-size: .9rem; }
th, td { padding: .3rem .5rem; }
td:first-child { white-space: nowrap; }
td.number { white-space: nowrap; }
"""


def page(sections: dict[str, str]) -> str:
  """One self-contained page.

  Args:
    sections: by title, in order, the HTML of each.

  Returns:
    The page.
  """
  links = "".join(
    f'<li><a href="#s{index}">{html.escape(title)}</a></li>'
    for index, title in enumerate(sections)
  )
  body = "".join(
    f'<h2 id="s{index}">{html.escape(title)}</h2>{section}'
    for index, (title, section) in enumerate(sections.items())
  )
  return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fljax: the paper's tables and figures</title>
<style>{report.STYLE}{_WIDE_TABLES}</style></head>
<body><h1>Toward Cleansing Backdoored Neural Networks in Federated Learning:
tables and figures, reproduced</h1><ul>{links}</ul>{body}</body></html>
"""
