"""Winograd's convolution F(4 x 4, size x size) before a 2 x 2 pooling.

A tile of 4 x 4 outputs sees n x n inputs, n = 4 + size - 1. In the basis of
interpolation at n points, its convolution is one product per position: n²
instead of 16·size² multiplications (36 for 144 at size 3, 64 for 400 at 5).
The changes of basis are products of small constant matrices with everything
else as columns, so all work but the tiles' slices is in matrix products.

References:
  Fast Algorithms for Convolutional Neural Networks (Lavin, Gray).
"""

from __future__ import annotations

from fractions import Fraction
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

TILE = 4
SIZES = (3, 5)
_HALF = Fraction(1, 2)
_POINTS = (0, 1, -1, 2, -2, _HALF, -_HALF)


@functools.cache
def bases(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Matrices with conv(d, g) = A ((G g) * (B d)), outputs by windows.

  Args:
    size: of the kernel, in SIZES.

  Returns:
    A [16, n²], whose rows are (place in the pooling window, window), G
    [n², size²] and B [n², n²], float32.
  """
  n = TILE + size - 1
  points = [Fraction(p) for p in _POINTS[: n - 1]]

  def times(p: list[Fraction], root: Fraction) -> list[Fraction]:
    shifted, scaled = [Fraction(0), *p], [*(-root * c for c in p), Fraction(0)]
    return [a + b for a, b in zip(shifted, scaled, strict=True)]

  outputs = [
    [p**i for p in points] + [Fraction(i == TILE - 1)] for i in range(TILE)
  ]
  kernels, inputs = [], []
  for point in points:
    polynomial, scale = [Fraction(1)], Fraction(1)
    for other in points:
      if other != point:
        polynomial, scale = times(polynomial, other), scale * (point - other)
    kernels.append([point**i / scale for i in range(size)])
    inputs.append([*polynomial, Fraction(0)])
  kernels.append([Fraction(i == size - 1) for i in range(size)])
  inputs.append(functools.reduce(times, points, [Fraction(1)]))

  def square(rows: list[list[Fraction]]) -> np.ndarray:
    matrix = np.array(rows, float)
    return np.kron(matrix, matrix)

  half = TILE // 2
  a = square(outputs).reshape(half, 2, half, 2, -1)
  a = a.transpose(1, 3, 0, 2, 4).reshape(TILE * TILE, -1)
  return (
    a.astype(np.float32),
    square(kernels).astype(np.float32),
    square(inputs).astype(np.float32),
  )


def _along_first(matrix: np.ndarray, x: Array) -> Array:
  out = jnp.asarray(matrix) @ x.reshape(x.shape[0], -1)
  return out.reshape(-1, *x.shape[1:])


def change(matrix: np.ndarray, x: Array) -> Array:
  """Constant matrix [p, q] times x [q, ...], and so in the gradient."""

  @jax.custom_vjp
  def run(x: Array) -> Array:
    return _along_first(matrix, x)

  run.defvjp(
    lambda x: (_along_first(matrix, x), None),
    lambda _, g: (_along_first(np.ascontiguousarray(matrix.T), g),),
  )
  return run(x)


def _batched(a: Array, b: Array, over_a: int, over_b: int) -> Array:
  return lax.dot_general(a, b, (((over_a,), (over_b,)), ((0,), (0,))))


@jax.custom_vjp
def products(inputs: Array, kernels: Array) -> Array:
  """[n², tiles, channels] @ [n², channels, features], none transposed."""
  return _batched(inputs, kernels, 2, 1)


products.defvjp(
  lambda a, b: (_batched(a, b, 2, 1), (a, b)),
  lambda saved, g: (_batched(g, saved[1], 2, 2), _batched(saved[0], g, 1, 1)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def tiles(images: Array, size: int) -> Array:
  """Overlapping tiles at stride 4, positions first.

  Args:
    images: [batch, 4·rows + size - 1, 4·columns + size - 1, channels].
    size: of the kernel, at most 5.

  Returns:
    [n², batch, rows, columns, channels], n = 4 + size - 1.
  """
  batch, height, width, channels = images.shape
  n = TILE + size - 1
  return jnp.stack(
    [
      lax.slice(
        images,
        (0, row, column, 0),
        (batch, height - n + row + 1, width - n + column + 1, channels),
        (1, TILE, TILE, 1),
      )
      for row in range(n)
      for column in range(n)
    ]
  )


def _tiles_backward(size: int, saved: None, cotangent: Array) -> tuple[Array]:
  del saved
  # What a tile shares with the next one is the first size - 1 rows of that:
  # four sums of blocks instead of n² scattered slices.
  n = TILE + size - 1
  batch, rows, columns, channels = cotangent.shape[1:]
  tiled = cotangent.reshape(n, n, batch, rows, columns, channels)
  total: Any = 0
  for down in (0, 1):
    for right in (0, 1):
      part = tiled[
        TILE * down : TILE * (down + 1), TILE * right : TILE * (right + 1)
      ]
      total += jnp.pad(
        part,
        (
          (0, TILE - part.shape[0]),
          (0, TILE - part.shape[1]),
          (0, 0),
          (down, 1 - down),
          (right, 1 - right),
          (0, 0),
        ),
      )
  total = total.transpose(2, 3, 0, 4, 1, 5).reshape(
    batch, TILE * (rows + 1), TILE * (columns + 1), channels
  )
  return (total[:, : TILE * rows + size - 1, : TILE * columns + size - 1],)


def _tiles_forward(images: Array, size: int) -> tuple[Array, None]:
  return tiles(images, size), None


tiles.defvjp(_tiles_forward, _tiles_backward)


def convolve_windows(images: Array, kernel: Array) -> Array:
  """Valid cross-correlation at stride 1, its output by pooling windows.

  Args:
    images: [batch, height, width, channels].
    kernel: [size, size, channels, features], size in SIZES.

  Returns:
    [batch, height' // 2, width' // 2, 4, features], height' = height - size
    + 1; odd edges are dropped.
  """
  size, _, channels, features = kernel.shape
  batch = images.shape[0]
  height, width = ((side - size + 1) // 2 for side in images.shape[1:3])
  rows, columns = -(-height // 2), -(-width // 2)
  # Tiles that reach beyond the images; surplus outputs are dropped below.
  grow = [
    TILE * count + size - 1 - side
    for count, side in zip((rows, columns), images.shape[1:3], strict=True)
  ]
  if any(grow):
    images = lax.pad(
      images,
      jnp.zeros((), images.dtype),
      [(0, 0, 0), (0, grow[0], 0), (0, grow[1], 0), (0, 0, 0)],
    )
  a, g, b = bases(size)
  inputs = change(b, tiles(images, size)).reshape(b.shape[0], -1, channels)
  kernels = change(g, kernel.reshape(-1, channels, features))
  out = change(a, products(inputs, kernels))
  half = TILE // 2
  out = (
    out.reshape(4, half, half, batch, rows, columns, features)
    .transpose(3, 4, 1, 5, 2, 0, 6)
    .reshape(batch, half * rows, half * columns, 4, features)
  )
  return out[:, :height, :width]
