"""Winograd's convolution F(4 x 4, size x size).

A tile of 4 x 4 outputs sees n x n inputs, n = 4 + size - 1. In the basis of
interpolation at n points, its convolution is one product per position: n²
instead of 16·size² multiplications (36 for 144 at size 3, 64 for 400 at 5).
The changes of basis are products of small constant matrices with everything
else as columns; that of the inputs is two passes of sums of slices instead,
which never writes down the overlapping tiles.

References:
  Fast Algorithms for Convolutional Neural Networks (Lavin, Gray).
"""

from __future__ import annotations

from fractions import Fraction
import functools
import operator
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
  """Matrices with conv(d, g) = A ((G g) * (B d)).

  Args:
    size: of the kernel, in SIZES.

  Returns:
    A [16, n²], G [n², size²] and B1 [n, n], float32; B = B1 ⊗ B1.
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

  return (
    square(outputs).astype(np.float32),
    square(kernels).astype(np.float32),
    np.array(inputs, np.float32),
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


def _combined(coefficients: np.ndarray, slices: list[Array]) -> Array:
  terms = [
    part if factor == 1 else float(factor) * part
    for factor, part in zip(coefficients, slices, strict=True)
    if factor
  ]
  return functools.reduce(operator.add, terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def tiles_in_basis(images: Array, size: int) -> Array:
  """B times the overlapping tiles at stride 4, positions first.

  Args:
    images: [batch, 4·rows + size - 1, 4·columns + size - 1, channels].
    size: of the kernel, at most 5.

  Returns:
    [n², batch, rows, columns, channels], n = 4 + size - 1.
  """
  b = bases(size)[2]
  n = TILE + size - 1
  _, height, width, _ = images.shape
  by_row = [images[:, k : height - n + k + 1 : TILE] for k in range(n)]
  down = jnp.stack([_combined(row, by_row) for row in b])
  # Or XLA computes the first pass anew for each use in the second.
  down = lax.optimization_barrier(down)
  by_column = [down[:, :, :, k : width - n + k + 1 : TILE] for k in range(n)]
  across = jnp.stack([_combined(row, by_column) for row in b], axis=1)
  return across.reshape(n * n, *across.shape[2:])


def _tiles_backward(size: int, saved: None, cotangent: Array) -> tuple[Array]:
  del saved
  b = bases(size)[2]
  cotangent = _along_first(np.ascontiguousarray(np.kron(b, b).T), cotangent)
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


tiles_in_basis.defvjp(
  lambda images, size: (tiles_in_basis(images, size), None), _tiles_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _joined(tiles: Array, by_windows: bool) -> Array:
  """[16, batch, rows, columns, features] to the layouts of `convolve`."""
  half = TILE // 2
  _, batch, rows, columns, features = tiles.shape
  height, width = TILE * rows, TILE * columns
  if not by_windows:
    return (
      tiles.reshape(TILE, TILE, batch, rows, columns, features)
      .transpose(2, 3, 0, 4, 1, 5)
      .reshape(batch, height, width, features)
    )
  return (
    tiles.reshape(half, 2, half, 2, batch, rows, columns, features)
    .transpose(4, 5, 0, 6, 2, 1, 3, 7)
    .reshape(batch, height // 2, width // 2, 4, features)
  )


def _joined_backward(
  by_windows: bool, saved: None, cotangent: Array
) -> tuple[Array]:
  del saved
  # Copies of slices, which are fast; in one transposition, XLA's CPU backend
  # finds the place of every element by divisions.
  if by_windows:
    half = TILE // 2
    slices = [
      cotangent[:, row // 2 :: half, column // 2 :: half, place]
      for row in range(TILE)
      for column in range(TILE)
      for place in [2 * (row % 2) + column % 2]
    ]
  else:
    slices = [
      cotangent[:, row::TILE, column::TILE]
      for row in range(TILE)
      for column in range(TILE)
    ]
  return (jnp.stack(slices),)


_joined.defvjp(
  lambda tiles, by_windows: (_joined(tiles, by_windows), None), _joined_backward
)


def convolve(images: Array, kernel: Array, *, by_windows: bool) -> Array:
  """Valid cross-correlation at stride 1.

  Args:
    images: [batch, height, width, channels].
    kernel: [size, size, channels, features], size in SIZES.
    by_windows: whether the output is grouped by 2 x 2 pooling windows.

  Returns:
    [batch, height', width', features], height' = height - size + 1; by
    windows [batch, height' // 2, width' // 2, 4, features], odd edges
    dropped.
  """
  size, _, channels, features = kernel.shape
  batch = images.shape[0]
  height, width = (side - size + 1 for side in images.shape[1:3])
  if by_windows:
    height, width = height - height % 2, width - width % 2
  rows, columns = -(-height // TILE), -(-width // TILE)
  # Tiles that reach beyond the images (surplus outputs are dropped below), or
  # an edge that no tile needs.
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
  a, g, _ = bases(size)
  inputs = tiles_in_basis(images, size).reshape(a.shape[1], -1, channels)
  kernels = change(g, kernel.reshape(-1, channels, features))
  tiles = change(a, products(inputs, kernels))
  out = _joined(
    tiles.reshape(TILE * TILE, batch, rows, columns, features), by_windows
  )
  if by_windows:
    height, width = height // 2, width // 2
  return out[:, :height, :width]
