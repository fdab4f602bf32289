"""Run by test_parallel: the same work on one and on eight CPU devices.

Prints the largest differences as JSON.
"""

import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import conftest  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, str(conftest.ROOT / "tests" / "baselines"))

import planted  # noqa: E402

from fljax import aggregators  # noqa: E402
from fljax import attacks  # noqa: E402
from fljax import networks  # noqa: E402

networks.NETWORKS["tiny"] = conftest.TINY
networks.NETWORKS["tiny_bn"] = conftest.TINY._replace(norm=True)

from fljax import config as configs  # noqa: E402
from fljax import experiment  # noqa: E402
from fljax import parallel  # noqa: E402
from fljax import rounds  # noqa: E402
from fljax.baselines import feature_shift  # noqa: E402
from fljax.baselines import neural_cleanse  # noqa: E402
from fljax.cleanse import pruning  # noqa: E402
from fljax.cleanse import reports  # noqa: E402

KEY = jax.random.key(11)


def difference(one, other):
  return max(
    float(np.abs(np.asarray(a, np.float64) - np.asarray(b)).max())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  )


def on_rounds():
  """Rounds with cohorts that do and do not divide evenly, and reports."""
  model = conftest.from_flax()
  mesh = parallel.make_mesh()
  together = attacks.Attack(
    updates=lambda updates, cohort, active: jax.tree.map(
      lambda leaf: leaf - 0.1 * leaf.mean(axis=0, keepdims=True), updates
    ),
    rowwise=False,
  )
  # Attackers add what benign clients sent in the round before.
  remembering = attacks.Attack(
    remember=lambda benign: benign,
    local=lambda params, start, memory: jax.tree.map(
      lambda leaf, own: leaf + 0.1 * own, params, memory
    ),
  )
  found = {}
  for clients, cohort, chunk, aggregator, extra in (
    (11, 0, 1, aggregators.weighted_mean(), None),
    (11, 5, 0, aggregators.mean(), remembering),
    (11, 6, 2, aggregators.median(), remembering),
    (3, 0, 0, aggregators.mean(), together),
  ):
    federation, attack = conftest.make_federation(
      clients=clients, samples=8, attackers=2, gamma=2.0, start=1
    )
    federation = federation.replace(mask=federation.mask.at[2, 6:].set(False))
    if extra is not None:
      attack = attacks.chain(attack, extra)
    block = rounds.make_block(
      model,
      conftest.make_round(
        model,
        attack,
        aggregator=aggregator,
        cohort_size=cohort,
        client_chunk=chunk,
      ),
    )
    results = []
    for spread in (None, mesh):
      placed = parallel.place(federation, spread)
      assert placed.num_clients == clients
      state = conftest.make_state(model, attack=attack)
      state = parallel.replicate(state, spread)
      state, metrics = block(state, placed, parallel.replicate(KEY, spread), 3)
      means = reports.client_activations(model, state.params, placed)
      order = pruning.pruning_order(pruning.rank_scores(means))
      curves = pruning.client_curves(model, state.params, order, placed)
      right = reports.client_accuracies(model, state.params, placed)
      assert means.shape[0] == curves.shape[0] == len(right) == clients
      assert bool(jax.tree.leaves(state.memory)) == (extra is remembering)
      learned = (state.params, state.memory, metrics.loss)
      results.append((*learned, means, curves, right))
    name = f"{clients} clients, cohort {cohort}, chunk {chunk}"
    found[name] = difference(*results)
  return found


def on_classes():
  """Trigger reversal, classes spread: five and one of them on eight devices."""
  model, params = planted.model(), planted.params()
  images, _ = conftest.make_images(60, seed=3)
  mesh = parallel.make_mesh()
  found = {}
  for targets, rates in ((None, None), ([1], [0.3])):
    results = [
      neural_cleanse.reverse_triggers(
        model,
        parallel.replicate(params, spread),
        images,
        key=KEY,
        targets=targets,
        learning_rates=rates,
        settings=neural_cleanse.Settings(
          batches_per_step=1, batch_size=20, steps=8
        ),
        mesh=spread,
      )
      for spread in (None, mesh)
    ]
    # Patterns are grey values.
    scaled = [one.replace(patterns=one.patterns / 255) for one in results]
    found[f"reversal, targets {targets}"] = difference(*scaled)
  return found


def on_tuning():
  """Server's training, batches spread: 20 images, filled up to 24."""
  images, labels = conftest.make_images(60, seed=3)
  # Batch normalisation has sums over a batch of its own.
  model = networks.build("tiny_bn", image_shape=images.shape[1:], num_classes=4)
  params = model.init(KEY)
  spread_batches, shapes = parallel.spread_batches, []

  def spied(*arguments, **options):
    batches = spread_batches(*arguments, **options)
    jax.debug.inspect_array_sharding(
      batches, callback=lambda how: shapes.append(how.shard_shape((6, 24)))
    )
    return batches

  parallel.spread_batches = spied
  results = [
    feature_shift.tune(
      model,
      parallel.replicate(params, spread),
      jax.numpy.arange(model.neurons) != 1,
      images,
      labels,
      key=KEY,
      batch_size=20,
      epochs=2,
      mesh=spread,
    )
    for spread in (None, parallel.make_mesh())
  ]
  parallel.spread_batches = spread_batches
  assert shapes[-1] == (6, 3), shapes
  return {"tuning": difference(*results)}


def on_experiment(folder):
  """A whole experiment."""
  results = []
  dataset = conftest.write_images(f"{folder}/rows.npz")
  for devices in (1, 8):
    config = configs.Config(
      workdir=f"{folder}/{devices}",
      dataset=dataset,
      devices=devices,
      compilation_cache="off",
      **conftest.TINY_SETTINGS,
    )
    results.append(experiment.run(config, quiet=True)["phases"])
  return {
    one["name"]: max(
      abs(one[key] - other[key])
      # A few images may fall on the other side of a decision.
      / 20
      for key in ("test_accuracy", "attack_success")
    )
    for one, other in zip(*results, strict=True)
  }


if __name__ == "__main__":
  differences = (
    {**on_rounds(), **on_classes(), **on_tuning()}
    if sys.argv[1] == "rounds"
    else on_experiment(sys.argv[2])
  )
  print(json.dumps({"devices": jax.device_count(), "differences": differences}))
