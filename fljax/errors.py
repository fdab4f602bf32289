"""The errors that a user can cause and can mend.

Each carries one sentence that says what is wrong and, where possible, what to
do. The command line prints that sentence and no traceback; from Python they
are ordinary exceptions. A bug raises something else.
"""

from collections.abc import Iterable


class FljaxError(Exception):
  """Base of every error whose message is meant for the user."""


class ConfigError(FljaxError, ValueError):
  """A setting is out of its range, or two settings contradict each other."""


class DataError(FljaxError):
  """A data set is missing, damaged, or not of the promised form."""


class WorkdirError(FljaxError):
  """The working directory cannot be used: taken, unwritable, or full."""


class CheckpointError(FljaxError):
  """A checkpoint is damaged or does not fit the model."""


class DivergedError(FljaxError):
  """Training produced a loss or parameters that are not finite."""


class InterruptedRunError(FljaxError):
  """The run was asked to stop; what was saved last is where it goes on."""


def require_choice(
  setting: str, value: object, choices: Iterable[object]
) -> None:
  """Refuses what is none of the choices.

  Args:
    setting: what is chosen, for the message.
    value: the choice.
    choices: all that there are.

  Raises:
    ConfigError: it is none of them.
  """
  known = list(choices)
  if value not in known:
    names = ", ".join(map(str, known))
    raise ConfigError(f"unknown {setting} {value!r}: choose one of {names}.")


def first_line(error: Exception) -> str:
  """What another library's exception says, short enough for one sentence."""
  return (str(error).splitlines() or ["no message"])[0][:200]
