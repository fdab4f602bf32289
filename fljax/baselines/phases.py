"""The baselines as phases of a run: state in, state and facts out.

They are deployable: the server uses its own validation images, for everything,
and nothing else.
"""

from __future__ import annotations

from typing import Any
from typing import NamedTuple

import jax
import numpy as np
import optax

from fljax import evaluate
from fljax import models
from fljax.baselines import fine_pruning
from fljax.baselines import neural_cleanse

Array = jax.Array


class Mitigated(NamedTuple):
  """Outcome of a baseline.

  Attributes:
    params: the mitigated model.
    neuron_mask: bool [neurons], False for pruned neurons.
    facts: for results.json.
  """

  params: models.Params
  neuron_mask: Array
  facts: dict[str, Any]


def server_images(
  examples: evaluate.Examples,
) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels that count, out of their batches.

  Args:
    examples: [batches, batch, ...].

  Returns:
    uint8 [n, height, width, channels] and int32 [n].
  """
  counts = np.asarray(examples.mask)
  return np.asarray(examples.images)[counts], np.asarray(examples.labels)[
    counts
  ]


def cleanse(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  validation: evaluate.Examples,
  *,
  by: str,
  key: Array,
  settings: neural_cleanse.Settings,
  learning_rate: float,
  max_drop: float,
) -> Mitigated:
  """Neural Cleanse: reverses triggers, and removes those of flagged classes.

  Args:
    model: the network.
    params: the trained model.
    neuron_mask: bool [neurons], False for neurons pruned before.
    validation: the server's images.
    by: "prune" or "unlearn".
    key: random key.
    settings: of the reversal.
    learning_rate: of unlearning.
    max_drop: accuracy that pruning may cost, for each flagged class.

  Returns:
    The mitigated model. The facts name the flagged classes; if there is none,
    the model is as it was.
  """
  images, labels = server_images(validation)
  reverse_key, unlearn_key = jax.random.split(key)
  found = neural_cleanse.reverse_triggers(
    model, params, images, key=reverse_key, settings=settings
  )
  suspects = neural_cleanse.outliers(found.norms)
  flagged = np.flatnonzero(np.asarray(suspects.flagged))
  pruned = 0
  for position in flagged:
    mask, pattern = found.masks[position], found.patterns[position]
    if by == "prune":
      after = neural_cleanse.prune(
        model,
        params,
        mask,
        pattern,
        validation,
        target=found.targets[position],
        max_drop=max_drop,
      )
      params = after.params
      neuron_mask = neuron_mask & after.neuron_mask
      pruned += after.num_pruned
    else:
      params = neural_cleanse.unlearn(
        model,
        params,
        images,
        labels,
        mask,
        pattern,
        key=jax.random.fold_in(unlearn_key, position),
        optimizer=optax.sgd(learning_rate),
        neuron_mask=neuron_mask,
      )
  facts = {
    "flagged_labels": [int(found.targets[position]) for position in flagged],
    "anomaly_indices": np.asarray(suspects.anomaly, float).tolist(),
    "trigger_norms": np.asarray(found.norms, float).tolist(),
  }
  if by == "prune":
    facts.update(pruned_neurons=pruned, neurons=model.neurons)
  return Mitigated(params, neuron_mask, facts)


def prune_and_tune(
  model: models.Model,
  params: models.Params,
  validation: evaluate.Examples,
  *,
  key: Array,
  learning_rate: float,
  max_drop: float,
) -> Mitigated:
  """Fine-Pruning: prunes what clean images leave silent, then tunes on them.

  Args:
    model: the network.
    params: the trained model.
    validation: the server's images.
    key: random key.
    learning_rate: of fine-tuning.
    max_drop: accuracy that pruning may cost.

  Returns:
    The mitigated model.
  """
  pruned = fine_pruning.prune(
    model, params, validation, validation, max_drop=max_drop
  )
  params = fine_pruning.fine_tune(
    model,
    pruned.params,
    pruned.neuron_mask,
    *server_images(validation),
    key=key,
    optimizer=optax.sgd(learning_rate),
  )
  facts = {"pruned_neurons": pruned.num_pruned, "neurons": model.neurons}
  return Mitigated(params, pruned.neuron_mask, facts)
