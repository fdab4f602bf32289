"""Runs experiments: python launch/main.py --flagfile=launch/mnist.flags."""

from collections.abc import Sequence
import sys

from absl import app
from absl import flags
from absl import logging

from fljax import config
from fljax import errors
from fljax import experiment
from fljax import summary
from fljax import sweep


def main(arguments: Sequence[str]) -> int:
  if len(arguments) > 1:
    print(f"fljax: unexpected argument {arguments[1]!r}.", file=sys.stderr)
    return 2
  # Orbax and JAX report every step of theirs at INFO.
  logging.set_verbosity(logging.WARNING)
  try:
    if flags.FLAGS.sweep:
      return run_sweep(sweep.expand(config.from_flags(), flags.FLAGS.sweep))
    results = experiment.run(config.from_flags())
  except errors.FljaxError as error:
    print(f"fljax: {error}", file=sys.stderr)
    return 2
  print(summary.table(results))
  return 0


def run_sweep(configs: dict[str, config.Config]) -> int:
  outcome = sweep.run(configs)
  if outcome.results:
    print(summary.compared(outcome.results))
  for name, error in outcome.failed.items():
    print(f"fljax: {name}: {error}", file=sys.stderr)
  return 2 if outcome.failed else 0


if __name__ == "__main__":
  config.define_flags()
  # So that --help shows them.
  flags.adopt_module_key_flags(config)
  app.run(main)
