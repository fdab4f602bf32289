"""Convolution and pooling whose form is chosen per backend; normalisation.

Values and gradients do not depend on the form (a property test holds them
together); speed does, by an order of magnitude. Which form a backend gets is
decided in `execution`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
import operator
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from fljax import winograd

Array = jax.Array
Initializer = Callable[..., Array]


CONV_FORMS = ("blocks", "winograd", "slices", "lax")
POOLING_FORMS = ("reshape", "lax")
# Winograd's products sum over channels alone: with few, nothing is gained.
_FEW_CHANNELS = 8


class Forms(NamedTuple):
  """How layers compute; never what they compute.

  Attributes:
    conv: "slices" (shifted slices and one matrix product, in which a
      `vmap` over kernels is a true batch dimension), "blocks" (the same, but
      where a pooling follows, one row of the product yields all four outputs
      of a pooling window), "winograd" (fewer multiplications, see `winograd`,
      for float32 kernels of size 3 and 5, 8 channels and 4 x 4 outputs or more;
      with fewer channels or another type "blocks", with fewer outputs
      "slices") or "lax"
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
# out as extreme, and whether a network trains at all (BUILD_NOTES.md,
# "CIFAR-10"), so it is an experiment's variable, not an implementation detail.
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


@jax.custom_vjp
def product(patches: Array, kernel: Array) -> Array:
  """Patches [..., inner] @ kernel [inner, features].

  The kernel's gradient is written as the product of two untransposed
  operands; the derived one makes XLA's CPU backend copy a transposed operand
  that is as large as the patches.
  """
  return patches @ kernel


def _product_forward(
  patches: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
  return patches @ kernel, (patches, kernel)


def _product_backward(
  saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
  patches, kernel = saved
  by_patches = lax.dot_general(
    cotangent, kernel, (((cotangent.ndim - 1,), (1,)), ((), ()))
  )
  rows = tuple(range(patches.ndim - 1))
  by_kernel = lax.dot_general(patches, cotangent, ((rows, rows), ((), ())))
  return by_patches, by_kernel


product.defvjp(_product_forward, _product_backward)


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
  images = _pad(images, padding)
  size, features = kernel.shape[0], kernel.shape[-1]
  return product(extract_patches(images, size), kernel.reshape(-1, features))


def convolve_windows(images: Array, kernel: Array, *, padding: int) -> Array:
  """`convolve`, its output grouped by 2 x 2 pooling windows.

  Four neighbouring outputs need (size + 1)² inputs, hardly more than one
  needs. With the images' 2 x 2 blocks as channels it is a convolution of
  ((size + 1) / 2)² taps to 4·features: a quarter of the patches to make and,
  for the gradient, to scatter, and wider products, for (size + 1)² / size²
  times the arithmetic.

  Args:
    images: [batch, height, width, channels].
    kernel: [size, size, channels, features], size odd.
    padding: zeros added on each side.

  Returns:
    [batch, height' // 2, width' // 2, 4, features], height' and width' those
    of `convolve`; odd edges are dropped, as a pooling drops them.
  """
  images = _pad(images, padding)
  size, _, channels, features = kernel.shape
  batch = images.shape[0]
  height, width = ((side - size + 1) // 2 for side in images.shape[1:3])
  taps = (size + 1) // 2
  rows, columns = height + taps - 1, width + taps - 1
  blocks = (
    images[:, : 2 * rows, : 2 * columns]
    .reshape(batch, rows, 2, columns, 2, channels)
    .transpose(0, 1, 3, 2, 4, 5)
    .reshape(batch, rows, columns, 4 * channels)
  )
  # Each of the four outputs sees the kernel at its own place among the
  # (size + 1)² inputs.
  placed = jnp.stack(
    [
      jnp.pad(kernel, ((down, 1 - down), (right, 1 - right), (0, 0), (0, 0)))
      for down in (0, 1)
      for right in (0, 1)
    ],
    axis=3,
  )
  placed = (
    placed.reshape(taps, 2, taps, 2, channels, 4 * features)
    .transpose(0, 2, 1, 3, 4, 5)
    .reshape(-1, 4 * features)
  )
  out = product(extract_patches(blocks, taps), placed)
  return out.reshape(batch, height, width, 4, features)


def _pad(images: Array, padding: int) -> Array:
  if not padding:
    return images
  return jnp.pad(images, [(0, 0), (padding,) * 2, (padding,) * 2, (0, 0)])


def max_pool(images: Array, *, form: str) -> Array:
  """Maximum over non-overlapping 2 x 2 windows; odd edges are dropped.

  Args:
    images: [batch, height, width, channels]; or, already grouped by
      `convolve_windows`, [batch, height // 2, width // 2, 4, channels].
    form: see `Forms.pooling`.

  Returns:
    [batch, height // 2, width // 2, channels].
  """
  if images.ndim == 5:
    return window_max(images)
  if form == "lax":
    return nn.max_pool(images, (2, 2), strides=(2, 2))
  batch, height, width, channels = images.shape
  height, width = height // 2, width // 2
  return _square_max(
    images[:, : 2 * height, : 2 * width].reshape(
      batch, height, 2, width, 2, channels
    )
  )


def _max_gradient(cotangent: Array, windows: Sequence[Array]) -> list[Array]:
  """A maximum's gradient with respect to each of four arrays.

  Equal maxima share it. Whether one is the maximum is found by comparing the
  four with each other, not with the maximum: XLA may compute what is pooled
  once more for the gradient, in another fusion and rounded otherwise (seen for
  batch normalisation on CPU), and then none would equal it.
  """
  chosen = [
    functools.reduce(
      jnp.logical_and,
      (one >= other for other in windows if other is not one),
    )
    for one in windows
  ]
  count = functools.reduce(operator.add, (c.astype(jnp.int32) for c in chosen))
  each = cotangent / count.astype(cotangent.dtype)
  # Or XLA fuses the division into what follows, four times.
  each = lax.optimization_barrier(each)
  return [jnp.where(c, each, 0) for c in chosen]


@jax.custom_vjp
def window_max(windows: Array) -> Array:
  """Maximum over the windows' axis: [..., 4, channels] -> [..., channels].

  Equal maxima share the gradient, as in the derived gradient; written out so
  that the division is done once per window instead of once per input.
  """
  return windows.max(axis=-2)


def _window_max_backward(windows: Array, cotangent: Array) -> tuple[Array]:
  parts = _max_gradient(cotangent, [windows[..., k, :] for k in range(4)])
  return (jnp.stack(parts, axis=-2),)


window_max.defvjp(
  lambda windows: (windows.max(axis=-2), windows), _window_max_backward
)


@jax.custom_vjp
def _square_max(squares: Array) -> Array:
  """[batch, height, 2, width, 2, channels]: the maximum over both twos."""
  return squares.max(axis=(2, 4))


def _square_max_backward(squares: Array, cotangent: Array) -> tuple[Array]:
  parts = _max_gradient(
    cotangent, [squares[:, :, i, :, j] for i in (0, 1) for j in (0, 1)]
  )
  rows = [jnp.stack(parts[k : k + 2], axis=3) for k in (0, 2)]
  return (jnp.stack(rows, axis=2),)


_square_max.defvjp(
  lambda squares: (squares.max(axis=(2, 4)), squares), _square_max_backward
)


class Conv(nn.Module):
  """Convolution at stride 1 with bias; parameters `kernel` and `bias`.

  Attributes:
    features: output channels.
    size: of the kernel.
    padding: zeros added on each side.
    kernel_init: also decides how the bias starts.
    forms: how it is computed.
    then: what comes next: "pool", a 2 x 2 maximum that is taken here, before
      the bias, which gives the same values for a quarter of the additions;
      "pool later", for which the output may be grouped by windows, see
      `convolve_windows`, if none of it falls outside of them; or "".
  """

  features: int
  size: int
  padding: int
  kernel_init: Initializer
  forms: Forms
  then: str = ""

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
    grow = 2 * self.padding - self.size + 1
    sides = [side + grow for side in images.shape[1:3]]
    even = not any(side % 2 for side in sides)
    by_windows = self.then == "pool" or (self.then == "pool later" and even)
    form = self.forms.conv
    # Changes of basis cost digits that bfloat16 does not have.
    direct = shape[2] < _FEW_CHANNELS or kernel.dtype != jnp.float32
    if (
      form == "winograd"
      and self.size in winograd.SIZES
      and not direct
      and min(sides) >= winograd.TILE
    ):
      padded = _pad(images, self.padding)
      out = winograd.convolve(padded, kernel, by_windows=by_windows)
    elif (
      by_windows
      and self.size % 2
      and (form == "blocks" or (form == "winograd" and direct))
    ):
      out = convolve_windows(images, kernel, padding=self.padding)
    else:
      out = convolve(images, kernel, padding=self.padding, form=form)
    if self.then == "pool":
      out = max_pool(out, form=self.forms.pooling)
    return out + bias.reshape((1,) * (out.ndim - 1) + (-1,))


class BatchNorm(nn.Module):
  """Batch normalisation by channel: Flax's, with PyTorch's momentum and ε.

  Parameters `scale` and `bias`, running statistics `mean` and `var`. In
  training a batch is normalised by its own statistics, and a tenth of the way
  to them is what the running ones move; PyTorch's running variance is the
  unbiased one, this is not.
  """

  @nn.compact
  def __call__(
    self, inputs: Array, *, train: bool = False, mask: Array | None = None
  ) -> Array:
    """Normalises inputs [batch, ..., channels].

    Args:
      inputs: what to normalise.
      train: whether by their own statistics.
      mask: bool [batch], the samples of which those are; None for all.

    Returns:
      Of the same shape and type.
    """
    if mask is not None:
      mask = mask.reshape((-1,) + (1,) * (inputs.ndim - 1))
    norm = nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=inputs.dtype,
      use_fast_variance=False,
      name="norm",
    )
    # It computes in float32 what is bfloat16, which is a promotion.
    with jax.numpy_dtype_promotion("standard"):
      return norm(inputs, mask=mask)


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
