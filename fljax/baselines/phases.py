"""What the server does alone as phases of a run: state in, state and facts out.

Baselines, and what a user's own defence is given and returns.

`cleanse`, `prune_and_tune` and `shift_features` are deployable: the server
uses its own validation images, for everything, and nothing else.
`cleanse_as_oracle` is not, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
import optax

from fljax import evaluate
from fljax import federation as federations
from fljax import models
from fljax import parallel
from fljax.baselines import feature_shift
from fljax.baselines import fine_pruning
from fljax.baselines import neural_cleanse
from fljax.baselines import server

Array = jax.Array

# By name: to compare with, the server uses its own images. The last one is no
# defence: it sees test images and AA.
BASELINES = ("nc-prune", "nc-unlearn", "fine-pruning", "fst", "nc-oracle")
# Those of them that train on these images.
TRAINING_BASELINES = ("nc-unlearn", "fine-pruning", "fst")

# Is told what is under way, how far it is, and of how much; it may end it by
# raising.
OnProgress = Callable[[str, int, int], None]


class Subject(NamedTuple):
  """What a defence of a user's own is given: no test image, and no AA.

  Attributes:
    model: the network.
    params: what is to be cleansed.
    neuron_mask: bool [neurons], False for neurons pruned before.
    images: the server's own that it may use; None if it has none.
    ask: (question, kind) -> what all clients report, [clients, ...], attackers
      as `--attacker_reports` and their attacks' report hooks say. A question is
      a function of a `federation.Federation` that answers for each of its
      clients by itself, as `reports.client_activations` with a model and
      parameters does: it runs where their images are, and nothing but its
      answers is the server's to see. Its kind
      is "activations", [clients, neurons] over what clients train on, or
      "accuracies", [clients, steps] over what they report these on.
    key: random key.
    config: the settings, `config.Config`; what they say of the attack no server
      knows.
    mesh: devices that work may be spread over; None for one.
    on_progress: to be told of steps, and raises where the run shall stop.
  """

  model: models.Model
  params: models.Params
  neuron_mask: Array
  images: evaluate.Examples | None
  ask: Callable[[Callable[[federations.Federation], Array], str], Array]
  key: Array
  config: Any
  mesh: parallel.Mesh | None
  on_progress: OnProgress


class Mitigated(NamedTuple):
  """Outcome of a baseline, or of a defence of a user's own.

  Attributes:
    params: the mitigated model.
    neuron_mask: bool [neurons], False for pruned neurons.
    facts: for results.json; of a user's own defence those beside how many
      neurons were pruned, which is told anyway.
  """

  params: models.Params
  neuron_mask: Array
  facts: dict[str, Any]


class Defence(NamedTuple):
  """A defence of a user's own.

  Attributes:
    run: what it does with a `Subject`, and parameters of its own.
    needs_images: whether it asks for images of the server's own.
  """

  run: Callable[..., Mitigated]
  needs_images: bool


# Registered by `extensions.defence`.
DEFENCES: dict[str, Defence] = {}


def server_images(
  examples: evaluate.Examples,
) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels that count, out of their batches.

  Args:
    examples: [batches, batch, ...].

  Returns:
    uint8 [n, height, width, channels] and int32 [n].
  """
  whole = parallel.on_host(examples)
  return whole.images[whole.mask], whole.labels[whole.mask]


def set_aside(
  examples: evaluate.Examples, share: float, seed: int
) -> tuple[evaluate.Examples, evaluate.Examples]:
  """Sets a part of the server's images aside, chosen at random.

  Both parts keep all batches, and so their shape.

  Args:
    examples: at least two that count.
    share: of those that count, set aside; at least one, and not all.
    seed: of the choice.

  Returns:
    What is set aside, and the rest.
  """
  counted = np.flatnonzero(parallel.on_host(examples.mask))
  order = np.random.default_rng(seed).permutation(counted)
  first = min(max(round(share * len(order)), 1), len(order) - 1)
  chosen = np.zeros(examples.mask.shape, bool)
  chosen.ravel()[order[:first]] = True
  return (
    examples.replace(mask=examples.mask & chosen),
    examples.replace(mask=examples.mask & ~chosen),
  )


class Suspects(NamedTuple):
  """What Neural Cleanse found in a model.

  Attributes:
    found: a reversed trigger per class.
    outliers: which of them are too small to be natural.
  """

  found: neural_cleanse.Reversed
  outliers: neural_cleanse.Outliers


def find_suspects(
  model: models.Model,
  params: models.Params,
  validation: evaluate.Examples,
  *,
  key: Array,
  settings: neural_cleanse.Settings,
  mesh: parallel.Mesh | None = None,
  on_progress: OnProgress | None = None,
  memory: neural_cleanse.Memory | None = None,
) -> Suspects:
  """Neural Cleanse, first half: reverses triggers and finds outliers.

  Args:
    model: the network.
    params: the trained model.
    validation: the server's images.
    key: random key.
    settings: of the reversal.
    mesh: devices that the classes are spread over.
    on_progress: is told of the steps of the reversal.
    memory: where the reversal is taken up from, and kept.

  Returns:
    What was found; removing it is `cleanse`'s, by whatever way.
  """
  images, _ = server_images(validation)
  found = neural_cleanse.reverse_triggers(
    model,
    params,
    images,
    key=jax.random.split(key)[0],
    settings=settings,
    mesh=mesh,
    on_steps=_reversing(on_progress, settings),
    memory=memory,
  )
  # On the host, to go wherever the model is.
  found = jax.tree.map(np.asarray, found)
  return Suspects(found, neural_cleanse.outliers(found.norms))


def _reversing(
  on_progress: OnProgress | None, settings: neural_cleanse.Settings
) -> Callable[[int], None] | None:
  """Tells of the steps of a reversal."""
  if on_progress is None:
    return None
  return lambda done: on_progress("reversing triggers", done, settings.steps)


def _training(
  on_progress: OnProgress | None, what: str
) -> server.OnSteps | None:
  """Tells of the steps of a training by the server."""
  if on_progress is None:
    return None
  return functools.partial(on_progress, what)


def cleanse(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  validation: evaluate.Examples,
  suspects: Suspects,
  *,
  by: str,
  key: Array,
  learning_rate: float,
  max_drop: float,
  gradient_clip: float = 0.0,
  mesh: parallel.Mesh | None = None,
  on_progress: OnProgress | None = None,
) -> Mitigated:
  """Neural Cleanse, second half: removes the triggers of flagged classes.

  Args:
    model: the network.
    params: the trained model.
    neuron_mask: bool [neurons], False for neurons pruned before.
    validation: the server's images.
    suspects: from `find_suspects`.
    by: "prune" or "unlearn".
    key: random key, the one that the suspects were found with or another.
    learning_rate: of unlearning.
    max_drop: accuracy that pruning may cost, for each flagged class.
    gradient_clip: largest norm of a batch's gradient; 0 sets no limit.
    mesh: devices that unlearning spreads its batches over.
    on_progress: is told of the steps of unlearning.

  Returns:
    The mitigated model. The facts name the flagged classes; if there is none,
    the model is as it was.
  """
  found, outliers = suspects
  own = server_images(validation)
  unlearn_key = jax.random.split(key)[1]
  flagged = np.flatnonzero(np.asarray(outliers.flagged)).tolist()
  before = neuron_mask
  for position in flagged:
    label = int(found.targets[position])
    params, neuron_mask = _remove(
      model,
      params,
      neuron_mask,
      validation,
      own,
      found,
      position,
      by=by,
      key=jax.random.fold_in(unlearn_key, position),
      optimizer=server.sgd(learning_rate, gradient_clip),
      max_drop=max_drop,
      mesh=mesh,
      on_steps=_training(on_progress, f"unlearning label {label}"),
    )
  facts = {
    "flagged_labels": [int(found.targets[position]) for position in flagged],
    "anomaly_indices": np.asarray(outliers.anomaly, float).tolist(),
    "trigger_norms": np.asarray(found.norms, float).tolist(),
  }
  if by == "prune":
    facts.update(
      pruned_neurons=int((before & ~neuron_mask).sum()), neurons=model.neurons
    )
  return Mitigated(params, neuron_mask, facts)


def _remove(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  examples: evaluate.Examples,
  own: tuple[np.ndarray, np.ndarray],
  found: neural_cleanse.Reversed,
  position: int,
  *,
  by: str,
  key: Array,
  optimizer: optax.GradientTransformation,
  max_drop: float,
  mesh: parallel.Mesh | None,
  on_steps: server.OnSteps | None,
) -> tuple[models.Params, Array]:
  """Removes what one trigger stands for; `own` are the examples unbatched."""
  mask, pattern = found.masks[position], found.patterns[position]
  if by == "prune":
    after = neural_cleanse.prune(
      model,
      params,
      mask,
      pattern,
      examples,
      target=found.targets[position],
      max_drop=max_drop,
    )
    return after.params, neuron_mask & after.neuron_mask
  params = neural_cleanse.unlearn(
    model,
    params,
    *own,
    mask,
    pattern,
    key=key,
    optimizer=optimizer,
    neuron_mask=neuron_mask,
    mesh=mesh,
    on_steps=on_steps,
  )
  return params, neuron_mask


# The paper's, Section V-B: "learning rates ranging from 0.1 to 0.5", 1,000
# steps, "1000 samples in each mini-batch".
ORACLE_RATES = (0.1, 0.2, 0.3, 0.4, 0.5)
ORACLE = neural_cleanse.OFFICIAL._replace(batches_per_step=1, batch_size=1000)


def cleanse_as_oracle(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  test: evaluate.Examples,
  backdoored: evaluate.Examples,
  *,
  target: int,
  key: Array,
  settings: neural_cleanse.Settings = ORACLE,
  rates: Sequence[float] = ORACLE_RATES,
  learning_rate: float,
  max_drop: float,
  gradient_clip: float = 0.0,
  mesh: parallel.Mesh | None = None,
  on_progress: OnProgress | None = None,
  memory: neural_cleanse.Memory | None = None,
) -> Mitigated:
  """Neural Cleanse as no server could run it: the best of several, by AA.

  As the paper compares itself with it: on the test images, with several
  learning rates of the reversal, of which the one with the lowest attack
  success is reported. In addition, this oracle is told the target label, so
  that detection cannot fail, and tries pruning and unlearning.

  Args:
    model: the network.
    params: the trained model.
    neuron_mask: bool [neurons], False for neurons pruned before.
    test: the test images.
    backdoored: what AA is measured on.
    target: the attackers' target label.
    key: random key.
    settings: of the reversal; its learning rate is replaced.
    rates: the learning rates tried.
    learning_rate: of unlearning.
    max_drop: accuracy that pruning may cost.
    gradient_clip: largest norm of a batch's gradient; 0 sets no limit.
    mesh: devices that the rates, and unlearning's batches, are spread over.
    on_progress: is told of the steps of the reversal, then how much was tried.
    memory: where the reversal is taken up from, and kept.

  Returns:
    The model with the lowest AA, of equals the one with the highest TA. The
    facts tell what was chosen, and all that was tried.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section V-B and Table IV.
  """
  own = server_images(test)
  reverse_key, unlearn_key = jax.random.split(key)
  tried: list[tuple[tuple[float, float], models.Params, Array]] = []
  told: list[dict[str, Any]] = []
  found = neural_cleanse.reverse_triggers(
    model,
    params,
    own[0],
    key=reverse_key,
    targets=[target] * len(rates),
    settings=settings,
    learning_rates=rates,
    mesh=mesh,
    on_steps=_reversing(on_progress, settings),
    memory=memory,
  )
  found = jax.tree.map(np.asarray, found)  # To go wherever the model is.

  def removing(*_: int) -> None:
    """Tells how much was tried, also in the midst of unlearning."""
    if on_progress is not None:
      on_progress("removing triggers", len(told), 2 * len(rates))

  for position, rate in enumerate(rates):
    for by in ("prune", "unlearn"):
      after, mask = _remove(
        model,
        params,
        neuron_mask,
        test,
        own,
        found,
        position,
        by=by,
        key=unlearn_key,
        optimizer=server.sgd(learning_rate, gradient_clip),
        max_drop=max_drop,
        mesh=mesh,
        on_steps=removing,
      )
      accuracy = float(evaluate.measure(model, after, test))
      success = float(evaluate.measure(model, after, backdoored))
      tried.append(((success, -accuracy), after, mask))
      told.append(
        {
          "by": by,
          "nc_learning_rate": rate,
          "trigger_norm": float(found.norms[position]),
          "test_accuracy": accuracy,
          "attack_success": success,
        }
      )
      removing()
  best = min(range(len(tried)), key=lambda index: tried[index][0])
  _, after, mask = tried[best]
  return Mitigated(after, mask, {"oracle": told[best], "oracle_tried": told})


def prune_and_tune(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  validation: evaluate.Examples,
  *,
  key: Array,
  learning_rate: float,
  max_drop: float,
  gradient_clip: float = 0.0,
  epochs: int = 10,
  augmentation: str = "none",
  mesh: parallel.Mesh | None = None,
  on_progress: OnProgress | None = None,
) -> Mitigated:
  """Fine-Pruning: prunes what clean images leave silent, then tunes on them.

  Args:
    model: the network.
    params: the trained model.
    neuron_mask: bool [neurons], False for neurons pruned before.
    validation: the server's images.
    key: random key.
    learning_rate: of fine-tuning.
    max_drop: accuracy that pruning may cost.
    gradient_clip: largest norm of a batch's gradient; 0 sets no limit.
    epochs: of fine-tuning.
    augmentation: see `local.augment`.
    mesh: devices that tuning spreads its batches over.
    on_progress: is told of the steps of tuning.

  Returns:
    The mitigated model.
  """
  pruned = fine_pruning.prune(
    model, params, validation, validation, max_drop=max_drop
  )
  after = pruned.neuron_mask & neuron_mask
  params = fine_pruning.fine_tune(
    model,
    pruned.params,
    after,
    *server_images(validation),
    key=key,
    optimizer=server.sgd(learning_rate, gradient_clip),
    epochs=epochs,
    augmentation=augmentation,
    mesh=mesh,
    on_steps=_training(on_progress, "tuning"),
  )
  facts = {
    "pruned_neurons": int((neuron_mask & ~after).sum()),
    "neurons": model.neurons,
  }
  return Mitigated(params, after, facts)


def shift_features(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  validation: evaluate.Examples,
  *,
  key: Array,
  learning_rate: float,
  gradient_clip: float,
  weight: float,
  epochs: int,
  augmentation: str,
  mesh: parallel.Mesh | None = None,
  on_progress: OnProgress | None = None,
) -> Mitigated:
  """Feature Shift Tuning on the server's images.

  Args:
    model: the network.
    params: the trained model.
    neuron_mask: bool [neurons], False for neurons pruned before.
    validation: the server's images.
    key: random key.
    learning_rate: of tuning, at its beginning.
    gradient_clip: largest norm of a batch's gradient; 0 sets no limit.
    weight: α.
    epochs: of tuning.
    augmentation: see `local.augment`.
    mesh: devices that tuning spreads its batches over.
    on_progress: is told of the steps of tuning.

  Returns:
    The tuned model.
  """
  params = feature_shift.tune(
    model,
    params,
    neuron_mask,
    *server_images(validation),
    key=key,
    learning_rate=learning_rate,
    gradient_clip=gradient_clip or np.inf,
    weight=weight,
    epochs=epochs,
    augmentation=augmentation,
    mesh=mesh,
    on_steps=_training(on_progress, "tuning"),
  )
  return Mitigated(params, neuron_mask, {})
