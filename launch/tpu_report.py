"""Compiles fljax for Cloud TPU without one: python launch/tpu_report.py.

The TPU's own compiler comes with the package libtpu, which fljax's extra `tpu`
installs, and needs no TPU. Each experiment's programs are compiled for the
chips of a slice, from shapes alone, and what the compiler says of them is
shown:

  step           a round of a single batch per client, averaging included
  round          all batches of all clients, and averaging
  block          what training calls: any number of rounds, then evaluations
  activations    the clients' reports that pruning is ranked by
  pruning curve  accuracy at every step of the pruning sequence
  stem           what the Δ search computes once
  Δ step         what it computes for each Δ

FLOPs and bytes are the compiler's estimate for one chip, and it counts the
body of a loop once, however often that runs; `step` has no loop that runs
twice, and a round is about `steps` of them. The exit status is 1 if a program
does not compile, or needs more memory than a chip has.
"""

from collections.abc import Sequence
from importlib.metadata import version
import importlib.util
import json
import os
from pathlib import Path
import re
import sys
import time
from typing import Any
from typing import NamedTuple

from absl import app
from absl import flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np

from fljax import config as configs
from fljax import data
from fljax import errors
from fljax import execution
from fljax import experiment as experiments
from fljax import models
from fljax import parallel
from fljax.cleanse import pruning
from fljax.cleanse import reports
from fljax.cleanse import weights

HERE = Path(__file__).parent
_EXPERIMENTS = flags.DEFINE_list(
  "experiments",
  [str(HERE / "mnist.flags"), str(HERE / "cifar10_dba.flags")],
  "Flagfiles of the experiments to compile.",
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", "v5e:2x2", "Slice to compile for: generation and chips."
)
_HBM = flags.DEFINE_float(
  "hbm_gb", 16.0, "Memory of a chip, in 10^9 bytes.", lower_bound=0
)
_PROGRAMS = flags.DEFINE_list(
  "programs", [], "Names of the programs to compile; empty takes all."
)
_QUICK = flags.DEFINE_boolean(
  "quick",
  False,
  "Compile with the least optimisation, in a tenth of the time: more memory and"
  " more bytes moved than in a run.",
)
_JSON = flags.DEFINE_string("json", "", "Also write the figures to this file.")

# Data sets that are not bundled: only the shapes matter here.
STAND_INS = {
  "fashion_mnist": ((28, 28, 1), 60_000, 10_000),
  "cifar10": ((32, 32, 3), 50_000, 10_000),
}


class Program(NamedTuple):
  """Something to compile.

  Attributes:
    name: as the module's docstring has it.
    function: jitted.
    args: shapes on the slice, and static arguments.
  """

  name: str
  function: Any
  args: tuple[Any, ...]


# --- shapes instead of arrays ------------------------------------------------


def read(flagfile: str) -> configs.Config:
  """The settings that a flagfile describes."""
  values = flags.FlagValues()
  configs.define_flags(values)
  values(["tpu_report", f"--flagfile={flagfile}"])
  return configs.from_flags(values)


def stand_in(name: str) -> data.Dataset | None:
  """Empty images of a data set's shape; None for what is at hand."""
  if name not in STAND_INS:
    return None
  shape, train, test = STAND_INS[name]
  return data.Dataset(
    name=name,
    train_images=np.zeros((train, *shape), np.uint8),
    train_labels=np.arange(train, dtype=np.int32) % 10,
    test_images=np.zeros((test, *shape), np.uint8),
    test_labels=np.arange(test, dtype=np.int32) % 10,
    num_classes=10,
    mean=(0.5,) * shape[-1],
    std=(0.25,) * shape[-1],
  )


def shaped(tree: Any, mesh: parallel.Mesh, *spec: str | None) -> Any:
  """Shapes of a tree's arrays, spread over the slice like its arrays would."""
  sharding = jax.sharding.NamedSharding(mesh, parallel.Spec(*spec))
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    tree,
  )


def placed(federation: Any, mesh: parallel.Mesh, samples: int = 0) -> Any:
  """What `parallel.place` makes of a federation, as shapes.

  Args:
    federation: on the host.
    mesh: of the slice.
    samples: keeps so many of each client's; 0 keeps all.

  Returns:
    The federation's shapes.
  """
  padding = -federation.num_clients % mesh.size
  everything = federation.labels.shape

  def grow(leaf: Any) -> Any:
    rows = list(leaf.shape)
    rows[0] += padding
    if samples and leaf.shape[:2] == everything:
      rows[1] = samples
    return jax.ShapeDtypeStruct(tuple(rows), leaf.dtype)

  shapes = shaped(jax.tree.map(grow, federation), mesh, parallel.AXIS)
  return shapes.replace(mesh=mesh, padding=padding)


def programs(config: configs.Config, mesh: parallel.Mesh) -> list[Program]:
  """An experiment's programs, as they would be called on the slice."""
  plan = execution.PLANS["tpu"]
  # As `experiment.setup` rounds it on the slice.
  batch = -(-plan.evaluation_batch // mesh.size) * mesh.size
  built = experiments.setup(
    config,
    dataset=stand_in(config.dataset),
    plan=plan._replace(evaluation_batch=batch),
  )
  model = built.model
  state = shaped(jax.eval_shape(built.init_state), mesh)
  key = shaped(built.key, mesh)
  params = state.params
  federation = placed(built.federation, mesh)
  one_batch = placed(built.federation, mesh, samples=config.batch_size)
  examples = {
    name: shaped(value, mesh, None, parallel.AXIS)
    if value.mask.shape[1] % mesh.size == 0
    else shaped(value, mesh)
    for name, value in built.examples.items()
  }
  searched = examples.get("validation", examples["test"])
  order = shaped(jax.ShapeDtypeStruct((model.neurons,), jnp.int32), mesh)
  kernel = models.target_kernel(model, params)
  # The compiler leaves the stem's output where the images are.
  hidden = jax.eval_shape(
    lambda *args: weights.cache_stem(model, *args), params, searched
  )
  cached = jax.tree.map(
    lambda leaf, image: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=image.sharding
    ),
    hidden,
    searched,
  )
  return [
    Program("step", built.block, (state, one_batch, key, 1)),
    Program("round", built.block, (state, federation, key, 1)),
    Program("block", built.block, (state, federation, key, 1, examples)),
    Program(
      "activations", reports.client_activations, (model, params, federation)
    ),
    Program(
      "pruning curve", pruning.pruning_curve, (model, params, order, searched)
    ),
    Program("stem", weights.cache_stem, (model, params, searched)),
    Program(
      "Δ step",
      weights.accuracy_from_stem,
      (model, params, kernel, cached),
    ),
  ]


# --- the compiler's word -----------------------------------------------------


def measure(program: Program) -> dict[str, Any]:
  """Compiles a program; figures are per chip.

  Args:
    program: what to compile.

  Returns:
    The figures by name, bytes where no unit is named.

  Raises:
    jax.errors.JaxRuntimeError: it does not compile; a program too large for
      the chip's memory usually says so here.
  """
  started = time.perf_counter()
  lowered = program.function.lower(*program.args)
  compiled = lowered.compile()
  seconds = time.perf_counter() - started
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  arguments = memory.argument_size_in_bytes
  results = memory.output_size_in_bytes
  temporary = memory.temp_size_in_bytes
  return {
    "program": program.name,
    "products": products(lowered.as_text()),
    "flops": cost["flops"],
    "bytes_accessed": cost["bytes accessed"],
    "arguments": arguments,
    "outputs": results,
    "temporary": temporary,
    # Donated arguments are where outputs go.
    "total": arguments
    + results
    - memory.alias_size_in_bytes
    + temporary
    + memory.generated_code_size_in_bytes,
    "compile_seconds": round(seconds, 1),
  }


def products(text: str) -> list[str]:
  """The precisions of a program's matrix products and convolutions."""
  found = re.findall(
    r"stablehlo\.(?:dot_general|convolution)[^\n]*?(DEFAULT|HIGHEST|HIGH)\b",
    text,
  )
  return sorted({precision.lower() for precision in found})


HEAD = (
  f"{'program':14} {'GFLOP':>9} {'GB moved':>9} {'arguments':>10}"
  f" {'outputs':>8} {'temporary':>10} {'GB in all':>10} {'seconds':>7}"
  "  products"
)


def line(found: dict[str, Any]) -> str:
  """A program's row of the table."""
  moved, arguments, results, temporary, total = (
    found[name] / 1e9
    for name in (
      "bytes_accessed",
      "arguments",
      "outputs",
      "temporary",
      "total",
    )
  )
  return (
    f"{found['program']:14} {found['flops'] / 1e9:9.2f} {moved:9.2f}"
    f" {arguments:10.3f} {results:8.3f} {temporary:10.3f} {total:10.3f}"
    f" {found['compile_seconds']:7.1f}  {', '.join(found['products'])}"
  )


def report(flagfile: str, mesh: parallel.Mesh) -> dict[str, Any]:
  """Compiles an experiment's programs and shows what comes of them.

  Args:
    flagfile: of the experiment.
    mesh: of the slice.

  Returns:
    The figures of each program, or its failure.
  """
  config = read(flagfile)
  steps = config.steps_per_round
  found: dict[str, Any] = {
    "experiment": Path(flagfile).name,
    "steps_per_round": steps,
    "programs": [],
    "failures": [],
  }
  print(
    f"{found['experiment']}: {config.model}, {config.num_clients} clients on"
    f" {mesh.size} chips, {steps} steps a round\n{HEAD}\n{'-' * len(HEAD)}"
  )
  compiled = programs(config, mesh)
  names = [program.name for program in compiled]
  if unknown := [name for name in _PROGRAMS.value if name not in names]:
    raise errors.ConfigError(
      f"--programs={','.join(unknown)}: choose of {', '.join(names)}."
    )
  for program in compiled:
    if _PROGRAMS.value and program.name not in _PROGRAMS.value:
      continue
    try:
      figures = measure(program)
    except jax.errors.JaxRuntimeError as error:
      why = f"does not compile: {errors.first_line(error)}"
    else:
      found["programs"].append(figures)
      print(line(figures), flush=True)
      if figures["total"] <= _HBM.value * 1e9:
        continue
      why = (
        f"needs {figures['total'] / 1e9:.1f} GB of a chip's {_HBM.value:g} GB"
      )
    found["failures"].append(f"{found['experiment']}: {program.name} {why}")
  print()
  return found


def main(arguments: Sequence[str]) -> int:
  if len(arguments) > 1:
    print(f"tpu_report: unexpected argument {arguments[1]!r}.", file=sys.stderr)
    return 2
  if importlib.util.find_spec("libtpu") is None:
    print(
      "tpu_report: the package libtpu is not installed: pip install '.[tpu]'.",
      file=sys.stderr,
    )
    return 2
  # The host's part is for the CPU. As there is no TPU, its library shall not
  # look for one, nor complain that there is none.
  jax.config.update("jax_platforms", "cpu")
  if _QUICK.value:
    jax.config.update("jax_optimization_level", "O0")
  for variable, value in (
    ("TPU_SKIP_MDS_QUERY", "1"),
    ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    ("TPU_WORKER_HOSTNAMES", "localhost"),
    # Other processes may hold the library, or a TPU.
    ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
  ):
    os.environ.setdefault(variable, value)
  try:
    devices: list[jax.Device] = topologies.get_topology_desc(
      _TOPOLOGY.value, platform="tpu"
    ).devices
    mesh = parallel.Mesh(np.asarray(devices), (parallel.AXIS,))
    found = [report(flagfile, mesh) for flagfile in _EXPERIMENTS.value]
  except (errors.FljaxError, flags.Error, jax.errors.JaxRuntimeError) as error:
    print(f"tpu_report: {errors.first_line(error)}", file=sys.stderr)
    return 2
  print(
    f"Per chip of {_TOPOLOGY.value} ({devices[0].device_kind}); the body of a"
    " loop counts once."
  )
  if _JSON.value:
    summary = {
      "topology": _TOPOLOGY.value,
      "device_kind": devices[0].device_kind,
      "hbm_gb": _HBM.value,
      "quick": _QUICK.value,
      **{name: version(name) for name in ("jax", "libtpu")},
      "experiments": found,
    }
    Path(_JSON.value).write_text(json.dumps(summary, indent=2) + "\n")
  failures = [failure for one in found for failure in one["failures"]]
  for failure in failures:
    print(f"tpu_report: {failure}.", file=sys.stderr)
  return 1 if failures else 0


if __name__ == "__main__":
  app.run(main)
