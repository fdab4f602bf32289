"""Everything that can be made, by what it is called and its number."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping

from fljax.reproduction import alone
from fljax.reproduction import attacked
from fljax.reproduction import beyond
from fljax.reproduction import discussion
from fljax.reproduction import figures
from fljax.reproduction import tables
from fljax.reproduction.plan import Bases
from fljax.reproduction.plan import Figure
from fljax.reproduction.plan import Table

TABLES: dict[int, Callable[[Bases], Table]] = {
  1: tables.table_1,
  2: tables.table_2,
  3: tables.table_3,
  4: tables.table_4,
  5: tables.table_5,
  6: tables.table_6,
  7: tables.table_7,
}
FIGURES: dict[int, Callable[[Bases], Figure]] = {
  1: figures.figure_1,
  3: figures.figure_3,
  4: figures.figure_4,
  5: figures.figure_5,
  6: figures.figure_6,
  7: figures.figure_7,
  8: figures.figure_8,
  9: figures.figure_9,
  10: figures.figure_10,
}
DISCUSSION: dict[int, Callable[[Bases], Table]] = {
  1: discussion.discussion_1,
  2: discussion.discussion_2,
  3: discussion.discussion_3,
}
BEYOND: dict[int, Callable[[Bases], Table]] = {
  1: beyond.beyond_1,
  2: beyond.beyond_2,
  3: beyond.beyond_3,
  4: alone.beyond_4,
  5: alone.beyond_5,
  6: alone.beyond_6,
  7: alone.beyond_7,
  8: alone.beyond_8,
  9: alone.beyond_9,
  10: beyond.beyond_10,
  11: beyond.beyond_11,
  12: attacked.beyond_12,
  13: alone.beyond_13,
  14: attacked.beyond_14,
  15: attacked.beyond_15,
}
# By the flag that asks for it, in the order in which the page shows it.
KINDS: dict[str, Mapping[int, Callable[[Bases], Table | Figure]]] = {
  "table": TABLES,
  "figure": FIGURES,
  "discussion": DISCUSSION,
  "beyond": BEYOND,
}
