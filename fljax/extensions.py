"""Parts of one's own: networks, triggers, rules, attacks and defences by name.

    from fljax import aggregators, extensions

    @extensions.aggregator("largest")
    def largest(trim):
      return aggregators.Aggregator(...)

registers a rule that settings may then name (`--aggregation=largest`). In a
file, `--extensions=FILE.py` loads it; from Python, importing it is enough.

A run is another experiment when the code of a part that it uses has changed:
`config.json` has the SHA-256 of the file that registered it. What that file
imports is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import MutableMapping
import contextlib
import functools
import hashlib
import importlib.util
import inspect
from pathlib import Path
import re
import sys
import traceback
from typing import Any
from typing import TypeVar

from fljax import aggregators
from fljax import attacks
from fljax import errors
from fljax import models
from fljax import networks
from fljax import triggers
from fljax.baselines import phases
from fljax.cleanse import pipeline

Part = TypeVar("Part", bound=Callable[..., Any])

_REGISTRIES: dict[str, MutableMapping[str, Any]] = {
  "network": networks.BUILDERS,
  "trigger": triggers.TRIGGERS,
  "aggregator": aggregators.AGGREGATORS,
  "attack": attacks.ATTACKS,
  "defence": phases.DEFENCES,
}
_BUILT_IN: dict[str, Collection[str]] = {
  "network": networks.NETWORKS,
  "defence": (*pipeline.PHASES, *phases.BASELINES),
}
# What a part must return.
_MADE: dict[str, Callable[[Any], bool]] = {
  "network": lambda made: isinstance(made, models.Model),
  "trigger": lambda made: (
    isinstance(made, list)
    and len(made) > 0
    and all(isinstance(piece, triggers.Trigger) for piece in made)
  ),
  "aggregator": lambda made: isinstance(made, aggregators.Aggregator),
  "attack": lambda made: isinstance(made, attacks.Attack),
  "defence": lambda made: isinstance(made, phases.Mitigated),
}
# By kind and name: what registered it, where that can be read.
_code: dict[tuple[str, str], str | None] = {}
_loaded: dict[Path, str] = {}
_loading: list[Path] = []
# Values of settings join names by commas and pluses, files by slashes.
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def network(name: str) -> Callable[[Part], Part]:
  """Registers a network, for `--model`.

  Args:
    name: what it is called.

  Returns:
    A decorator of a function with the keyword arguments image_shape (height,
    width, channels), num_classes, mean and std (tuples of floats per channel,
    see `models.prepare`) that returns a `models.Model`, mostly by
    `models.from_flax`. `--initialisation`, `--conv` and `--pooling` are for
    fljax's own networks.

  Raises:
    errors.ConfigError: the name is taken, or no name.
  """
  return _registering("network", name)


def trigger(name: str) -> Callable[[Part], Part]:
  """Registers a trigger, for `--trigger`.

  Args:
    name: what it is called.

  Returns:
    A decorator of a function of the image shape (height, width, channels) that
    returns a list of `triggers.Trigger`: the pieces, of which attacker i has
    number i modulo how many there are. Tests stamp all.

  Raises:
    errors.ConfigError: the name is taken, or no name.
  """
  return _registering("trigger", name)


def aggregator(name: str) -> Callable[[Part], Part]:
  """Registers a rule, for `--aggregation` and `--fine_tune_aggregation`.

  Args:
    name: what it is called.

  Returns:
    A decorator of a function of `--aggregation_trim`, the share of a round's
    clients that may be malicious, that returns an `aggregators.Aggregator`.

  Raises:
    errors.ConfigError: the name is taken, or no name.
  """
  return _registering("aggregator", name)


def attack(name: str) -> Callable[[Part], Part]:
  """Registers an attack, for `--attack`.

  Args:
    name: what it is called.

  Returns:
    A decorator of a function of the network (`models.Model`) and the settings
    (`config.Config`) that returns an `attacks.Attack`.

  Raises:
    errors.ConfigError: the name is taken, or no name.
  """
  return _registering("attack", name)


def defence(name: str, *, needs_images: bool = True) -> Callable[[Part], Part]:
  """Registers a defence, for `--cleanse`.

  Args:
    name: what it is called.
    needs_images: whether it asks for images of the server's own.

  Returns:
    A decorator of a function of a `phases.Subject` that returns
    `phases.Mitigated`.

  Raises:
    errors.ConfigError: the name is taken, or no name.
  """
  return _registering(
    "defence", name, lambda run: phases.Defence(run, needs_images)
  )


def _registering(
  kind: str,
  name: str,
  as_value: Callable[[Callable[..., Any]], Any] = lambda function: function,
) -> Callable[[Part], Part]:
  def register(function: Part) -> Part:
    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
      made = function(*arguments, **options)
      if not _MADE[kind](made):
        raise errors.ConfigError(
          f"the {kind} {name!r} returns a {type(made).__name__}: see"
          f" fljax.extensions.{kind}."
        )
      return made

    _register(kind, name, as_value(checked), function)
    return function

  return register


def _register(
  kind: str, name: str, value: Any, function: Callable[..., Any]
) -> None:
  if not _NAME.fullmatch(name):
    raise errors.ConfigError(
      f"{name!r} is no name for a part: it must be of letters, digits, '_', '-'"
      " and '.'."
    )
  if name in (*_REGISTRIES[kind], *_BUILT_IN.get(kind, ())):
    raise errors.ConfigError(f"there is a {kind} {name!r} already.")
  _REGISTRIES[kind][name] = value
  _code[kind, name] = _digest(_loading[-1] if _loading else _source(function))


def _source(function: Callable[..., Any]) -> Path | None:
  try:
    return Path(inspect.getfile(inspect.unwrap(function)))
  except TypeError:  # What is written in C has none.
    return None


def _digest(path: Path | None) -> str | None:
  """None of what has no file, as what is typed in."""
  if path is None:
    return None
  try:
    return hashlib.sha256(path.read_bytes()).hexdigest()
  except OSError:
    return None


def code_of(*parts: tuple[str, str]) -> dict[str, str | None]:
  """What parts of a user's own are made of.

  Args:
    *parts: kind ("network", "trigger", "aggregator", "attack" or "defence")
      and name of each.

  Returns:
    The SHA-256 of the file that registered it, None if it could not be read,
    by "kind name"; nothing of fljax's own parts.
  """
  return {" ".join(part): _code[part] for part in parts if part in _code}


def load(files: str) -> None:
  """Loads files of parts, each once in a process.

  Args:
    files: paths, joined by commas; empty for none.

  Raises:
    errors.ConfigError: one cannot be read, fails, or has changed since it was
      loaded. What a failing one has registered is forgotten.
  """
  for text in (part.strip() for part in files.split(",")):
    if text:
      _load(text)


def _load(text: str) -> None:
  try:
    path = Path(text).expanduser().resolve()
    content = path.read_bytes()
  except (OSError, RuntimeError) as error:
    why = getattr(error, "strerror", None) or errors.first_line(error)
    raise errors.ConfigError(
      f"--extensions={text} cannot be read: {why}."
    ) from error
  digest = hashlib.sha256(content).hexdigest()
  if path in _loaded:
    if _loaded[path] != digest:
      raise errors.ConfigError(
        f"--extensions={text} has changed since it was loaded: start anew."
      )
    return
  # By its content: two files may have the same name.
  name = f"fljax_extension_{path.stem}_{digest[:8]}"
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise errors.ConfigError(f"--extensions={text} is no Python file (.py).")
  module = importlib.util.module_from_spec(spec)
  with _forgetting_failures(path):
    sys.modules[name] = module
    try:
      spec.loader.exec_module(module)
    except Exception as error:
      del sys.modules[name]
      raise errors.ConfigError(
        f"--extensions={text} fails{_where(error, path)}:"
        f" {type(error).__name__}: {errors.first_line(error)}"
      ) from error
  _loaded[path] = digest


@contextlib.contextmanager
def _forgetting_failures(path: Path) -> Iterator[None]:
  """Marks what is registered as this file's, and undoes it on errors."""
  before = {*_code}
  _loading.append(path)
  try:
    yield
  except BaseException:
    for kind, name in {*_code} - before:
      del _REGISTRIES[kind][name], _code[kind, name]
    raise
  finally:
    _loading.pop()


def _where(error: Exception, path: Path) -> str:
  """The line of the file that an error comes from, in words."""
  if isinstance(error, SyntaxError) and error.lineno:
    return f" in line {error.lineno}"
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == str(path)
  ]
  return f" in line {lines[-1]}" if lines else ""
