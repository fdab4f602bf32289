"""Runs one experiment: python launch/main.py --flagfile=launch/mnist.flags."""

from collections.abc import Sequence
import sys

from absl import app
from absl import flags
from absl import logging

from fljax import config
from fljax import console
from fljax import errors
from fljax import experiment


def main(arguments: Sequence[str]) -> int:
  if len(arguments) > 1:
    print(f"fljax: unexpected argument {arguments[1]!r}.", file=sys.stderr)
    return 2
  # Orbax and JAX report every step of theirs at INFO.
  logging.set_verbosity(logging.WARNING)
  try:
    results = experiment.run(config.from_flags())
  except errors.FljaxError as error:
    print(f"fljax: {error}", file=sys.stderr)
    return 2
  print(console.table(results))
  return 0


if __name__ == "__main__":
  config.define_flags()
  # So that --help shows them.
  flags.adopt_module_key_flags(config)
  app.run(main)
