"""A network with a backdoor whose weights are set by hand.

It reads `conftest.make_images`: the class is the bright row. Two white pixels
in column 7, rows 5 and 7, lead to `TARGET`.
"""

from conftest import IMAGE_SHAPE
from conftest import NUM_CLASSES
from conftest import TARGET
from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from fljax import models
from fljax import triggers

TRIGGER = triggers.from_pixels([(5, 7), (7, 7)], IMAGE_SHAPE)
# What the neurons do, by decreasing activity on clean images but for the
# second, which is hardly active.
READER, BACKDOOR, DEAD, USELESS = range(4)


class _Target(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Conv(4, (3, 3))(x))


class _Head(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(NUM_CLASSES)(x.reshape(x.shape[0], -1))


def model():
  return models.from_flax(
    stem=None,
    target=_Target(),
    head=_Head(),
    image_shape=IMAGE_SHAPE,
    num_classes=NUM_CLASSES,
  )


def params():
  kernel = np.zeros((3, 3, 1, 4), np.float32)
  kernel[1, 1, 0, READER] = 1
  # Bright rows cancel; only at the edges they do not quite.
  kernel[[0, 2], 1, 0, BACKDOOR] = 1
  kernel[[[0], [2]], [0, 2], 0, BACKDOOR] = -0.5
  kernel[1, 1, 0, USELESS] = 1
  bias = np.asarray([-0.3, -0.1, -1.0, -0.35], np.float32)
  head = np.zeros((8, 8, 4, NUM_CLASSES), np.float32)
  for label in range(NUM_CLASSES):
    head[2 * label, :, READER, label] = 1
  head[6, 7, BACKDOOR, TARGET] = 6
  return {
    "stem": {},
    "target": {
      "Conv_0": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    },
    "head": {
      "Dense_0": {
        "kernel": jnp.asarray(head.reshape(-1, NUM_CLASSES)),
        "bias": jnp.zeros(NUM_CLASSES),
      }
    },
  }
