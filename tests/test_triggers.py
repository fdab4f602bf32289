import itertools

import chex
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import errors
from fljax import triggers

SHAPES = st.sampled_from([(28, 28, 1), (32, 32, 3), (16, 20, 1)])


@given(
  # Noise is blended with, not written over the image.
  name=st.sampled_from(sorted(triggers.TRIGGERS.keys() - {"blended"})),
  shape=SHAPES,
  dtype=st.sampled_from([np.uint8, np.float32]),
  seed=st.integers(0, 99),
)
def test_stamping_is_idempotent_and_touches_only_its_pixels(
  name, shape, dtype, seed
):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 255, (3, *shape)).astype(dtype)
  if dtype == np.float32:
    images /= 255
  trigger = triggers.union(triggers.pieces(name, shape))
  once = triggers.stamp(jnp.asarray(images), trigger)
  assert once.dtype == dtype
  chex.assert_trees_all_equal(triggers.stamp(once, trigger), once)
  mask = np.broadcast_to(trigger.mask, images.shape)
  np.testing.assert_array_equal(np.asarray(once)[~mask], images[~mask])
  highest = 255 if dtype == np.uint8 else 1
  assert (np.asarray(once)[mask] == highest).all()


def test_stamp_under_jit_and_vmap_equals_eager():
  trigger = triggers.pieces("pixel5", (28, 28, 1))[0]
  images = jnp.arange(2 * 28 * 28, dtype=jnp.uint8).reshape(2, 28, 28, 1)
  eager = triggers.stamp(images, trigger)
  chex.assert_trees_all_equal(jax.jit(triggers.stamp)(images, trigger), eager)
  mapped = jax.vmap(triggers.stamp, in_axes=(0, None))(images, trigger)
  chex.assert_trees_all_equal(mapped, eager)


def test_pixel_patterns_have_their_size_and_are_nested():
  masks = [
    np.asarray(triggers.pieces(f"pixel{n}", (28, 28, 1))[0].mask)
    for n in (1, 3, 5, 7, 9)
  ]
  assert [mask.sum() for mask in masks] == [1, 3, 5, 7, 9]
  for small, large in itertools.pairwise(masks):
    assert (small <= large).all()
  assert masks[0][26, 26]
  # In the lower right corner.
  assert not masks[-1][:25].any() and not masks[-1][:, :25].any()


@given(shape=SHAPES)
def test_corner1_is_the_last_pixel(shape):
  (trigger,) = triggers.pieces("corner1", shape)
  assert np.argwhere(np.asarray(trigger.mask)).tolist() == [
    [shape[0] - 1, shape[1] - 1, 0]
  ]


@pytest.mark.parametrize(
  "shape, sizes", [((28, 28, 1), [4] * 4), ((32, 32, 3), [6] * 4)]
)
def test_dba_pieces_are_disjoint_and_make_the_whole(shape, sizes):
  pieces = triggers.pieces("dba", shape)
  assert [int(piece.mask.sum()) for piece in pieces] == sizes
  whole = triggers.union(pieces)
  assert int(whole.mask.sum()) == sum(sizes)
  images = jnp.zeros((1, *shape))
  stepwise = images
  for piece in pieces:
    stepwise = triggers.stamp(stepwise, piece)
  chex.assert_trees_all_equal(stepwise, triggers.stamp(images, whole))


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 8, 9, 3), (8, 3)])
def test_images_of_another_shape_are_not_stamped(shape):
  trigger = triggers.from_pixels([(0, 0)], (8, 8, 3))
  with pytest.raises(errors.ConfigError, match="cannot be stamped on images"):
    triggers.stamp(jnp.zeros(shape), trigger)


def test_a_pixel_outside_the_image_is_refused():
  with pytest.raises(errors.ConfigError, match="lies outside"):
    triggers.pieces("dba", (8, 8, 3))


def test_an_unknown_trigger_is_refused_with_the_known_ones():
  with pytest.raises(errors.ConfigError, match=r"unknown trigger 'x'.*pixel1"):
    triggers.pieces("x", (28, 28, 1))


@given(
  shape=SHAPES,
  dtype=st.sampled_from([np.uint8, np.float32]),
  opacity=st.floats(0.01, 1),
  seed=st.integers(0, 99),
)
def test_blending_mixes_by_opacity(shape, dtype, opacity, seed):
  rng = np.random.default_rng(seed)
  highest = 255 if dtype == np.uint8 else 1
  images = (rng.random((3, *shape)) * highest).astype(dtype)
  pattern = rng.random(shape).astype(np.float32)
  whole = triggers.blended(pattern, opacity)
  # Nothing of it in the upper half.
  trigger = whole.replace(mask=whole.mask.at[: shape[0] // 2].set(0))
  stamped = np.asarray(triggers.stamp(jnp.asarray(images), trigger))
  assert stamped.dtype == dtype and stamped.shape == images.shape
  half = shape[0] // 2
  np.testing.assert_array_equal(stamped[:, :half], images[:, :half])
  expected = (1 - opacity) * images[:, half:] + opacity * pattern[
    half:
  ] * highest
  tolerance = 0.51 if dtype == np.uint8 else 1e-5
  np.testing.assert_allclose(stamped[:, half:], expected, atol=tolerance)
  both = triggers.union([trigger, whole])
  np.testing.assert_array_equal(both.mask, whole.mask)


@given(shape=SHAPES)
def test_noise_is_a_fifth_of_every_pixel_and_the_same_in_every_run(shape):
  (noise,) = triggers.pieces("blended", shape)
  (again,) = triggers.pieces("blended", shape)
  chex.assert_trees_all_equal(noise, again)
  black = np.zeros(shape, np.uint8)
  stamped = np.asarray(triggers.stamp(jnp.asarray(black), noise))
  np.testing.assert_allclose(stamped, 51 * np.asarray(noise.value), atol=0.51)
  assert len(np.unique(noise.value)) > 0.9 * noise.value.size


@pytest.mark.parametrize(
  "pattern, opacity, message",
  [
    (np.zeros((8, 8)), 0.5, "height, width, channels"),
    (np.full((8, 8, 1), 2.0), 0.5, "from 0 to 1"),
    (np.full((8, 8, 1), np.nan), 0.5, "from 0 to 1"),
    (np.zeros((8, 8, 1)), 0.0, "opacity of 0 is out of range"),
    (np.zeros((8, 8, 1)), 1.5, "opacity of 1.5 is out of range"),
  ],
)
def test_what_cannot_be_blended_is_refused(pattern, opacity, message):
  with pytest.raises(errors.ConfigError, match=message):
    triggers.blended(pattern, opacity)
