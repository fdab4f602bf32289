"""Convolution and pooling whose form is chosen per backend.

Values and gradients do not depend on the form (a property test holds them
together); speed does, by an order of magnitude. Which form a backend gets is
decided in `execution`.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array
Initializer = Callable[..., Array]


CONV_FORMS = ("slices", "lax")
POOLING_FORMS = ("reshape", "lax")


class Forms(NamedTuple):
  """How layers compute; never what they compute.

  Attributes:
    conv: "slices" (shifted slices and one matrix product, in which a
      `vmap` over kernels is a true batch dimension) or "lax"
      (`lax.conv_general_dilated`).
    pooling: "reshape" (maximum over two split axes) or "lax"
      (`lax.reduce_window`).
  """

  conv: str
  pooling: str


# --- initial weights ---------------------------------------------------------


def uniform_fan_in(
  key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Array:
  """Uniform in ±1/√fan_in, PyTorch's default for kernels.

  Args:
    key: random key.
    shape: kernel shape, output channels last.
    dtype: of the result.

  Returns:
    The initial kernel.
  """
  bound = 1 / math.sqrt(math.prod(shape[:-1]))
  return jax.random.uniform(key, shape, dtype, -bound, bound)


# The scale of the initial weights decides whether a backdoor's weights stand
# out as extreme (BUILD_NOTES.md, "Calibration"), so it is an experiment's
# variable, not an implementation detail.
INITIALISERS: dict[str, Initializer] = {
  "uniform": uniform_fan_in,
  "he": nn.initializers.he_normal(),
  "lecun": nn.initializers.lecun_normal(),
  "glorot": nn.initializers.glorot_uniform(),
}


def _bias_init(kernel_init: Initializer, fan_in: int) -> Initializer:
  """PyTorch draws biases like kernels; every other scheme sets them to 0."""
  if kernel_init is not uniform_fan_in:
    return nn.initializers.zeros
  bound = 1 / math.sqrt(fan_in)
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
    key, shape, dtype, -bound, bound
  )


# --- layers ------------------------------------------------------------------


def extract_patches(images: Array, size: int) -> Array:
  """All size x size windows at stride 1, as shifted slices.

  Args:
    images: [batch, height, width, channels].
    size: window height and width.

  Returns:
    [batch, height - size + 1, width - size + 1, size·size·channels], ordered
    like a kernel [size, size, channels, ...] flattened over its first axes.
  """
  height = images.shape[1] - size + 1
  width = images.shape[2] - size + 1
  return jnp.concatenate(
    [
      images[:, row : row + height, column : column + width]
      for row in range(size)
      for column in range(size)
    ],
    axis=-1,
  )


def convolve(images: Array, kernel: Array, *, padding: int, form: str) -> Array:
  """Cross-correlates images with a square kernel at stride 1.

  Args:
    images: [batch, height, width, channels].
    kernel: [size, size, channels, features].
    padding: zeros added on each side.
    form: see `Forms.conv`.

  Returns:
    [batch, height', width', features], height' = height + 2·padding - size
    + 1.
  """
  if form == "lax":
    return lax.conv_general_dilated(
      images,
      kernel,
      window_strides=(1, 1),
      padding=[(padding, padding)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
  if padding:
    images = jnp.pad(images, [(0, 0), (padding,) * 2, (padding,) * 2, (0, 0)])
  size, features = kernel.shape[0], kernel.shape[-1]
  return extract_patches(images, size) @ kernel.reshape(-1, features)


def max_pool(images: Array, *, form: str) -> Array:
  """Maximum over non-overlapping 2 x 2 windows; odd edges are dropped.

  Args:
    images: [batch, height, width, channels].
    form: see `Forms.pooling`.

  Returns:
    [batch, height // 2, width // 2, channels].
  """
  if form == "lax":
    return nn.max_pool(images, (2, 2), strides=(2, 2))
  batch, height, width, channels = images.shape
  height, width = height // 2, width // 2
  windows = images[:, : 2 * height, : 2 * width].reshape(
    batch, height, 2, width, 2, channels
  )
  return windows.max(axis=(2, 4))


class Conv(nn.Module):
  """Convolution at stride 1 with bias; parameters `kernel` and `bias`."""

  features: int
  size: int
  padding: int
  kernel_init: Initializer
  form: str

  @nn.compact
  def __call__(self, images: Array) -> Array:
    """Convolves images [batch, height, width, channels]."""
    shape = (self.size, self.size, images.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = self.param(
      "bias",
      _bias_init(self.kernel_init, math.prod(shape[:-1])),
      (self.features,),
    )
    out = convolve(images, kernel, padding=self.padding, form=self.form)
    return out + bias.reshape(1, 1, 1, -1)


class Dense(nn.Module):
  """Linear map with bias; parameters `kernel` and `bias`."""

  features: int
  kernel_init: Initializer

  @nn.compact
  def __call__(self, inputs: Array) -> Array:
    """Maps inputs [batch, features]."""
    fan_in = inputs.shape[-1]
    kernel = self.param("kernel", self.kernel_init, (fan_in, self.features))
    bias = self.param(
      "bias", _bias_init(self.kernel_init, fan_in), (self.features,)
    )
    return inputs @ kernel + bias.reshape(1, -1)
