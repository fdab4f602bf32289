"""Fine-Pruning: dormant neurons are pruned, then the model is fine-tuned.

    pruned = prune(model, params, clean, validation)
    params = fine_tune(
      model, pruned.params, pruned.neuron_mask, images, labels, key=key
    )

Nothing here sees a backdoored image unless it is passed one: all data are the
server's own clean images.

References:
  Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks
  (Liu, Dolan-Gavitt, Garg, 2018).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fljax import evaluate
from fljax import models
from fljax import parallel
from fljax.baselines import server
from fljax.cleanse import pipeline

Array = jax.Array


def prune(
  model: models.Model,
  params: models.Params,
  clean: evaluate.Examples,
  validation: evaluate.Examples,
  *,
  max_drop: float = 0.01,
) -> pipeline.Pruned:
  """Prunes the neurons that clean images activate least, as many as it may.

  It is federated pruning by ranks with the server as the only client: the
  target convolution's channels go in order of increasing mean activation, and
  the step after which the accuracy is too low is undone.

  Args:
    model: the network.
    params: the trained model.
    clean: clean images; their labels do not matter.
    validation: what accuracy is measured on; may be the same.
    max_drop: the floor lies this far below the unpruned model's accuracy.

  Returns:
    The pruned model and how it came about.

  References:
    The paper, "Pruning Defense".
  """
  means = server.mean_activations(model, params, clean)
  return pipeline.prune(
    model,
    params,
    means[jnp.newaxis],
    pipeline.validation_curves(model, validation).pruning,
    method="rap",
    max_drop=max_drop,
  )


def fine_tune(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  key: Array,
  optimizer: optax.GradientTransformation = server.SGD,
  epochs: int = 10,
  batch_size: int = 50,
  augmentation: str = "none",
  mesh: parallel.Mesh | None = None,
  on_steps: server.OnSteps | None = None,
) -> models.Params:
  """Trains the pruned model on clean images; pruned neurons stay at zero.

  Args:
    model: the network.
    params: the pruned model.
    neuron_mask: bool [neurons], False for pruned neurons.
    images: uint8 [samples, height, width, channels], the server's own.
    labels: int [samples].
    key: random key of the batches.
    optimizer: plain SGD if none is given.
    epochs: passes over the images.
    batch_size: images per step.
    augmentation: see `local.augment`.
    mesh: devices that every batch is spread over.
    on_steps: see `server.train`.

  Returns:
    The fine-tuned parameters.

  References:
    The paper, "Fine-Pruning Defense".
  """
  return server.train(
    model,
    params,
    neuron_mask,
    images,
    labels,
    key=key,
    optimizer=optimizer,
    epochs=epochs,
    batch_size=batch_size,
    augmentation=augmentation,
    mesh=mesh,
    on_steps=on_steps,
  )
