"""Measures fljax: python launch/benchmark.py --workload=W1,W2 --compare=torch.

  W1  10 clients x 600 images 28x28x1, batch 50, conv 20/50 5x5, fc 500
  W2  50 clients x 50 images 32x32x3, batch 10, conv 32/64 3x3, fc 128
  W3  a round of launch/mnist.flags
  W4  VGG11, 10 clients, batch 50: 50 images each on CPU, 500 elsewhere
  W5  the whole pruning curve and 40 steps of the Δ curve of W3's model, over
      5,000 validation images, in plain evaluations of them
  W6  1,000 clients x 50 images 28x28x1, batch 50, W1's network; beside it the
      same with 100 clients, for the memory

Every workload runs in a process of its own, and its repetitions take turns
with those of what it is compared with; medians count. Images of W1, W2, W4
and W6 are random. FLOP/s are those that the network needs with plain
convolutions, whatever form computes them, as a share of a matrix product of
the same --precision in the same process: 2048³ on a CPU, 8192³ elsewhere.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.util
import json
import os
from pathlib import Path
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from absl import app
from absl import flags
from absl import logging

_WORKLOAD = flags.DEFINE_list(
  "workload", ["W1", "W2", "W3", "W4", "W5", "W6"], "What to measure."
)
_COMPARE = flags.DEFINE_enum(
  "compare",
  "",
  ["", "torch"],
  "A peer for W1, W2 and W4, in the same run: 'torch' is PyTorch's loop over"
  " clients. It must be installed.",
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 7, "Timed repetitions after the warm-up.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", "", "Also write the figures to this file.")
_DEVICES = flags.DEFINE_integer(
  "cpu_devices",
  0,
  "Devices that a CPU is divided into; 0 takes one per core, as runs do.",
  lower_bound=0,
)
_CHUNK = flags.DEFINE_integer(
  "client_chunk",
  -1,
  "Clients trained at once: 0 all, -1 the backend's measured choice.",
  lower_bound=-1,
)
_CONV = flags.DEFINE_enum(
  "conv",
  "auto",
  ["auto", "blocks", "winograd", "slices", "lax"],
  "Form of convolutions; 'auto' is the backend's measured choice.",
)
_PRECISION = flags.DEFINE_enum(
  "precision",
  "default",
  ["default", "high", "highest", "bfloat16"],
  "Of training in W1, W2, W3, W4 and W6, see launch/main.py; PyTorch gets the"
  " same: TF32 unless it is 'highest', autocast at 'bfloat16'.",
)
_WORKER = flags.DEFINE_string(
  "worker", "", "Internal: be the process that measures this."
)

FLAGFILE = Path(__file__).with_name("mnist.flags")

# Network, images, clients, images per client, batch size.
ROUNDS: dict[str, tuple[str, tuple[int, int, int], int, int, int]] = {
  "W1": ("mnist_large", (28, 28, 1), 10, 600, 50),
  "W2": ("cifar_small", (32, 32, 3), 50, 50, 10),
  "W4": ("vgg11", (32, 32, 3), 10, 0, 50),
  "W6": ("mnist_large", (28, 28, 1), 1000, 50, 50),
  "W6-100": ("mnist_large", (28, 28, 1), 100, 50, 50),
}
LEARNING_RATE = 0.05


# --- processes that measure --------------------------------------------------


def serve(make: Callable[[], tuple[Callable[[], Any], dict[str, Any]]]) -> None:
  """Answers every line on stdin with the seconds of one repetition.

  Args:
    make: builds (one repetition, facts); the first repetition, compilation
      included, is part of the facts.
  """
  started = time.perf_counter()
  # What libraries print must not get between the answers.
  with contextlib.redirect_stdout(sys.stderr):
    repeat, facts = make()
    before = time.perf_counter()
    repeat()
  facts["first_seconds"] = time.perf_counter() - before
  facts["start_seconds"] = time.perf_counter() - started
  print(json.dumps(facts), flush=True)
  for line in sys.stdin:
    if line.strip() == "stop":
      break
    with contextlib.redirect_stdout(sys.stderr):
      before = time.perf_counter()
      more = repeat()
      seconds = time.perf_counter() - before
    print(json.dumps({"seconds": seconds, **(more or {})}), flush=True)
  print(json.dumps({"peak_bytes": peak_bytes()}), flush=True)


def peak_bytes() -> int:
  """What the process, or its accelerator, held at most."""
  # PyTorch first: its process has imported JAX as well, and computes nothing
  # with it.
  if "torch" in sys.modules:
    import torch

    if torch.cuda.is_available():
      return int(torch.cuda.max_memory_allocated())
  if "jax" in sys.modules:
    import jax

    if jax.default_backend() != "cpu":
      stats = jax.devices()[0].memory_stats() or {}
      return int(stats.get("peak_bytes_in_use", 0))
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def samples_of(workload: str, backend: str) -> int:
  """Images per client."""
  samples = ROUNDS[workload][3]
  return samples or (50 if backend == "cpu" else 500)


def random_images(workload: str, samples: int) -> tuple[Any, Any]:
  """Images uint8 [clients, samples, ...] and labels int32."""
  import numpy as np

  _, shape, clients, _, _ = ROUNDS[workload]
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (clients, samples, *shape), np.uint8)
  return images, rng.integers(0, 10, (clients, samples)).astype(np.int32)


def federated_round(workload: str) -> tuple[Callable[[], Any], dict[str, Any]]:
  """A round of federated averaging, every client one epoch."""
  import jax
  import numpy as np
  import optax

  from fljax import aggregators
  from fljax import attacks
  from fljax import execution
  from fljax import federation as federations
  from fljax import layers
  from fljax import local
  from fljax import networks
  from fljax import parallel
  from fljax import partition as partitions
  from fljax import rounds

  name, shape, clients, _, batch = ROUNDS[workload]
  samples = samples_of(workload, jax.default_backend())
  plan = execution.plan_for()
  conv = plan.forms.conv if _CONV.value == "auto" else _CONV.value
  model = networks.build(
    name,
    image_shape=shape,
    num_classes=10,
    forms=layers.Forms(conv=conv, pooling=plan.forms.pooling),
  )
  images, labels = random_images(workload, samples)
  partition = partitions.Partition(
    indices=np.arange(clients * samples).reshape(clients, samples),
    mask=np.ones((clients, samples), bool),
  )
  federation = federations.create(
    images.reshape(-1, *shape), labels.reshape(-1), partition
  )
  mesh = parallel.make_mesh()
  federation = parallel.place(federation, mesh)
  chunk = plan.client_chunk if _CHUNK.value < 0 else _CHUNK.value
  aggregator = aggregators.mean()
  block = rounds.make_block(
    model,
    rounds.make_round(
      model,
      local.sgd_training(
        model,
        optax.sgd(LEARNING_RATE),
        epochs=1,
        batch_size=batch,
        precision=_PRECISION.value,
      ),
      attack=attacks.Attack(),
      aggregator=aggregator,
      client_chunk=chunk,
    ),
  )
  key = parallel.replicate(jax.random.key(0), mesh)
  state = parallel.replicate(rounds.init_state(model, aggregator, key), mesh)

  def repeat() -> None:
    nonlocal state
    state, metrics = block(state, federation, key, 1)
    jax.block_until_ready((state, metrics))

  facts = facts_of_training(name, shape)
  facts.update(
    images=clients * samples,
    conv=conv,
    client_chunk=chunk,
    precision=_PRECISION.value,
  )
  return repeat, facts


def mnist_round() -> tuple[Callable[[], Any], dict[str, Any]]:
  """A round of the main job."""
  import jax

  built = main_job()
  config, state = built.config, built.init_state()

  def repeat() -> None:
    nonlocal state
    state, metrics = built.block(state, built.federation, built.key, 1)
    jax.block_until_ready((state, metrics))

  facts = facts_of_training(config.model, built.model.image_shape)
  facts["images"] = built.federation.num_clients * min(
    config.steps_per_round * config.batch_size,
    config.local_epochs * config.samples_per_client,
  )
  return repeat, facts


def main_job() -> Any:
  """The experiment of launch/mnist.flags."""
  from fljax import config as configs
  from fljax import experiment

  values = flags.FlagValues()
  configs.define_flags(values)
  values(["benchmark", f"--flagfile={FLAGFILE}"])
  config = dataclasses.replace(
    configs.from_flags(values),
    conv=_CONV.value,
    client_chunk=_CHUNK.value,
    precision=_PRECISION.value,
  )
  return experiment.setup(config)


def searches() -> tuple[Callable[[], Any], dict[str, Any]]:
  """The pruning and Δ curves, in plain evaluations of the same images."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from fljax import evaluate
  from fljax import models
  from fljax.cleanse import pipeline
  from fljax.cleanse import pruning
  from fljax.cleanse import reports
  from fljax.cleanse import weights

  built = main_job()
  model, validation = built.model, built.validation
  # Weights of a trained model: how many are extreme decides what Δ costs.
  state, _ = built.block(built.init_state(), built.federation, built.key, 10)
  params = state.params
  means = reports.client_activations(model, params, built.federation)
  order = pruning.pruning_order(pruning.vote_scores(means, 0.5))
  kernel = models.target_kernel(model, params)
  mean, std = weights.statistics(kernel, state.neuron_mask, "surviving")
  deltas = weights.delta_steps(6.0, 0.15)
  assert len(deltas) == 40
  accuracy = jax.jit(lambda p, e: evaluate.accuracy(model, p, e))

  def timed(work: Callable[[], Any]) -> float:
    before = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - before

  def repeat() -> dict[str, Any]:
    return {
      "evaluation": timed(lambda: accuracy(params, validation)),
      "pruning_curve": timed(
        lambda: pruning.pruning_curve(model, params, order, validation)
      ),
      "delta_curve": timed(
        lambda: list(
          pipeline.delta_accuracies(
            model, params, validation, mean=mean, std=std, deltas=deltas
          )
        )
      ),
    }

  zeroed = [
    pipeline.count_zeroed(
      kernel, weights.zero_extremes(kernel, mean, std, jnp.float32(delta))
    )
    for delta in deltas
  ]
  facts = device_facts()
  facts.update(
    images=int(np.asarray(validation.mask).sum()),
    masks=model.neurons + 1,
    deltas=len(deltas),
    distinct_kernels=len({count for count in zeroed if count}),
  )
  return repeat, facts


def facts_of_training(name: str, shape: tuple[int, int, int]) -> dict[str, Any]:
  """FLOPs per image of training, and what the device can do."""
  facts = device_facts()
  facts["flops_per_image"] = training_flops(name, shape)
  facts["matmul_flops"] = matmul_flops()
  return facts


def training_flops(name: str, shape: tuple[int, int, int]) -> int:
  """Products and sums of a forward and backward pass over one image.

  Of plain convolutions (but for what they multiply with padding) and matrix
  products: forward, the gradient of weights, and that of inputs but for the
  first layer's.
  """
  from fljax import networks

  plan = networks.NETWORKS[name]

  def taps(side: int) -> int:
    """Pairs of an output and an input that it sees, along one axis."""
    grown = side + 2 * plan.padding - plan.size + 1
    return sum(
      0 <= output + tap - plan.padding < side
      for output in range(grown)
      for tap in range(plan.size)
    )

  height, width, channels = shape
  tail: tuple[int | str, ...] = ("pool",) if plan.pool else ()
  layers = []
  for item in (*plan.stem, plan.target, *tail):
    if item == "pool":
      height, width = height // 2, width // 2
      continue
    layers.append(2 * taps(height) * taps(width) * channels * int(item))
    height += 2 * plan.padding - plan.size + 1
    width += 2 * plan.padding - plan.size + 1
    channels = int(item)
  inputs = height * width * channels
  for features in (*plan.hidden, 10):
    layers.append(2 * inputs * features)
    inputs = features
  return 3 * sum(layers) - layers[0]


def device_facts() -> dict[str, Any]:
  """What is measured on what."""
  import jax

  return {
    "jax": jax.__version__,
    "backend": jax.default_backend(),
    "devices": jax.device_count(),
    "device_kind": jax.devices()[0].device_kind,
  }


def matmul_flops() -> float:
  """FLOP/s of a matrix product at the precision of training."""
  import jax
  import jax.numpy as jnp

  from fljax import execution

  side = 2048 if jax.default_backend() == "cpu" else 8192
  dtype = execution.compute_dtype(_PRECISION.value)
  matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
  product = jax.jit(execution.at_precision(_PRECISION.value)(jnp.matmul))
  product(matrix, matrix).block_until_ready()
  seconds = []
  for _ in range(5):
    before = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    seconds.append(time.perf_counter() - before)
  return 2 * side**3 / min(seconds)


def torch_round(workload: str) -> tuple[Callable[[], Any], dict[str, Any]]:
  """PyTorch: one client after another from the global model, then the mean."""
  import copy

  import torch
  from torch import nn

  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  # As fljax computes; and the fastest convolution of those that there are.
  torch.backends.cuda.matmul.allow_tf32 = _PRECISION.value != "highest"
  torch.backends.cudnn.allow_tf32 = _PRECISION.value != "highest"
  torch.backends.cudnn.benchmark = True
  autocast = torch.autocast(
    device.type, torch.bfloat16, enabled=_PRECISION.value == "bfloat16"
  )
  name, shape, clients, _, batch = ROUNDS[workload]
  samples = samples_of(workload, device.type)
  images, labels = random_images(workload, samples)
  images = torch.from_numpy(images.transpose(0, 1, 4, 2, 3).copy()).to(device)
  labels = torch.from_numpy(labels).long().to(device)
  model = torch_network(name, shape).to(device)

  def train(client: int) -> dict[str, Any]:
    local = copy.deepcopy(model)
    sgd = torch.optim.SGD(local.parameters(), lr=LEARNING_RATE)
    order = torch.randperm(samples, device=device)
    for chosen in order.split(batch):
      x = images[client, chosen].float() / 255
      with autocast:
        loss = nn.functional.cross_entropy(local(x), labels[client, chosen])
      sgd.zero_grad(set_to_none=True)
      loss.backward()
      sgd.step()
    return local.state_dict()

  def repeat() -> None:
    total: dict[str, Any] = {}
    for client in range(clients):
      for key, value in train(client).items():
        total[key] = total[key] + value if key in total else value.clone()
    model.load_state_dict({k: v / clients for k, v in total.items()})
    if device.type == "cuda":
      torch.cuda.synchronize()

  return repeat, {
    "torch": torch.__version__,
    "device_kind": torch.cuda.get_device_name()
    if device.type == "cuda"
    else "cpu",
    "images": clients * samples,
  }


def torch_network(name: str, shape: tuple[int, int, int]) -> Any:
  """The same network as `networks.build` makes."""
  import torch
  from torch import nn

  from fljax import networks

  plan = networks.NETWORKS[name]
  layers: list[Any] = []
  channels = shape[-1]
  tail: tuple[int | str, ...] = ("pool",) if plan.pool else ()
  for item in (*plan.stem, plan.target, *tail):
    if item == "pool":
      layers.append(nn.MaxPool2d(2))
      continue
    conv = nn.Conv2d(channels, int(item), plan.size, padding=plan.padding)
    norm = [nn.BatchNorm2d(int(item))] if plan.norm else []
    layers += [conv, *norm, nn.ReLU()]
    channels = int(item)
  layers.append(nn.Flatten())
  empty = torch.zeros(1, shape[2], *shape[:2])
  width = nn.Sequential(*layers)(empty).shape[1]
  for features in plan.hidden:
    layers += [nn.Linear(width, features), nn.ReLU()]
    width = features
  layers.append(nn.Linear(width, 10))
  return nn.Sequential(*layers)


def work(worker: str) -> None:
  """Is one of the measuring processes."""
  peer, _, workload = worker.partition(":")
  if peer == "torch":
    serve(lambda: torch_round(workload))
    return
  from fljax import config as configs
  from fljax import experiment

  experiment.use_devices(configs.Config(cpu_devices=_DEVICES.value))
  if workload == "W3":
    serve(mnist_round)
  elif workload == "W5":
    serve(searches)
  else:
    serve(lambda: federated_round(workload))


# --- the process that asks ---------------------------------------------------


class Worker:
  """A measuring process, idle until asked."""

  def __init__(self, name: str):
    """Starts it; its compilation is over when this returns."""
    self.name = name
    passed = [
      f"--cpu_devices={_DEVICES.value}",
      f"--client_chunk={_CHUNK.value}",
      f"--conv={_CONV.value}",
      f"--precision={_PRECISION.value}",
    ]
    self._process = subprocess.Popen(
      [sys.executable, __file__, f"--worker={name}", *passed],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      # On one accelerator two processes share its memory.
      env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
      text=True,
    )
    self.facts = self._answer()
    self.repetitions: list[dict[str, Any]] = []

  def repeat(self) -> None:
    """Runs one repetition, while this process waits."""
    self._ask("go")
    self.repetitions.append(self._answer())

  def stop(self) -> dict[str, Any]:
    """Ends it; returns its facts with the medians of its repetitions."""
    self._ask("stop")
    self.facts.update(self._answer())
    self._process.wait()
    for key in self.repetitions[0]:
      self.facts[key] = statistics.median(r[key] for r in self.repetitions)
    return self.facts

  def _ask(self, text: str) -> None:
    assert self._process.stdin is not None
    self._process.stdin.write(text + "\n")
    self._process.stdin.flush()

  def _answer(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f"{self.name} ended with {self._process.wait()}")
    return dict(json.loads(line))


def measure(workload: str) -> dict[str, Any]:
  """Measures one workload, and its peer in turns with it."""
  names = [f"fljax:{workload}"]
  if workload == "W6":
    names.append("fljax:W6-100")
  if _COMPARE.value and workload in ("W1", "W2", "W4"):
    names.append(f"{_COMPARE.value}:{workload}")
  workers = [Worker(name) for name in names]
  kinds = [worker.facts["device_kind"] for worker in workers]
  if len({kind == "cpu" for kind in kinds}) > 1:
    raise RuntimeError(
      f"on different devices, {' and '.join(kinds)}, there is no comparison;"
      " JAX_PLATFORMS and CUDA_VISIBLE_DEVICES decide on them"
    )
  for _ in range(_REPEATS.value):
    for worker in workers:
      worker.repeat()
  result = workers[0].stop()
  if "flops_per_image" in result:
    result["images_per_second"] = result["images"] / result["seconds"]
    result["flops"] = result["flops_per_image"] * result["images_per_second"]
    result["share_of_matmul"] = result["flops"] / result["matmul_flops"]
  if workload != "W5":
    # What the first repetition cost beyond any other.
    result["compile_seconds"] = result["first_seconds"] - result["seconds"]
  for worker in workers[1:]:
    other = worker.stop()
    other["images_per_second"] = other["images"] / other["seconds"]
    if worker.name == "fljax:W6-100":
      result["peak_bytes_of_100"] = other["peak_bytes"]
    else:
      result[_COMPARE.value] = other
      result["ratio"] = result["images_per_second"] / other["images_per_second"]
  if workload == "W5":
    for curve in ("pruning_curve", "delta_curve"):
      result[f"{curve}_in_evaluations"] = result[curve] / result["evaluation"]
  return result


def line(workload: str, result: dict[str, Any]) -> str:
  """The figures as people read them."""
  parts = []
  if workload == "W5":
    parts += [
      f"evaluation {result['evaluation']:.3f} s",
      f"pruning curve of {result['masks']} masks"
      f" {result['pruning_curve_in_evaluations']:.2f} evaluations",
      f"Δ curve of {result['deltas']} steps"
      f" {result['delta_curve_in_evaluations']:.2f} evaluations"
      f" ({result['distinct_kernels']} differ)",
    ]
  else:
    parts += [
      f"{result['images_per_second']:,.0f} images/s",
      f"{result['flops'] / 1e9:,.0f} GFLOP/s"
      f" ({100 * result['share_of_matmul']:.0f}% of a matrix product's"
      f" {result['matmul_flops'] / 1e9:,.0f})",
    ]
    parts.append(f"compilation {result['compile_seconds']:.1f} s")
  parts.append(f"peak {result['peak_bytes'] / 2**30:.2f} GiB")
  if "peak_bytes_of_100" in result:
    parts.append(
      f"with 100 clients {result['peak_bytes_of_100'] / 2**30:.2f} GiB"
    )
  if "ratio" in result:
    peer = result[_COMPARE.value]
    parts.append(
      f"{_COMPARE.value} {peer['images_per_second']:,.0f} images/s:"
      f" {result['ratio']:.2f} times as fast"
    )
  return f"{workload}: " + ", ".join(parts)


def unusable() -> str:
  """What is wrong with the flags, found before anything is measured."""
  known = ("W1", "W2", "W3", "W4", "W5", "W6")
  unknown = [name for name in _WORKLOAD.value if name not in known]
  if unknown or not _WORKLOAD.value:
    return (
      f"unknown --workload={','.join(unknown)}: choose of {', '.join(known)}."
    )
  if _COMPARE.value and importlib.util.find_spec(_COMPARE.value) is None:
    return (
      f"--compare={_COMPARE.value}: it is not installed: pip install"
      f" {_COMPARE.value}."
    )
  if _JSON.value and not Path(_JSON.value).absolute().parent.is_dir():
    return f"--json={_JSON.value}: there is no such folder."
  return ""


def main(arguments: Sequence[str]) -> int:
  logging.set_verbosity(logging.WARNING)
  if len(arguments) > 1:
    print(f"benchmark: unexpected argument {arguments[1]!r}.", file=sys.stderr)
    return 2
  if _WORKER.value:
    work(_WORKER.value)
    return 0
  if problem := unusable():
    print(f"benchmark: {problem}", file=sys.stderr)
    return 2
  found: dict[str, Any] = {
    "machine": {
      "platform": platform.platform(),
      "python": platform.python_version(),
      "cpus": os.cpu_count(),
    }
  }
  for workload in _WORKLOAD.value:
    try:
      found[workload] = measure(workload)
    except RuntimeError as error:
      print(f"benchmark: {workload}: {error}.", file=sys.stderr)
      return 1
    print(line(workload, found[workload]), flush=True)
    if _JSON.value:
      text = json.dumps(found, indent=2, sort_keys=True) + "\n"
      Path(_JSON.value).write_text(text, encoding="utf-8")
  return 0


if __name__ == "__main__":
  app.run(main)
