"""Clients in chunks and over devices: the same results as one by one."""

import json
import os
import socket
import subprocess
import sys

import chex
from conftest import ROOT
from conftest import make_federation
from conftest import write_images
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import errors
from fljax import federation as federations
from fljax import parallel

# The second of two devices comes to their meeting four seconds late.
_SKEWED = """
import os, time
from fljax import config, experiment
experiment.use_devices(config.Config())
print(os.environ["XLA_FLAGS"])
import jax, numpy as np
mesh = jax.make_mesh((2,), ("d",))
rows = jax.sharding.PartitionSpec("d")

def late(index):
  time.sleep(4 * int(index))
  return np.float32(1)

def meet(x):
  index = jax.lax.axis_index("d")
  shape = jax.ShapeDtypeStruct((), np.float32)
  return jax.lax.psum(x * jax.pure_callback(late, shape, index), "d")

x = jax.device_put(np.ones(2), jax.NamedSharding(mesh, rows))
out = jax.sharding.PartitionSpec()
total = jax.shard_map(
  meet, mesh=mesh, in_specs=rows, out_specs=out, check_vma=False
)
print(jax.jit(total)(x))
"""
_HARDLY = " ".join(
  f"--xla_cpu_collective_call_{name}_timeout_seconds=1"
  for name in ("warn_stuck", "terminate")
)


def _clients(count):
  federation, _ = make_federation(clients=count, samples=2)
  return federation


def _yield(common, client, column):
  mean = client.images.astype(jnp.float32).mean()
  return {"a": common * mean + column, "id": client.ids}


@settings(max_examples=12)
@given(clients=st.integers(1, 7), chunk=st.integers(0, 8))
def test_clients_may_be_mapped_in_any_chunks(clients, chunk):
  federation = _clients(clients)
  column = jnp.arange(clients, dtype=jnp.float32)
  mapped = parallel.map_clients(
    _yield, jnp.float32(2), federation, column, chunk=chunk
  )
  for client in range(clients):
    one = federations.select(federation, client)
    chex.assert_trees_all_close(
      jax.tree.map(lambda leaf, client=client: leaf[client], mapped),
      _yield(jnp.float32(2), one, column[client]),
      rtol=1e-6,
    )


@settings(max_examples=12)
@given(clients=st.integers(1, 7), chunk=st.integers(0, 8))
def test_a_sum_over_clients_in_any_chunks(clients, chunk):
  federation = _clients(clients)
  column = jnp.arange(clients, dtype=jnp.float32)
  shares = jnp.asarray(np.random.default_rng(0).random(clients), jnp.float32)

  def function(common, clients, column):
    values = parallel.each(_yield)(common, clients, column)
    return values["a"], values["id"]

  total, ids = parallel.sum_over_clients(
    function, jnp.float32(2), shares, federation, column, chunk=chunk
  )
  values = parallel.map_clients(_yield, jnp.float32(2), federation, column)
  assert float(total) == pytest.approx(float(shares @ values["a"]), rel=1e-5)
  np.testing.assert_array_equal(ids, np.arange(clients))


def test_devices_wait_for_each_other_as_long_as_xla_flags_say(monkeypatch):
  name = "--xla_cpu_collective_call_terminate_timeout_seconds"
  own = f"{name}=7"
  for xla_flags, expected in (("", f"{name}=86400"), (own, own)):
    monkeypatch.setenv("XLA_FLAGS", xla_flags)
    for _ in range(2):
      parallel.wait_for_slow_devices()
    words = os.environ["XLA_FLAGS"].split()
    assert [word for word in words if word.startswith(name)] == [expected]
    assert len(words) == 2


def test_devices_that_do_not_wait_abort(tmp_path):
  """The options are XLA's, and set whoever divided the CPU."""
  script = tmp_path / "skew.py"
  script.write_text(_SKEWED)
  for xla_flags, aborts in (("", False), (_HARDLY, True)):
    environment = {
      **os.environ,
      "XLA_FLAGS": xla_flags,
      "JAX_NUM_CPU_DEVICES": "2",
    }
    ended = subprocess.run(
      [sys.executable, str(script)],
      env=environment,
      capture_output=True,
      timeout=120,
      check=False,
    )
    assert (ended.returncode != 0) == aborts, ended.stderr
    assert (b"Termination timeout" in ended.stderr) == aborts
    assert (b"terminate_timeout_seconds=86400" in ended.stdout) != aborts


def test_one_device_needs_no_mesh():
  assert parallel.make_mesh(1) is None
  federation = _clients(3)
  assert parallel.place(federation, None) is federation
  with pytest.raises(errors.ConfigError, match="--devices=9999 is more than"):
    parallel.make_mesh(9999)


@pytest.mark.parametrize("script", ["rounds", "experiment"])
def test_eight_devices_give_what_one_gives(script, tmp_path):
  """In a process of its own: devices are made before JAX starts."""
  process = subprocess.run(
    [sys.executable, str(ROOT / "tests" / "on_devices.py"), script, tmp_path],
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  told = json.loads(process.stdout)
  assert told["devices"] == 8
  assert told["differences"]
  for name, difference in told["differences"].items():
    assert difference < 2e-4, name


def _run_together(folder, processes, stop_after):
  """Runs tests/two_processes.py; returns exit codes and what was printed."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  script = str(ROOT / "tests" / "two_processes.py")
  started = [
    subprocess.Popen(
      [
        sys.executable,
        *(script, address, str(processes), str(process)),
        *(folder, str(stop_after)),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process in range(processes)
  ]
  printed = [process.communicate(timeout=400)[0] for process in started]
  return [process.returncode for process in started], printed


def test_two_processes_stop_resume_and_give_what_one_gives(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  for folder in (one, two):
    folder.mkdir()
    write_images(folder / "rows.npz")
  codes, printed = _run_together(one, 1, 0)
  assert codes == [0], printed
  # SIGTERM reaches only one of them; both stop, and both can go on.
  codes, printed = _run_together(two, 2, 2)
  assert codes == [3, 3], printed
  assert "SIGTERM" in printed[1] and "another process" in printed[0]
  codes, printed = _run_together(two, 2, 0)
  assert codes == [0, 0], printed
  # One process writes.
  assert not (two / "1").exists()
  results = [
    json.loads((folder / "0" / "results.json").read_text())
    for folder in (one, two)
  ]
  for phase, other in zip(*(r["phases"] for r in results), strict=True):
    for key in ("test_accuracy", "attack_success"):
      assert phase[key] == pytest.approx(other[key], abs=2e-3), phase["name"]
  # The reversal begins at random, so that few steps tell whether it was one.
  found, other = (r["phases"][2]["trigger_norms"] for r in results)
  assert found == pytest.approx(other, rel=1e-3)
  assert results[1]["environment"]["devices"] == 2
