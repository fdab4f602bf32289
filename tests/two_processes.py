"""Run by test_parallel: one of two processes that share an experiment.

Arguments: coordinator, number of processes, own number, workdir, and how many
rounds to run before a stop is asked for (0: none).
"""

import signal
import sys

import jax

jax.config.update("jax_platforms", "cpu")

import conftest  # noqa: E402

from fljax import networks  # noqa: E402

networks.NETWORKS["tiny"] = conftest.TINY

from fljax import config as configs  # noqa: E402
from fljax import errors  # noqa: E402
from fljax import experiment  # noqa: E402
from fljax import workdir as workdirs  # noqa: E402


def main(coordinator, processes, process, folder, stop_after):
  config = configs.Config(
    # Process 1 does not see process 0's folder.
    workdir=f"{folder}/{process}",
    dataset=f"{folder}/rows.npz",
    compilation_cache=f"{folder}/programs",
    cpu_devices=2 // int(processes),
    coordinator=coordinator if int(processes) > 1 else "",
    num_processes=int(processes),
    process_id=int(process),
    **{
      **conftest.TINY_SETTINGS,
      "cleanse": "fp,nc-prune,fst,ft,aw",
      "nc_steps": 6,
      "server_epochs": 1,
      "eval_every": 1,
    },
  )
  if int(stop_after):
    log = workdirs.Shared.log

    def stopping(self, **metrics):
      log(self, **metrics)
      if metrics.get("round") == int(stop_after) and process == "1":
        signal.raise_signal(signal.SIGTERM)

    workdirs.Shared.log = stopping
  try:
    experiment.run(config, quiet=True)
  except errors.InterruptedRunError as error:
    print(error)
    return 3
  except errors.FljaxError as error:
    print(error)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
