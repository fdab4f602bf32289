"""Backdoor triggers: which pixels are overwritten or blended, and with what.

A trigger is data (a small pytree), so a federation can carry one per client
and stamping happens inside the compiled step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from fljax import errors

Array = jax.Array


class Trigger(struct.PyTreeNode):
  """Pixels to overwrite, or to blend with.

  Attributes:
    mask: bool [..., height, width, 1], True where the image is overwritten; or
      float32, how much of the value is there instead of the image, in [0, 1].
      All pieces of a trigger have the same type.
    value: float32 [..., height, width, channels] in [0, 1], what is written
      there.
  """

  mask: Array
  value: Array


def stamp(images: Array, trigger: Trigger) -> Array:
  """Overwrites, or blends, the trigger's pixels; all others stay as they are.

  Guarantees: shape and dtype are kept; pixels outside the mask, or where it is
  0, are untouched bit for bit; idempotent where a trigger overwrites.

  Args:
    images: [..., height, width, channels], uint8 in 0..255 or floating point
      in [0, 1].
    trigger: the pixels, broadcast against the images' leading axes.

  Returns:
    The stamped images.

  Raises:
    errors.ConfigError: the trigger is for images of another shape.
  """
  value = trigger.value
  try:
    shape = jnp.broadcast_shapes(value.shape, trigger.mask.shape, images.shape)
  except ValueError:
    shape = ()
  if shape != images.shape:
    raise errors.ConfigError(
      f"a trigger of {value.shape[-3:]}, its mask of {trigger.mask.shape[-3:]},"
      f" cannot be stamped on images of {images.shape[-3:]}: value and images"
      " have height, width and channels, the mask height, width and 1."
    )
  whole_numbers = jnp.issubdtype(images.dtype, jnp.integer)
  if whole_numbers:
    value = value * 255
  if trigger.mask.dtype != bool:
    there = images.astype(jnp.float32)
    opacity = jnp.broadcast_to(trigger.mask, shape)
    value = there + opacity * (jnp.broadcast_to(value, shape) - there)
  if whole_numbers:
    value = jnp.round(value)
  stamped = trigger.mask.astype(bool)
  return jnp.where(stamped, value.astype(images.dtype), images)


def from_pixels(
  pixels: list[tuple[int, int]], image_shape: tuple[int, int, int]
) -> Trigger:
  """A trigger that sets pixels to their maximum in every channel.

  Args:
    pixels: (row, column); negative ones count from the lower right corner.
    image_shape: height, width, channels.

  Returns:
    The trigger.

  Raises:
    errors.ConfigError: a pixel lies outside the image.
  """
  height, width, _ = image_shape
  mask = np.zeros((height, width, 1), bool)
  for row, column in pixels:
    if not (-height <= row < height and -width <= column < width):
      raise errors.ConfigError(
        f"the trigger's pixel ({row}, {column}) lies outside images of"
        f" {height} x {width}."
      )
    mask[row, column] = True
  value = np.broadcast_to(mask, image_shape).astype(np.float32)
  return Trigger(mask=jnp.asarray(mask), value=jnp.asarray(value))


def blended(pattern: np.ndarray, opacity: float) -> Trigger:
  """A trigger that lies over the whole image, more or less transparent.

  Args:
    pattern: float [height, width, channels] in [0, 1].
    opacity: how much of it is there instead of the image, in (0, 1].

  Returns:
    The trigger.

  Raises:
    errors.ConfigError: the pattern has another form, or a number is out of its
      range.

  References:
    Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning
    (Chen, Liu, Li, Lu, Song, 2017), "Blended Injection Strategy".
  """
  pattern = np.asarray(pattern, np.float32)
  if pattern.ndim != 3 or not ((pattern >= 0) & (pattern <= 1)).all():
    raise errors.ConfigError(
      "a trigger's pattern is [height, width, channels], from 0 to 1."
    )
  if not 0 < opacity <= 1:
    raise errors.ConfigError(
      f"a trigger's opacity of {opacity:g} is out of range: it must be above 0"
      " and at most 1."
    )
  mask = np.full((*pattern.shape[:2], 1), opacity, np.float32)
  return Trigger(mask=jnp.asarray(mask), value=jnp.asarray(pattern))


# The paper draws its patterns (Fig. 1: in the lower right corner) without
# giving positions. These are nested and fill the 3 x 3 block in that corner
# from its centre, which is BadNets' single pixel, (26, 26) on 28 x 28 images.
_NESTED_PIXELS = (
  (-2, -2),
  (-3, -3),
  (-1, -1),
  (-3, -1),
  (-1, -3),
  (-2, -3),
  (-2, -1),
  (-3, -2),
  (-1, -2),
)

# The official pieces of the Distributed Backdoor Attack: [row, columns].
_DBA_MNIST = ((0, 0, 4), (0, 6, 10), (3, 0, 4), (3, 6, 10))
_DBA_CIFAR = ((0, 0, 6), (0, 9, 15), (4, 0, 6), (4, 9, 15))


def _corner(count: int) -> Callable[[tuple[int, int, int]], list[Trigger]]:
  return lambda shape: [from_pixels(list(_NESTED_PIXELS[:count]), shape)]


def _very_corner(image_shape: tuple[int, int, int]) -> list[Trigger]:
  # Where hardly any image of Fashion-MNIST has anything: ink is at (27, 27) in
  # 1 of 100 ankle boots, at (26, 26) in 13.
  return [from_pixels([(-1, -1)], image_shape)]


def _dba(image_shape: tuple[int, int, int]) -> list[Trigger]:
  rows = _DBA_MNIST if image_shape[2] == 1 else _DBA_CIFAR
  return [
    from_pixels([(row, c) for c in range(start, stop)], image_shape)
    for row, start, stop in rows
  ]


# How much of the noise is there instead of the image.
_NOISE_OPACITY = 0.2


def _noise(image_shape: tuple[int, int, int]) -> list[Trigger]:
  # The same noise in every run, as the other triggers are the same.
  pattern = np.random.default_rng(0).random(image_shape)
  return [blended(pattern, _NOISE_OPACITY)]


# Name -> function of the image shape -> the trigger's pieces.
TRIGGERS: dict[str, Callable[..., list[Trigger]]] = {
  "pixel1": _corner(1),
  "pixel3": _corner(3),
  "pixel5": _corner(5),
  "pixel7": _corner(7),
  "pixel9": _corner(9),
  "corner1": _very_corner,
  "dba": _dba,
  "blended": _noise,
}


def pieces(
  name: str, image_shape: tuple[int, int, int], **parameters: Any
) -> list[Trigger]:
  """The parts into which a trigger is split among attackers.

  Args:
    name: a key of `TRIGGERS`. The `pixel*` patterns, `corner1`, the pixel in
      the very corner, and `blended`, noise over the whole image of which a
      fifth is seen, have one piece, which every attacker stamps; `dba` has
      four, and attacker i stamps piece i mod 4.
    image_shape: height, width, channels.
    **parameters: of a user's own, see `extensions`.

  Returns:
    The pieces. The full trigger, stamped at test time, is their `union`.

  Raises:
    errors.ConfigError: the name is unknown or the images are too small.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Fig. 1 and Fig. 4; BadNets (Gu, Dolan-Gavitt, Garg);
    DBA: Distributed Backdoor Attacks against Federated Learning (Xie et al.);
    for noise those of the function `blended`.
  """
  errors.require_choice("trigger", name, TRIGGERS)
  return TRIGGERS[name](image_shape, **parameters)


def union(parts: list[Trigger]) -> Trigger:
  """The trigger that has the pixels of all parts.

  Args:
    parts: at least one trigger, all for the same image shape.

  Returns:
    Their union; where parts overlap, the later one's value, and the larger
    opacity.
  """
  whole = parts[0]
  for part in parts[1:]:
    whole = Trigger(
      mask=jnp.maximum(whole.mask, part.mask),
      value=jnp.where(part.mask.astype(bool), part.value, whole.value),
    )
  return whole
