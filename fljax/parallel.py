"""Mapping over clients: on one device in chunks, on many along a mesh.

A federation says where it lives (`Federation.mesh`); programs written with
`map_clients` and `sum_over_clients` run there. Rows of padding, which make the
clients axis divisible, cost time but count for nothing. `map_rows` does the
same for rows that are no clients, and `spread_batches` spreads the batches of
one training.

Several processes, each with devices of its own, run the same program on one
mesh of all devices. What only one of them may do, such as writing files, goes
through `on_first`.
"""

from __future__ import annotations

from collections.abc import Callable
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fljax import errors
from fljax import evaluate
from fljax import federation as federations

Array = jax.Array
Mesh = jax.sharding.Mesh
Spec = jax.sharding.PartitionSpec

AXIS = "clients"

# How long XLA's CPU devices wait for each other, in seconds, before they say so
# and before they end the process: each its own option.
_PATIENCE = 86_400
_TIMEOUTS = (
  "xla_cpu_collective_call_warn_stuck_timeout_seconds",
  "xla_cpu_collective_call_terminate_timeout_seconds",
)


# --- processes ---------------------------------------------------------------


def wait_for_slow_devices() -> None:
  """Lets a CPU's devices wait for each other for a day, before JAX starts.

  By itself XLA aborts the process when one device has waited for another for a
  minute. Many minutes of work may lie between two meetings, and another process
  on one of the cores is enough to part them by more than that. What XLA_FLAGS
  says about it already stays.

  References:
    openxla/xla#32115, "Make rendezvous timeouts configurable via flags".
  """
  given = os.environ.get("XLA_FLAGS", "")
  options = [
    f"--{name}={_PATIENCE}" for name in _TIMEOUTS if f"--{name}=" not in given
  ]
  os.environ["XLA_FLAGS"] = " ".join([given, *options]).strip()


def start(coordinator: str, num_processes: int, process_id: int) -> None:
  """Joins the other processes, before JAX computes anything.

  On Cloud TPU the machines of a slice find each other without being told.

  Args:
    coordinator: host:port of process 0; empty where there are no others, and
      on Cloud TPU.
    num_processes: of all.
    process_id: this one's number, from 0.

  Raises:
    errors.ConfigError: the others cannot be reached.
  """
  # A second experiment in the same process finds the others there already.
  if jax.distributed.is_initialized():
    return
  try:
    if coordinator:
      jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
      )
    elif _on_tpu():
      jax.distributed.initialize()
  except (RuntimeError, ValueError) as error:
    raise errors.ConfigError(
      f"the processes of --coordinator={coordinator} do not come together:"
      f" {errors.first_line(error)}"
    ) from error


def _on_tpu() -> bool:
  if importlib.util.find_spec("libtpu") is None:
    return False
  chips = ("accel0", "vfio/0")
  return any((Path("/dev") / name).exists() for name in chips)


def on_first(work: Callable[[], Any]) -> Any:
  """Does on process 0 what one process shall do; all learn what came of it.

  Every process must call it at the same place.

  Args:
    work: returns something that JSON can hold.

  Returns:
    What process 0's call returned.

  Raises:
    errors.FljaxError: the one that it raised there, raised in all.
  """
  if jax.process_count() == 1:
    return work()
  message: dict[str, Any] = {}
  failure: BaseException | None = None
  if jax.process_index() == 0:
    try:
      message = {"value": work()}
    except errors.FljaxError as error:
      failure = error
      message = {"error": type(error).__name__, "text": str(error)}
  message = json.loads(_broadcast_bytes(json.dumps(message).encode()))
  if failure is not None:
    raise failure
  if "error" in message:
    raise getattr(errors, message["error"])(message["text"])
  return message["value"]


def from_first(tree: Any) -> Any:
  """Process 0's values of a pytree of NumPy arrays, in all processes."""
  if jax.process_count() == 1:
    return tree
  from jax.experimental import multihost_utils

  return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def anywhere(flag: bool) -> bool:
  """Whether a flag is set in any process; all must ask at the same place."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils

  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _broadcast_bytes(content: bytes) -> bytes:
  size = int(from_first(np.asarray(len(content), np.int32)))
  padded = np.zeros(size, np.uint8)
  if jax.process_index() == 0:
    padded[:] = np.frombuffer(content, np.uint8)
  return bytes(from_first(padded).astype(np.uint8))


# --- placing -----------------------------------------------------------------


def make_mesh(devices: int = 0) -> Mesh | None:
  """A mesh of all processes' devices, along which clients are spread.

  Args:
    devices: how many to use; 0 takes all. With several processes all are
      used.

  Returns:
    The mesh; None for a single device, which needs none.

  Raises:
    errors.ConfigError: there are fewer devices.
  """
  available = jax.devices()
  if devices > len(available):
    raise errors.ConfigError(
      f"--devices={devices} is more than the {len(available)} there are."
    )
  if devices and devices < len(available) and jax.process_count() > 1:
    raise errors.ConfigError(
      f"--devices={devices}: with several processes all"
      f" {len(available)} devices are used; leave it at 0."
    )
  chosen = available[: devices or len(available)]
  if len(chosen) == 1:
    return None
  return Mesh(np.asarray(chosen), (AXIS,))


def place(
  federation: federations.Federation, mesh: Mesh | None
) -> federations.Federation:
  """Spreads a federation's clients over a mesh.

  Args:
    federation: on the host or one device, the same in every process.
    mesh: None leaves it where it is.

  Returns:
    The federation, padded to a multiple of the mesh's size. Each device, and
    each process, holds its own clients only.
  """
  if mesh is None:
    return federation
  if federation.padding:
    federation = without_padding(federation)
  padding = -federation.num_clients % mesh.size

  def put(leaf: Array) -> Array:
    host = np.asarray(leaf)
    # Padding is filled by repeating a client, whose share is then zero.
    host = np.concatenate([host, np.repeat(host[:1], padding, axis=0)])
    return _put(host, jax.sharding.NamedSharding(mesh, Spec(AXIS)))

  placed = jax.tree.map(put, federation)
  return placed.replace(mesh=mesh, padding=padding)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
  """The same values on every device of a mesh."""
  if mesh is None:
    return tree
  sharding = jax.sharding.NamedSharding(mesh, Spec())
  return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)


def place_examples(
  examples: evaluate.Examples, mesh: Mesh | None
) -> evaluate.Examples:
  """Spreads every batch of examples over a mesh, if it divides evenly."""
  if mesh is None:
    return examples
  if examples.mask.shape[1] % mesh.size:
    return replicate(examples, mesh)
  sharding = jax.sharding.NamedSharding(mesh, Spec(None, AXIS))
  return jax.tree.map(lambda leaf: _put(leaf, sharding), examples)


def _put(leaf: Any, sharding: jax.sharding.Sharding) -> Array:
  """A global array from the same host array in every process."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    bits = _put(jax.random.key_data(leaf), sharding)
    return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
  host = np.asarray(leaf)
  return jax.make_array_from_callback(
    host.shape, sharding, lambda index: host[index]
  )


def on_host(tree: Any) -> Any:
  """The same arrays as NumPy arrays, whole in every process."""
  # As elsewhere: of several processes alone.
  from jax.experimental import multihost_utils

  def fetch(leaf: Any) -> np.ndarray:
    if isinstance(leaf, Array) and not leaf.is_fully_addressable:
      return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)

  return jax.tree.map(fetch, tree)


def gather_cohort(
  federation: federations.Federation, chosen: Array
) -> federations.Federation:
  """The clients at the given positions, spread like the federation.

  Args:
    federation: all clients.
    chosen: int32 [cohort], positions.

  Returns:
    The cohort, padded to a multiple of the mesh's size.
  """
  mesh = federation.mesh
  if mesh is None:
    return federations.select(federation, chosen)
  padding = -len(chosen) % mesh.size
  chosen = jnp.pad(chosen, (0, padding), mode="edge")
  cohort = lax.with_sharding_constraint(
    federations.select(federation, chosen),
    jax.sharding.NamedSharding(mesh, Spec(AXIS)),
  )
  return cohort.replace(mesh=mesh, padding=padding)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
  """Within a program: what is spread over a mesh, whole on every device."""
  if mesh is None:
    return tree
  return lax.with_sharding_constraint(
    tree, jax.sharding.NamedSharding(mesh, Spec())
  )


def spread_batches(indices: Array, mesh: Mesh | None, *, fill: int) -> Array:
  """Within a program: spreads every batch of samples over a mesh.

  What a step computes of its batch is then spread likewise.

  Args:
    indices: int32 [steps, batch].
    mesh: None leaves them as they are.
    fill: what batches are filled up with to be divisible, an index that is no
      sample's.

  Returns:
    int32 [steps, batch] or, filled up, a little more.
  """
  if mesh is None:
    return indices
  padding = -indices.shape[1] % mesh.size
  return lax.with_sharding_constraint(
    jnp.pad(indices, [(0, 0), (0, padding)], constant_values=fill),
    jax.sharding.NamedSharding(mesh, Spec(None, AXIS)),
  )


def without_padding(
  federation: federations.Federation,
) -> federations.Federation:
  """Only rows that are somebody, on no mesh as far as programs can tell."""
  clients = federation.num_clients
  return jax.tree.map(lambda leaf: leaf[:clients], _bare(federation))


# --- mapping -----------------------------------------------------------------


def map_clients(
  function: Callable[..., Any],
  common: Any,
  federation: federations.Federation,
  *columns: Any,
  chunk: int = 1,
) -> Any:
  """Applies a function to every client.

  Args:
    function: (common, client, *columns of that client) -> results.
    common: what all clients share.
    federation: the clients.
    *columns: further arrays [rows, ...] with one row per client.
    chunk: clients at once on a device: 0 for all, 1 for one by one. Results
      are the same up to rounding; memory grows with the chunk.

  Returns:
    The results, each leaf [clients, ...], without padding.
  """
  results = _map(
    function, common, (_bare(federation), *columns), federation.mesh, chunk
  )
  return _join(results, federation.num_clients, chunked=False)


def map_rows(
  function: Callable[..., Any],
  common: Any,
  *columns: Any,
  mesh: Mesh | None,
  chunk: int = 1,
) -> Any:
  """Applies a function to rows that are no clients, such as classes.

  Args:
    function: (common, *columns of a row) -> results. Rows may take different
      numbers of a loop's steps; it must not sum over devices.
    common: what all rows share.
    *columns: arrays [rows, ...], whole on every device.
    mesh: the devices that rows are spread over; None for a single one.
    chunk: as in `map_clients`.

  Returns:
    The results, each leaf [rows, ...].
  """
  count = _length(columns)
  if mesh is not None:
    # Padding repeats a row, as `place` does.
    padding = -count % mesh.size
    columns = jax.tree.map(
      lambda leaf: jnp.concatenate(
        [leaf, jnp.repeat(leaf[:1], padding, axis=0)]
      ),
      columns,
    )
  return _join(
    _map(function, common, columns, mesh, chunk), count, chunked=False
  )


def _map(
  function: Callable[..., Any],
  common: Any,
  rows: Any,
  mesh: Mesh | None,
  chunk: int,
) -> Any:
  """`map_clients` and `map_rows`, the results of padding included."""

  def on_one_device(common: Any, *rows: Any) -> Any:
    count = _length(rows)
    size, extra = _chunks(count, chunk)
    _, results = lax.scan(
      lambda _, part: ((), _each(function, common, part, size)),
      (),
      _split(rows, size, extra),
    )
    return _join(results, count)

  return _spread(on_one_device, mesh, Spec(AXIS))(common, *rows)


def sum_over_clients(
  function: Callable[..., tuple[Any, Any]],
  common: Any,
  shares: Array,
  federation: federations.Federation,
  *columns: Any,
  chunk: int = 1,
) -> tuple[Any, Any]:
  """Σ share_i · (what client i yields), formed chunk by chunk.

  Args:
    function: (common, clients of a chunk, *their columns) -> (what is summed,
      what is kept of every client), each leaf [chunk, ...], the first
      floating point.
    common: what all clients share.
    shares: float32 [clients].
    federation: the clients.
    *columns: further arrays [rows, ...] with one row per client.
    chunk: clients at once on a device, see `map_clients`.

  Returns:
    The sum, each leaf [...], the same on every device, and what was kept,
    each leaf [clients, ...]. No more than one chunk's summands are ever held.
  """
  shares = jnp.pad(shares, (0, federation.padding))

  def on_one_device(common: Any, *rows: Any) -> tuple[Any, Any]:
    count = _length(rows)
    size, extra = _chunks(count, chunk)
    shares, *parts = _split(rows, size, extra)
    # The last chunk's extra clients are repetitions, without a share.
    counted = (jnp.arange(count + extra) < count).reshape(-1, size)
    shares = jnp.where(counted, shares, 0)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
      shares, rows = part
      summands, kept = function(common, *rows)
      return jax.tree.map(
        lambda old, leaf: (
          old
          # Or accelerators would round the updates.
          + jnp.tensordot(shares, leaf, axes=1, precision="highest")
        ),
        total,
        summands,
      ), kept

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes, _ = jax.eval_shape(function, common, *first)
    zeros = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), shapes
    )
    total, kept = lax.scan(add, zeros, (shares, parts))
    if federation.mesh is not None:
      total = lax.psum(total, AXIS)
    return total, _join(kept, count)

  total, kept = _spread(on_one_device, federation.mesh, (Spec(), Spec(AXIS)))(
    common, shares, _bare(federation), *columns
  )
  return total, _join(kept, federation.num_clients, chunked=False)


def each(function: Callable[..., Any]) -> Callable[..., Any]:
  """A function of one client as one of a chunk of clients.

  `vmap`, but that a chunk of one client is that client: with a batch dimension
  of one, XLA's CPU backend is slower.

  Args:
    function: (common, client, *columns).

  Returns:
    (common, clients, *columns) with a leading axis on everything but common.
  """
  return lambda common, *rows: _each(function, common, rows, _length(rows))


def _each(
  function: Callable[..., Any], common: Any, rows: Any, size: int
) -> Any:
  if size > 1:
    return jax.vmap(lambda row: function(common, *row))(rows)
  result = function(common, *jax.tree.map(lambda leaf: leaf[0], rows))
  return jax.tree.map(lambda leaf: leaf[jnp.newaxis], result)


def _bare(federation: federations.Federation) -> federations.Federation:
  """Without the static fields, which a single client or chunk has not."""
  return federation.replace(mesh=None, padding=0)


def _length(rows: Any) -> int:
  return int(jax.tree.leaves(rows)[0].shape[0])


def _chunks(count: int, chunk: int) -> tuple[int, int]:
  """Even chunks no larger than asked for, and what the last one lacks."""
  parts = 1 if chunk == 0 else -(-count // chunk)
  size = -(-count // parts)
  return size, parts * size - count


def _split(rows: Any, size: int, extra: int) -> Any:
  def split(leaf: Array) -> Array:
    if extra:
      leaf = jnp.concatenate([leaf, jnp.repeat(leaf[:1], extra, axis=0)])
    return leaf.reshape(-1, size, *leaf.shape[1:])

  return jax.tree.map(split, rows)


def _join(parts: Any, count: int, *, chunked: bool = True) -> Any:
  """The first `count` rows of results [chunks, chunk, ...] or [rows, ...]."""

  def join(leaf: Array) -> Array:
    return (leaf.reshape(-1, *leaf.shape[2:]) if chunked else leaf)[:count]

  return jax.tree.map(join, parts)


def _spread(
  function: Callable[..., Any], mesh: Mesh | None, out: Any
) -> Callable[..., Any]:
  """Runs (common, *rows) -> results on each device's own rows."""
  if mesh is None:
    return function

  def spread(common: Any, *rows: Any) -> Any:
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=(Spec(), *(Spec(AXIS) for _ in rows)),
      out_specs=out,
      check_vma=False,
    )(common, *rows)

  return spread
