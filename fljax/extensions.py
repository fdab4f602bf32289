"""Parts of one's own: networks, triggers, rules, attacks and defences by name.

    from fljax import aggregators, extensions

    @extensions.aggregator("largest")
    def largest(trim):
      return aggregators.Aggregator(...)

registers a rule that settings may then name (`--aggregation=largest`). In a
file, `--extensions=FILE.py` loads it; from Python, importing it is enough.

Keyword arguments with defaults are a part's parameters, whole numbers, numbers,
truth values or texts: of `def largest(trim, *, share=0.5)` the setting
`--parameters=largest.share=0.25` takes another value.

A run is another experiment when the code of a part that it uses has changed:
`config.json` has the SHA-256 of the file that registered it, without the
functions by which that file registers other parts. What it imports is not
looked at. What parts return is, where they are used.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import MutableMapping
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
from pathlib import Path
import re
import sys
import traceback
from typing import Any
from typing import NamedTuple
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

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
# Names that mean something already: of phases, that of training and the paper's
# whole process; of rules, for fine-tuning, training's.
_BUILT_IN: dict[str, Collection[str]] = {
  "network": networks.NETWORKS,
  "aggregator": ("same",),
  "defence": (*pipeline.PHASES, *phases.BASELINES, "training", "all"),
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


class _Origin(NamedTuple):
  """Where a part was registered.

  Attributes:
    path: the file; None of what is typed in.
    line: of it, where the function begins, decorators included.
    parameters: what the function may be given, with its defaults.
    reads: of an attack, the settings of cleansing that it goes by.
  """

  path: Path | None
  line: int
  parameters: dict[str, bool | int | float | str]
  reads: tuple[str, ...]


# By kind and name.
_code: dict[tuple[str, str], _Origin] = {}
# Files as they were when they registered something.
_texts: dict[Path, str] = {}
_loaded: set[Path] = set()
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
    returns a list of `triggers.Trigger`, by `triggers.from_pixels`,
    `triggers.blended` or otherwise: the pieces, of which attacker i has number
    i modulo how many there are. Tests stamp all.

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


def attack(name: str, *, reads: Collection[str] = ()) -> Callable[[Part], Part]:
  """Registers an attack, for `--attack`.

  Args:
    name: what it is called.
    reads: settings of cleansing that it goes by, such as "pruning_rate". A
      model that was trained under attack is taken over by runs that differ in
      cleansing, so that an attack is shown no such setting but these, in which
      those runs must not differ then.

  Returns:
    A decorator of a function of the network (`models.Model`) and the settings
    (as `config.Config` has them) that returns an `attacks.Attack`.

  Raises:
    errors.ConfigError: the name is taken, or no name.
  """

  def guarded(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, config, **options: make(
      model, _Seen(config, name), **options
    )

  return _registering("attack", name, guarded, tuple(reads))


class _Seen:
  """The settings, less those of cleansing that an attack does not name."""

  def __init__(self, config: Any, name: str):
    self._config, self._name = config, name
    self._hidden = {
      field.name
      for field in dataclasses.fields(config)
      if field.metadata["cleansing"] and field.name not in reads(name)
    }

  def __getattr__(self, key: str) -> Any:
    if key in ("_config", "_name", "_hidden"):  # Not there yet, in a copy.
      raise AttributeError(key)
    if key in self._hidden:
      raise errors.ConfigError(
        f"the attack {self._name!r} reads {key}, a setting of cleansing,"
        " without saying so: see reads of fljax.extensions.attack."
      )
    found = inspect.getattr_static(type(self._config), key, None)
    if isinstance(found, property) and found.fget is not None:
      return found.fget(self)
    return getattr(self._config, key)


def reads(name: str) -> tuple[str, ...]:
  """The settings of cleansing that an attack of a user's own goes by."""
  known = _code.get(("attack", name))
  return known.reads if known else ()


def defence(name: str, *, needs_images: bool = True) -> Callable[[Part], Part]:
  """Registers a defence, for `--cleanse`.

  Args:
    name: what it is called.
    needs_images: whether it asks for images of the server's own. Where fp, ft,
      aw or ffst comes after one that does, a share of them is left to these
      (`--server_holdout`). Otherwise it is given all that there are, if any.

  Returns:
    A decorator of a function of a `phases.Subject` that returns
    `phases.Mitigated`. As fljax's own that are no part of the paper's process,
    each of several is applied to the trained model; with fp, ft or aw among
    them, one after another.

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
  reads: tuple[str, ...] = (),
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

    _register(kind, name, as_value(checked), function, reads)
    return function

  return register


def _register(
  kind: str,
  name: str,
  value: Any,
  function: Callable[..., Any],
  reads: tuple[str, ...],
) -> None:
  if not _NAME.fullmatch(name):
    raise errors.ConfigError(
      f"{name!r} is no name for a part: it must be of letters, digits, '_', '-'"
      " and '.'."
    )
  if name in (*_REGISTRIES[kind], *_BUILT_IN.get(kind, ())):
    raise errors.ConfigError(f"the {kind} {name!r} exists already.")
  _REGISTRIES[kind][name] = value
  _code[kind, name] = _origin(function, reads)


def _origin(function: Callable[..., Any], reads: tuple[str, ...]) -> _Origin:
  code = getattr(inspect.unwrap(function), "__code__", None)
  if _loading:
    path: Path | None = _loading[-1]
  else:
    path = Path(code.co_filename) if code else None
    try:
      if path is not None and path not in _texts:
        _texts[path] = path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # Typed in, or no text.
      path = None
  line = code.co_firstlineno if code else 0
  return _Origin(path, line, _defaults(function), reads)


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
  try:
    arguments = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):
    return {}
  return {
    argument.name: argument.default
    for argument in arguments
    if isinstance(argument.default, bool | int | float | str)
  }


def _digest(origin: _Origin) -> str | None:
  """Of a file less what registers its other parts; None where there is none."""
  if origin.path is None:
    return None
  text = _texts[origin.path]
  others = {one.line for one in _code.values() if one.path == origin.path} - {
    origin.line
  }
  lines = text.splitlines()
  with contextlib.suppress(SyntaxError):
    for node in ast.parse(text).body:
      if not isinstance(node, ast.FunctionDef):
        continue
      first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
      if first in others:
        # Lines keep their numbers.
        lines[first - 1 : node.end_lineno] = [""] * (
          (node.end_lineno or first) - first + 1
        )
  kept = "\n".join(line for line in lines if line.strip())
  return hashlib.sha256(kept.encode()).hexdigest()


def parameters(kind: str, name: str) -> dict[str, bool | int | float | str]:
  """What a part of a user's own may be given, with its defaults.

  Args:
    kind: "network", "trigger", "aggregator", "attack" or "defence".
    name: what it is called.

  Returns:
    Defaults by name; nothing of fljax's own parts.
  """
  known = _code.get((kind, name))
  return dict(known.parameters) if known else {}


def check_parameters(text: str) -> None:
  """Refuses values of parameters that no part has.

  Args:
    text: of `--parameters`.

  Raises:
    errors.ConfigError: it is not of the form, or names what there is not, or
      one twice, or a value is not of its default's type.
  """
  seen = set()
  for part, key, value in _given(text):
    # Parts of several kinds may have one name, and then share the value.
    known = [parameters(kind, part) for kind in _REGISTRIES]
    what = f"--parameters={text}: {part}.{key}"
    defaults = [one[key] for one in known if key in one]
    if not defaults:
      names = ", ".join(dict.fromkeys(name for one in known for name in one))
      some = f"it has {names}" if names else "it has none"
      raise errors.ConfigError(f"{what} is no parameter of {part}: {some}.")
    for default in defaults:
      try:
        _value_of(value, default)
      except ValueError:
        raise errors.ConfigError(
          f"{what} must be of type {type(default).__name__}."
        ) from None
    if (part, key) in seen:
      raise errors.ConfigError(f"--parameters={text} has {part}.{key} twice.")
    seen.add((part, key))


def values(text: str, kind: str, name: str) -> dict[str, Any]:
  """What `--parameters` gives a part, by the names of keyword arguments."""
  known = parameters(kind, name)
  return {
    key: _value_of(value, known[key])
    for part, key, value in _given(text)
    if part == name and key in known
  }


def of_parts(text: str, parts: Collection[tuple[str, str]]) -> str:
  """What of `--parameters` is some parts', each of a kind and a name."""
  return ",".join(
    f"{part}.{key}={value}"
    for part, key, value in _given(text)
    if any(
      name == part and key in parameters(kind, name) for kind, name in parts
    )
  )


def _given(text: str) -> list[tuple[str, str, str]]:
  """Part, parameter and value of each, as they are written."""
  found = []
  for item in filter(None, (piece.strip() for piece in text.split(","))):
    whole, equals, value = item.partition("=")
    part, dot, name = whole.rpartition(".")
    if not (equals and dot and part and name):
      raise errors.ConfigError(
        f"--parameters={text}: {item!r} is not of the form 'part.name=value'."
      )
    found.append((part.strip(), name.strip(), value.strip()))
  return found


def _value_of(text: str, default: bool | int | float | str) -> Any:
  """Of the default's type; ValueError if it is none."""
  if isinstance(default, bool):
    if text.lower() not in ("true", "false"):
      raise ValueError
    return text.lower() == "true"
  return type(default)(text)


def require_form(what: str, found: Any, wanted: Any) -> None:
  """Refuses a pytree of other arrays than were asked for.

  Args:
    what: for the message.
    found: a pytree.
    wanted: one of the same structure, shapes and types.

  Raises:
    errors.ConfigError: naming the first place that differs.
  """
  here, there = (_forms(tree) for tree in (found, wanted))
  for place in [*there, *here]:
    if place not in here:
      raise errors.ConfigError(f"{what} lacks {place}.")
    if place not in there:
      raise errors.ConfigError(f"{what} has {place}, which nobody asked for.")
    if here[place] != there[place]:
      raise errors.ConfigError(
        f"{what}{place} is {here[place]} instead of {there[place]}."
      )


def _forms(tree: Any) -> dict[str, str]:
  """The arrays of a pytree in words, by where they stand."""
  return {
    jax.tree_util.keystr(path): f"{jnp.result_type(leaf)} {np.shape(leaf)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def require_rule(
  name: str, rule: aggregators.Aggregator, params: Any, clients: int
) -> None:
  """Refuses a rule of a user's own that does not combine updates.

  Nothing is computed.

  Args:
    name: what it is called.
    rule: the rule.
    params: of a model, or their `jax.ShapeDtypeStruct`.
    clients: how many send updates.

  Raises:
    errors.ConfigError: its update has not the form of parameters, or its state
      is not of arrays, or changes its form.
  """
  what = f"the aggregator {name!r}: its"

  def init(params: Any) -> Any:
    state = rule.init(params)
    for leaf in jax.tree.leaves(state):
      if not isinstance(leaf, jax.Array | np.ndarray):
        raise errors.ConfigError(
          f"{what} state holds a {type(leaf).__name__}, no array."
        )
    return state

  def update(updates: Any, weights: Any, state: Any) -> Any:
    made = rule.update(updates, weights, state)
    if not isinstance(made, tuple) or len(made) != 2:
      raise errors.ConfigError(
        f"{what} update must return one update and the next state."
      )
    return made

  state = jax.eval_shape(init, params)
  updates = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((clients, *leaf.shape), leaf.dtype),
    params,
  )
  weights = jax.ShapeDtypeStruct((clients,), jnp.float32)
  combined, after = jax.eval_shape(update, updates, weights, state)
  require_form(f"{what} update", combined, params)
  require_form(f"{what} state", after, state)


def plain(value: Any, what: str) -> Any:
  """What a defence tells, as JSON has it.

  Args:
    value: a number, text, array, or a list or dictionary of such.
    what: for the message.

  Returns:
    The same without arrays; what is not finite, of which JSON knows nothing,
    is None.

  Raises:
    errors.ConfigError: it holds something else.
  """
  if isinstance(value, jax.Array | np.ndarray | np.generic):
    value = np.asarray(value).tolist()
  if isinstance(value, dict):
    return {str(key): plain(each, what) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [plain(each, what) for each in value]
  if isinstance(value, float):
    return value if np.isfinite(value) else None
  if value is None or isinstance(value, str | int):
    return value
  raise errors.ConfigError(
    f"{what} cannot be written: it holds a {type(value).__name__}, no number,"
    " text, array, list or dictionary."
  )


def is_own(kind: str, name: str) -> bool:
  """Whether a part is a user's."""
  return (kind, name) in _code


def code_of(*parts: tuple[str, str]) -> dict[str, str | None]:
  """What parts of a user's own are made of.

  Args:
    *parts: kind ("network", "trigger", "aggregator", "attack" or "defence")
      and name of each.

  Returns:
    A SHA-256 of what registered each, see above, None if it could not be
    read, by "kind name"; nothing of fljax's own parts.
  """
  return {
    " ".join(part): _digest(_code[part]) for part in parts if part in _code
  }


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
  code = content.decode("utf-8", "replace")
  if path in _loaded:
    if _texts[path] != code:
      raise errors.ConfigError(
        f"--extensions={text} has changed since it was loaded: start anew."
      )
    return
  # Numbered: two files may have the same name.
  name = f"fljax_extension_{len(_loaded)}_{path.stem}"
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise errors.ConfigError(f"--extensions={text} is no Python file (.py).")
  module = importlib.util.module_from_spec(spec)
  _texts[path] = code
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
  _loaded.add(path)


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
