import chex
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import layers
from fljax import winograd

KEY = jax.random.key(0)


@settings(max_examples=6)
@given(
  size=st.sampled_from([1, 3, 5]),
  padding=st.sampled_from([0, 1, 2]),
  side=st.integers(5, 9),
  channels=st.integers(1, 3),
  features=st.integers(1, 4),
)
def test_forms_of_convolution_agree_in_value_and_gradient(
  size, padding, side, channels, features
):
  images = jax.random.normal(KEY, (2, side, side + 1, channels))
  kernel = jax.random.normal(KEY, (size, size, channels, features))

  def value_and_grads(form):
    def loss(images, kernel):
      out = layers.convolve(images, kernel, padding=padding, form=form)
      return jnp.square(out).sum(), out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(grad)(images, kernel)

  chex.assert_trees_all_close(
    value_and_grads("slices"), value_and_grads("lax"), rtol=1e-4, atol=1e-3
  )


@settings(max_examples=6)
@given(
  size=st.sampled_from([1, 3, 5]),
  padding=st.sampled_from([0, 1, 2]),
  height=st.integers(6, 9),
  width=st.integers(6, 9),
  channels=st.integers(1, 3),
  features=st.integers(1, 4),
)
def test_windows_pool_to_the_same_values_and_gradients(
  size, padding, height, width, channels, features
):
  images = jax.random.normal(KEY, (2, height, width, channels))
  kernel = jax.random.normal(KEY, (size, size, channels, features))

  def value_and_grads(conv):
    def loss(images, kernel):
      out = layers.max_pool(conv(images, kernel), form="reshape")
      return jnp.square(out).sum(), out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(grad)(images, kernel)

  def windows(images, kernel):
    return layers.convolve_windows(images, kernel, padding=padding)

  def plain(images, kernel):
    return layers.convolve(images, kernel, padding=padding, form="lax")

  chex.assert_trees_all_close(
    value_and_grads(windows), value_and_grads(plain), rtol=1e-4, atol=1e-3
  )


@settings(max_examples=6)
@given(
  size=st.sampled_from(winograd.SIZES),
  height=st.integers(7, 13),
  width=st.integers(7, 13),
  channels=st.integers(1, 3),
  features=st.integers(1, 4),
  by_windows=st.booleans(),
)
def test_winograd_gives_the_same_values_and_gradients(
  size, height, width, channels, features, by_windows
):
  images = jax.random.normal(KEY, (2, height, width, channels))
  kernel = jax.random.normal(KEY, (size, size, channels, features))

  def value_and_grads(convolve):
    def loss(images, kernel):
      out = convolve(images, kernel)
      return jnp.square(out).sum(), out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(grad)(images, kernel)

  def fast(images, kernel):
    return winograd.convolve(images, kernel, by_windows=by_windows)

  def plain(images, kernel):
    if by_windows:
      return layers.convolve_windows(images, kernel, padding=0)
    return layers.convolve(images, kernel, padding=0, form="slices")

  (value, out), grads = value_and_grads(fast)
  (expected, expected_out), expected_grads = value_and_grads(plain)
  # Its interpolation loses about two of float32's seven digits.
  assert float(value) == pytest.approx(float(expected), rel=1e-3)
  for one, other in zip(
    (out, *grads), (expected_out, *expected_grads), strict=True
  ):
    scale = float(jnp.abs(other).max())
    np.testing.assert_allclose(one, other, atol=1e-4 * scale)


@settings(max_examples=6)
@given(height=st.integers(2, 9), width=st.integers(2, 9))
def test_forms_of_pooling_agree_in_value_and_gradient(height, width):
  images = jax.random.normal(KEY, (2, height, width, 3))

  def value_and_grad(form):
    def loss(images):
      return jnp.square(layers.max_pool(images, form=form)).sum()

    return jax.jit(jax.value_and_grad(loss))(images)

  chex.assert_trees_all_close(
    value_and_grad("reshape"), value_and_grad("lax"), rtol=1e-5
  )


@settings(max_examples=8)
@given(seed=st.integers(0, 99))
def test_equal_maxima_share_the_gradient(seed):
  rng = np.random.default_rng(seed)
  images = jnp.asarray(rng.integers(0, 3, (2, 4, 6, 3)), jnp.float32)
  weights = jax.random.normal(KEY, (2, 2, 3, 3))

  def loss(images, form):
    return (weights * layers.max_pool(images, form=form)).sum()

  def grouped(images):
    windows = images.reshape(2, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    return loss(windows.reshape(2, 2, 3, 4, 3), "reshape")

  windows = np.asarray(images).reshape(2, 2, 2, 3, 2, 3)
  largest = windows == windows.max(axis=(2, 4), keepdims=True)
  share = largest / largest.sum(axis=(2, 4), keepdims=True)
  expected = share * np.asarray(weights)[:, :, None, :, None]
  for found in (
    jax.jit(jax.grad(loss), static_argnums=1)(images, "reshape"),
    jax.jit(jax.grad(grouped))(images),
  ):
    np.testing.assert_allclose(found, expected.reshape(images.shape), rtol=1e-6)


@pytest.mark.parametrize("form", ["slices", "lax"])
def test_convolution_is_the_cross_correlation_written_out(form):
  images = np.asarray(jax.random.normal(KEY, (2, 6, 5, 2)))
  kernel = np.asarray(jax.random.normal(KEY, (3, 3, 2, 4)))
  expected = np.zeros((2, 4, 3, 4))
  for row in range(4):
    for column in range(3):
      window = images[:, row : row + 3, column : column + 3]
      expected[:, row, column] = np.einsum("bhwc,hwcf->bf", window, kernel)
  conv = jax.jit(layers.convolve, static_argnames=("padding", "form"))
  actual = conv(jnp.asarray(images), jnp.asarray(kernel), padding=0, form=form)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_convolution_maps_over_clients_kernels():
  images = jax.random.normal(KEY, (3, 2, 6, 6, 2))
  kernels = jax.random.normal(KEY, (3, 3, 3, 2, 4))

  @jax.jit
  def conv(images, kernel):
    return layers.convolve(images, kernel, padding=1, form="slices")

  mapped = jax.jit(jax.vmap(conv))(images, kernels)
  for client in range(3):
    np.testing.assert_allclose(
      mapped[client], conv(images[client], kernels[client]), rtol=1e-5
    )


def test_uniform_initialisation_is_bounded_by_the_fan_in():
  kernel = layers.uniform_fan_in(KEY, (5, 5, 20, 50))
  bound = 1 / np.sqrt(500)
  assert float(jnp.abs(kernel).max()) <= bound
  assert float(kernel.std()) == pytest.approx(bound / np.sqrt(3), rel=0.02)
