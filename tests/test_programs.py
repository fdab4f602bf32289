"""Compiled programs on disk: damage and lack of room are no user's business."""

import os
from pathlib import Path
import subprocess
import sys
import warnings

import jax
import pytest

from fljax import programs

# What is kept is decided by the time of compilation; here it is everything.
SCRIPT = """
import sys
import warnings

import jax

from fljax import programs

programs.keep(sys.argv[1])
programs.keep(sys.argv[1])  # As a second run in the same process does.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: 2 * x)(21.0))
print(jax.jit(lambda x: 3 * x)(14.0))
if len(sys.argv) > 2:
  warnings.warn(sys.argv[2])
"""


def start(folder, *arguments, kibibytes="unlimited"):
  return subprocess.run(
    [
      *("bash", "-c", f'ulimit -f {kibibytes}; exec "$@"', "bash"),
      *(sys.executable, "-c", SCRIPT, str(folder), *arguments),
    ],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "JAX_COMPILATION_CACHE_DIR": ""},
  )


def sizes(folder):
  return {path.name: path.stat().st_size for path in folder.glob("*-cache")}


def test_what_cannot_be_read_is_compiled_and_kept_again(tmp_path):
  folder = tmp_path / "programs"
  assert start(folder).stderr == ""
  whole = sizes(folder)
  assert len(whole) >= 2
  for name, size in whole.items():
    os.truncate(folder / name, size // 2)
  process = start(folder, "something else")
  assert process.stdout.split() == ["42.0", "42.0"]
  # Nothing of the cache, and all of everybody else's.
  assert "UserWarning: something else" in process.stderr
  assert "cache" not in process.stderr.replace(str(folder), "")
  assert sizes(folder) == whole


@pytest.mark.parametrize("missing", [True, False], ids=["no folder", "full"])
def test_where_none_can_be_kept_one_line_says_so(tmp_path, missing):
  (tmp_path / "file").write_text("")
  folder = tmp_path / ("file" if missing else "") / "programs"
  if not missing:
    # Of the same name, and none of what could not be written.
    folder.mkdir()
    (folder / "jit__lambda-other-cache").write_text("whole")
    os.utime(folder / "jit__lambda-other-cache", (0, 0))
  process = start(folder, kibibytes="unlimited" if missing else "1")
  assert process.stdout.split() == ["42.0", "42.0"]
  (line,) = process.stderr.splitlines()
  assert line.startswith(f"Compiled programs cannot be kept in {folder}: ")
  # Nothing half-written is left for the next.
  assert list(sizes(tmp_path / "programs")) == [
    *([] if missing else ["jit__lambda-other-cache"])
  ]


def test_another_folder_or_none_takes_over_from_the_first(tmp_path):
  script = """
import sys

import jax

from fljax import programs

for number, folder in enumerate([sys.argv[1], sys.argv[2], None]):
  programs.keep(folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.jit(lambda x: (number + 2) * x)(21.0)
"""
  folders = [tmp_path / name for name in ("first", "second")]
  subprocess.run([sys.executable, "-c", script, *folders], check=True)
  assert [len(sizes(folder)) for folder in folders] == [1, 1]


def test_a_folder_that_may_not_be_looked_into_ends_nothing(
  tmp_path, monkeypatch, capsys
):
  def refuse(path, *arguments, **named):
    raise PermissionError(13, "Permission denied", str(path))

  before = warnings.showwarning
  trouble = "Error reading persistent compilation cache entry for 'jit_run': No"
  with warnings.catch_warnings():
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    programs.keep(tmp_path)
    monkeypatch.setattr(Path, "glob", refuse)
    monkeypatch.setattr(Path, "is_dir", refuse)
    for _ in range(2):
      warnings.showwarning(UserWarning(trouble), UserWarning, "jax.py", 1)
  assert warnings.showwarning is before
  (line,) = capsys.readouterr().err.splitlines()
  assert line == f"Compiled programs cannot be kept in {tmp_path}: No"
