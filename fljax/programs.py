"""Compiled programs that are kept between runs: only the first one waits.

JAX keeps them, and what it cannot read or write it says in warnings, at every
start again: a program that a full disk or a kill left half-written stays as it
is (`jax._src.lru_cache` writes in place, and never over what is there).
"""

from __future__ import annotations

import glob
from pathlib import Path
import re
import sys
from typing import Any
import warnings

import jax
from jax.experimental.compilation_cache import compilation_cache
import tqdm

# After so many experiments of different programs, a process should forget
# them: every compiled program on a CPU holds mappings of memory, an
# experiment's some 150, of which Linux gives a process 65,530; past them, XLA
# ends in a segmentation fault. What is forgotten comes back from the folder.
FORGET_EVERY = 100
_SAYS = r"Error (reading|writing) persistent compilation cache entry for "
_TROUBLE = re.compile(_SAYS + r"'(.+?)': (.*)", re.DOTALL)


def keep(folder: str | Path | None) -> None:
  """Keeps compiled programs in a folder, and takes them from there.

  One that cannot be read is thrown away, with all of its name, and compiled
  again; so is what was half-written. Where none can be kept, one line on
  stderr says so.

  Args:
    folder: of the programs; made when there is something to keep. None keeps
      none, and takes none.
  """
  name = None if folder is None else str(folder)
  jax.config.update("jax_compilation_cache_dir", name)
  # Or JAX stays with the folder that it first used.
  compilation_cache.reset_cache()
  if folder is None:
    return
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  # Two programs may have one name, and a warning is else shown once.
  warnings.filterwarnings("always", _SAYS)
  if isinstance(warnings.showwarning, _Mending):
    warnings.showwarning.folder = Path(folder)
  else:
    warnings.showwarning = _Mending(Path(folder), warnings.showwarning)


class _Mending:
  """Stands for `warnings.showwarning`, and acts on those of the cache."""

  def __init__(self, folder: Path, others: Any):
    self.folder = folder
    self._others = others
    self._told = False

  def __call__(
    self, message: Warning | str, *arguments: Any, **named: Any
  ) -> None:
    trouble = _TROUBLE.match(str(message))
    if trouble is None:
      self._others(message, *arguments, **named)
      return
    doing, name, reason = trouble.groups()
    try:
      kept = self._forget(name, newest=doing == "writing")
    except OSError:
      kept = False
    if not kept and not self._told:
      self._told = True
      tqdm.tqdm.write(
        f"Compiled programs cannot be kept in {self.folder}: {reason}",
        file=sys.stderr,
      )

  def _forget(self, name: str, *, newest: bool) -> bool:
    """Deletes what is kept under a name; whether more can be kept.

    Which of them was meant JAX does not say. What could not be written is the
    newest; what cannot be read may be any, and the others cost a compilation.
    """
    found = list(self.folder.glob(f"{glob.escape(name)}-*"))
    if newest and found:
      found = [max(found, key=lambda path: path.stat().st_mtime_ns)]
    for program in found:
      program.unlink(missing_ok=True)
    return not newest and self.folder.is_dir()
