"""Shared settings and small worlds for the tests.

Under pytest JAX refuses implicit dtype and rank promotion, and any warning is
an error: what passes here passes quietly for users.
"""

import os
from pathlib import Path
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One device, whatever the machine: tests of several make them themselves.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
# No test may depend on, or leave anything in, the user's cache. One of the
# suite's own keeps compiled programs for all workers, to which pytest-xdist
# hands the environment on, and for the processes that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fljax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
  os.environ["XDG_CACHE_HOME"], "fljax", "programs"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Small programs that run for milliseconds: most of the suite is compiling them,
# a quarter of that the optimisations of LLVM.
os.environ["XLA_FLAGS"] = " ".join(
  (os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0")
).strip()

from flax import linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fljax import aggregators
from fljax import attacks
from fljax import federation as federations
from fljax import local
from fljax import models
from fljax import networks
from fljax import partition as partitions
from fljax import rounds
from fljax import triggers

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
  "fljax",
  deadline=None,
  derandomize=True,
  max_examples=25,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("fljax")

ROOT = Path(__file__).parent.parent
IMAGE_SHAPE = (8, 8, 1)
NUM_CLASSES = 4
VICTIM, TARGET = 3, 1
TRIGGER = [(-1, -1), (-1, -2), (-2, -1), (-2, -2)]
# A network for 8 x 8 images, and an experiment with it, so that whole runs take
# seconds. It is a choice of --model where the fixture `tiny` is used.
TINY = networks.Architecture((6, "pool"), 8, 3, 1, True, (16,))
TINY_SETTINGS = {
  "model": "tiny",
  "num_clients": 4,
  "samples_per_client": 80,
  "labels_per_client": 3,
  "validation_size": 60,
  "rounds": 6,
  "eval_every": 2,
  "checkpoint_every": 2,
  "fine_tune_rounds": 3,
  "victim_label": VICTIM,
  "target_label": TARGET,
  "trigger": "pixel3",
  "gamma": 2.0,
  "normalisation": "standard",
  "learning_rate": 0.2,
  "batch_size": 5,
  "delta_step": 1.0,
  "figures": False,
}


@pytest.fixture(scope="module")
def tiny():
  """Makes "tiny" and "tiny_bn", for 8 x 8 images, choices of --model."""
  added = {"tiny": TINY, "tiny_bn": TINY._replace(norm=True, hidden=())}
  with pytest.MonkeyPatch.context() as patch:
    for name, plan in added.items():
      patch.setitem(networks.NETWORKS, name, plan)
    yield


class Stem(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Conv(3, (3, 3), strides=2)(x))


class Target(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Conv(6, (3, 3))(x))


class Head(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(NUM_CLASSES)(x.reshape(x.shape[0], -1))


def from_flax():
  """A user's own network of plain Flax layers, small enough for a test."""
  return models.from_flax(
    stem=Stem(),
    target=Target(),
    head=Head(),
    image_shape=IMAGE_SHAPE,
    num_classes=NUM_CLASSES,
    mean=(0.3,),
    std=(0.4,),
  )


def pytest_unconfigure():
  if "PYTEST_XDIST_WORKER" not in os.environ:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
  """Forgets compiled programs after each module.

  Every program on a CPU holds mappings of memory, of which Linux gives a
  process 65,530; past them, XLA ends in a segmentation fault.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def model():
  return from_flax()


@pytest.fixture(scope="session")
def params(model):
  return model.init(jax.random.key(7))


def make_images(count, seed=0):
  """Images that a small network can tell apart: a bright row per label."""
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % NUM_CLASSES
  images = rng.integers(0, 60, (count, *IMAGE_SHAPE), np.uint8)
  for label in range(NUM_CLASSES):
    images[labels == label, 2 * label] += 150
  return images, labels.astype(np.int32)


def write_images(path, count=600):
  """An .npz data set of such images."""
  images, labels = make_images(count)
  np.savez(path, images=images, labels=labels)
  return path


def make_dealt(clients, samples):
  """Images, labels, and who of the clients gets which."""
  images, labels = make_images(clients * samples)
  partition = partitions.iid(
    np.arange(len(images)),
    num_clients=clients,
    samples_per_client=samples,
    rng=np.random.default_rng(1),
  )
  return images, labels, partition


def make_federation(
  *,
  clients=4,
  samples=10,
  attackers=1,
  gamma=1.0,
  fraction=0.3,
  start=0,
  attack_rounds=0,
):
  """A poisoned federation and the attack that poisoned it."""
  federation = federations.create(
    *make_dealt(clients, samples),
    num_attackers=attackers,
    pieces=[triggers.from_pixels(TRIGGER, IMAGE_SHAPE)],
    attack_start=start,
    attack_rounds=attack_rounds,
  )
  attack = attacks.chain(
    attacks.backdoor(
      victim_label=VICTIM, target_label=TARGET, fraction=fraction
    ),
    attacks.model_replacement(gamma),
  )
  return attack.data(federation, jax.random.key(2)), attack


def make_training(model, *, momentum=0.5, epochs=2, **options):
  return local.sgd_training(
    model,
    optax.sgd(0.05, momentum=momentum),
    epochs=epochs,
    batch_size=4,
    **options,
  )


def make_round(model, attack=None, **options):
  attack = attack or attacks.Attack()
  training = options.pop("training", None) or make_training(
    model, **attack.in_steps
  )
  options.setdefault("aggregator", aggregators.mean())
  return rounds.make_round(model, training, attack=attack, **options)


def make_state(model, seed=7, attack=None):
  key = jax.random.key(seed)
  return rounds.init_state(model, aggregators.mean(), key, attack)


def copy(tree):
  return jax.tree.map(jnp.copy, tree)


sys.path.insert(0, str(Path(__file__).parent))
