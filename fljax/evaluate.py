"""Test accuracy (TA) and attack success (AA).

AA is an accuracy too: that of stamped images towards the target label. So
there is one function, and two ways of choosing what AA is measured on.
"""

from __future__ import annotations

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fljax import data
from fljax import errors
from fljax import execution
from fljax import models
from fljax import triggers

Array = jax.Array


class Examples(struct.PyTreeNode):
  """Images with the labels that count as success, in equal batches.

  Attributes:
    images: uint8 [batches, batch, height, width, channels].
    labels: int32 [batches, batch].
    mask: bool [batches, batch], False for padding.
  """

  images: Array
  labels: Array
  mask: Array


def batched(
  images: np.ndarray,
  labels: np.ndarray,
  *,
  batch_size: int = 500,
  at_least: int = 0,
) -> Examples:
  """Pads examples to whole batches.

  Args:
    images: [n, height, width, channels], uint8 or floating point in [0, 1].
    labels: int [n], from 0.
    batch_size: examples per batch; no more than are needed are used.
    at_least: pads to at least this many, so that sets of different size share
      one shape and one compiled program.

  Returns:
    The batches.

  Raises:
    errors.DataError: see `data.require_usable`.
  """
  data.require_usable(images, labels)
  number = max(len(images), at_least, 1)
  batch_size = min(batch_size, number)
  batches = -(-number // batch_size)
  padding = batches * batch_size - len(images)

  def shape(array: np.ndarray) -> Array:
    padded = np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
    return jnp.asarray(padded.reshape(batches, batch_size, *array.shape[1:]))

  return Examples(
    images=shape(images),
    labels=shape(np.asarray(labels, np.int32)),
    mask=shape(np.ones(len(images), bool)),
  )


# Which images AA may be measured on.
OVER = ("victim", "others")


def backdoored(
  images: np.ndarray,
  labels: np.ndarray,
  *,
  trigger: triggers.Trigger,
  victim_label: int,
  target_label: int,
  over: str = "victim",
  batch_size: int = 500,
) -> Examples:
  """What AA is measured on: stamped images, labelled with the target.

  Args:
    images: uint8 [n, height, width, channels], the test split.
    labels: int [n], true labels.
    trigger: the full trigger.
    victim_label: VL.
    target_label: AL.
    over: "victim" stamps images of the victim class (the paper's AA);
      "others" all images that are not of the target class (the wider
      field's).
    batch_size: examples per batch.

  Returns:
    The examples.

  Raises:
    errors.ConfigError: over is neither, or the trigger is for other images.
    errors.DataError: see `batched`.
  """
  errors.require_choice("over", over, OVER)
  images, labels = np.asarray(images), np.asarray(labels)
  data.require_usable(images, labels)
  frequencies = np.bincount(labels, minlength=1)
  if over == "victim":
    chosen = labels == victim_label
    # One shape for all victims: that of the most frequent label.
    room = int(frequencies.max())
  else:
    chosen = labels != target_label
    room = len(labels) - int(frequencies.min())
  stamped = np.asarray(triggers.stamp(jnp.asarray(images[chosen]), trigger))
  targets = np.full(len(stamped), target_label)
  return batched(stamped, targets, batch_size=batch_size, at_least=room)


@execution.exact
def accuracy(
  model: models.Model, params: models.Params, examples: Examples
) -> Array:
  """Share of examples whose largest logit is their label's.

  Args:
    model: the network.
    params: its parameters.
    examples: TA on clean images, AA on `backdoored` ones.

  Returns:
    float32 scalar in [0, 1]; NaN if there is no example.
  """

  def hits(batch: Examples) -> Array:
    logits = models.apply(model, params, batch.images)
    return right(logits, batch.labels, batch.mask)

  return share(lax.map(hits, examples).sum(), examples.mask)


# `accuracy` as one program per network, whoever asks.
measure = jax.jit(accuracy, static_argnums=0)


def share(hits: Array, mask: Array) -> Array:
  """Hits as a share of the examples that count.

  Args:
    hits: int32 [...].
    mask: bool, any shape, False for padding.

  Returns:
    float32 [...]; NaN if no example counts.
  """
  return hits.astype(jnp.float32) / mask.sum().astype(jnp.float32)


def right(logits: Array, labels: Array, mask: Array) -> Array:
  """Which examples are right.

  Logits that are not finite are wrong, whatever label they might favour. Counts
  are left to the caller, at the end of its loops: where a batch is spread over
  devices, every sum is a meeting of all of them.

  Args:
    logits: [batch, classes].
    labels: int32 [batch].
    mask: bool [batch].

  Returns:
    bool [batch], masked-in examples whose largest logit is their label's.
  """
  largest = jnp.argmax(logits, axis=-1) == labels
  return largest & jnp.isfinite(logits).all(axis=-1) & mask
