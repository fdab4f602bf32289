import gzip
import hashlib
import io
import pathlib
import subprocess
import sys
import types

from absl import logging as absl_logging
import chex
import numpy as np
import PIL.Image
import pytest

from fljax import data
from fljax import errors
from fljax import evaluate
from fljax import federation
from fljax import partition


@pytest.fixture(autouse=True)
def no_users_folders(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "debian")


def _write_idx(folder, train=12, test=6, side=4):
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  arrays = {}
  for key, file_name in data._IDX_FILES.items():
    count = train if key.startswith("train") else test
    shape = (count, side, side) if key.endswith("images") else (count,)
    array = rng.integers(0, 10, shape, np.uint8)
    header = bytes([0, 0, 8, array.ndim])
    header += b"".join(int(n).to_bytes(4, "big") for n in shape)
    with gzip.open(folder / file_name, "wb") as stream:
      stream.write(header + array.tobytes())
    arrays[key] = array
  return arrays


def test_mnist_is_bundled_and_whole():
  mnist = data.load("mnist")
  assert mnist.train_images.shape == (60000, 28, 28, 1)
  assert mnist.test_images.shape == (10000, 28, 28, 1)
  assert mnist.train_images.dtype == np.uint8
  assert mnist.train_labels.dtype == np.int32
  np.testing.assert_array_equal(
    np.bincount(mnist.test_labels),
    [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
  )
  scaled = mnist.train_images / 255
  assert scaled.mean() == pytest.approx(mnist.mean[0], abs=1e-4)
  assert scaled.std() == pytest.approx(mnist.std[0], abs=1e-4)
  assert hashlib.sha256(
    b"\0\0\x08\x03\0\0\xea\x60\0\0\0\x1c\0\0\0\x1c"
    + mnist.train_images.tobytes()
  ).hexdigest() == (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
  )


def test_idx_files_are_read_from_a_folder(tmp_path):
  arrays = _write_idx(tmp_path / "own")
  for name in ("mnist", "fashion_mnist"):
    loaded = data.load(name, str(tmp_path / "own"))
    np.testing.assert_array_equal(
      loaded.train_images[..., 0], arrays["train_images"]
    )
    np.testing.assert_array_equal(loaded.test_labels, arrays["test_labels"])


def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path):
  arrays = _write_idx(tmp_path / "debian")
  loaded = data.load("fashion_mnist")
  np.testing.assert_array_equal(
    loaded.test_images[..., 0], arrays["test_images"]
  )


def _prepare_tfds(root, version="3.0.2", shape=(4, 4, 3)):
  """Writes what TFDS leaves when it prepares ArrayRecord files."""
  import tensorflow_datasets as tfds

  rng = np.random.default_rng(0)
  arrays = {
    split: rng.integers(0, 255, (count, *shape), np.uint8)
    for split, count in (("train", 9), ("test", 5))
  }

  class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    # TFDS looks for a package around a builder's module.
    __module__ = "fljax.data"
    VERSION = tfds.core.Version(version)

    def _info(self):
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(
          {
            "image": tfds.features.Image(shape=shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
          }
        )
      )

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in arrays}

    def _generate_examples(self, split):
      for index, image in enumerate(arrays[split]):
        # Without TensorFlow, TFDS takes images that are encoded already.
        encoded = io.BytesIO()
        PIL.Image.fromarray(image).save(encoded, format="png")
        encoded.seek(0)
        yield index, {"image": encoded, "label": index % 10}

  builder = Cifar10(data_dir=str(root), file_format="array_record")
  builder.download_and_prepare()
  return arrays


def test_without_tensorflow_nothing_imports_it():
  code = (
    "import sys, fljax.experiment, fljax.data as d; d.load('mnist');"
    "heavy = [m for m in ('tensorflow', 'tensorflow_datasets', 'matplotlib',"
    " 'orbax') if m in sys.modules]; assert not heavy, heavy"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_what_cannot_be_found_says_where_and_what_to_do(tmp_path):
  with pytest.raises(errors.DataError, match=r"tfds.*--data_dir"):
    data.load("cifar10")
  with pytest.raises(errors.DataError, match=r"debian.*dataset-fashion-mnist"):
    data.load("fashion_mnist")
  with pytest.raises(errors.DataError, match=r"nowhere.*leave out --data_dir"):
    data.load("mnist", str(tmp_path / "nowhere"))
  with pytest.raises(errors.DataError, match=r"unknown data set 'svhn'"):
    data.load("svhn")


def _flipped(raw, position):
  flipped = bytes([raw[position] ^ 255])
  return raw[:position] + flipped + raw[position + 1 :]


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty", "gone"])
def test_a_damaged_idx_file_is_named(tmp_path, damage):
  _write_idx(tmp_path)
  path = tmp_path / "t10k-images-idx3-ubyte.gz"
  raw = path.read_bytes()
  if damage == "cut":
    path.write_bytes(raw[: len(raw) // 2])
  elif damage == "flip":
    middle = len(raw) // 2
    path.write_bytes(_flipped(raw, middle))
  elif damage == "header":
    path.write_bytes(gzip.compress(b"not idx at all"))
  elif damage == "empty":
    path.write_bytes(gzip.compress(gzip.decompress(raw)[:-3]))
  else:
    path.unlink()
  with pytest.raises(errors.DataError, match=path.name):
    data.load("mnist", str(tmp_path))


# --- a user's own data -------------------------------------------------------


def _own(count=12, **changes):
  rng = np.random.default_rng(0)
  return {
    "images": rng.integers(0, 255, (count, 5, 6), np.uint8),
    "labels": np.arange(count) % 3,
    **changes,
  }


def _load(tmp_path, arrays):
  path = tmp_path / "own.npz"
  np.savez(path, **arrays)
  return data.load(str(path))


def test_an_npz_of_images_and_labels_is_split(tmp_path):
  arrays = _own()
  loaded = _load(tmp_path, arrays)
  assert loaded.name == "own" and loaded.num_classes == 3
  assert loaded.train_images.shape == (10, 5, 6, 1)
  assert loaded.test_images.shape == (2, 5, 6, 1)
  images = np.concatenate([loaded.train_images, loaded.test_images])[..., 0]
  labels = np.concatenate([loaded.train_labels, loaded.test_labels])
  pairs = zip(images, labels, strict=True)
  expected = zip(arrays["images"], arrays["labels"], strict=True)
  key = lambda pair: pair[0].tobytes()  # noqa: E731
  for one, two in zip(
    sorted(pairs, key=key), sorted(expected, key=key), strict=True
  ):
    np.testing.assert_array_equal(one[0], two[0])
    assert one[1] == two[1]
  again = _load(tmp_path, arrays)
  np.testing.assert_array_equal(again.test_images, loaded.test_images)


@pytest.mark.parametrize(
  "names",
  [
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
  ],
)
def test_an_npz_with_a_test_split_keeps_it(tmp_path, names):
  one, two = _own(12), _own(4)
  parts = (one["images"], one["labels"], two["images"], two["labels"])
  loaded = _load(tmp_path, dict(zip(names, parts, strict=True)))
  assert loaded.train_images.shape == (12, 5, 6, 1)
  np.testing.assert_array_equal(loaded.test_images[..., 0], two["images"])


def test_images_in_the_unit_interval_become_256_levels(tmp_path):
  levels = (np.arange(12 * 30).reshape(12, 5, 6) % 256).astype(np.uint8)
  loaded = _load(tmp_path, _own(images=levels / 255))
  expected = _load(tmp_path, _own(images=levels))
  np.testing.assert_array_equal(loaded.test_images, expected.test_images)
  np.testing.assert_array_equal(loaded.train_images, expected.train_images)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"images": np.zeros((12, 5))}, "has shape"),
    ({"labels": np.zeros(11, int)}, "need as many labels"),
    ({"labels": np.zeros(12)}, "must be integers"),
    ({"labels": np.full(12, -1)}, "must be integers from 0"),
    ({"labels": 1 + np.arange(12) % 3}, "label 0 has no training image"),
    # Not looked for among all numbers up to the highest.
    ({"labels": np.arange(12) + 4 * 10**9}, "label 0 has no training image"),
    ({"labels": np.arange(12) // 6 * 2}, "label 1 has no training image"),
    ({"images": np.zeros((5, 5, 6)), "labels": np.arange(5)}, "are too few"),
    ({"images": np.zeros((12, 0, 6))}, "has shape"),
    ({"images": np.full((12, 5, 6), 7.0)}, "must be uint8"),
    ({"images": np.full((12, 5, 6), np.nan)}, "must be uint8"),
  ],
)
def test_what_is_no_data_set_is_refused(tmp_path, changes, message):
  with pytest.raises(errors.DataError, match=f"own.npz.*{message}"):
    _load(tmp_path, _own(**changes))


@pytest.mark.parametrize(
  "images, labels, message",
  [
    (np.full((2, 3, 3, 1), 255.0), np.arange(2), "from 255 to 255"),
    (np.full((2, 3, 3, 1), np.nan), np.arange(2), "must be in"),
    (np.zeros((2, 3, 3, 1)), np.asarray([1, -1]), "label -1 is none"),
  ],
)
def test_what_would_mean_something_else_is_refused(images, labels, message):
  everything = partition.iid(
    np.arange(2),
    num_clients=1,
    samples_per_client=2,
    rng=np.random.default_rng(0),
  )
  with pytest.raises(errors.DataError, match=message):
    federation.create(images, labels, everything)
  with pytest.raises(errors.DataError, match=message):
    evaluate.batched(images, labels)
  evaluate.batched(np.clip(np.nan_to_num(images), 0, 1), np.abs(labels))


def test_other_npz_files_are_refused(tmp_path):
  with pytest.raises(errors.DataError, match="holds a, b: it needs"):
    _load(tmp_path, {"a": np.zeros(1), "b": np.zeros(1)})
  with pytest.raises(errors.DataError, match="does not exist"):
    data.load(str(tmp_path / "none.npz"))


def test_an_array_that_is_no_archive_is_refused(tmp_path):
  np.save(tmp_path / "own.npy", np.zeros(3))
  (tmp_path / "own.npy").rename(tmp_path / "own.npz")
  with pytest.raises(errors.DataError, match="damaged or is no"):
    data.load(str(tmp_path / "own.npz"))


def test_idx_files_of_more_than_ten_classes_are_refused(tmp_path):
  arrays = _write_idx(tmp_path)
  labels = arrays["test_labels"].copy()
  labels[3] = 46
  with gzip.open(tmp_path / data._IDX_FILES["test_labels"], "wb") as stream:
    stream.write(b"\0\0\x08\x01" + bytes([0, 0, 0, 6]) + labels.tobytes())
  with pytest.raises(errors.DataError, match="test labels go to 46"):
    data.load("mnist", str(tmp_path))


def test_other_writers_digits_are_bundled_and_whole():
  there = data.labelled("optdigits")
  chex.assert_shape(there.images, (1797, 28, 28, 1))
  assert there.images.dtype == np.uint8 and there.labels.dtype == np.int32
  counts = np.bincount(there.labels)
  assert len(counts) == 10 and counts.min() >= 174 and counts.max() <= 183
  inside = there.images[:, 4:24, 4:24, 0]
  assert inside.sum(dtype=int) == there.images.sum(dtype=int)
  # As large as MNIST's, and the same digits as in the file.
  with gzip.open(data._BUNDLED_OPTDIGITS, "rt") as stream:
    rows = np.loadtxt(stream, delimiter=",")
  nearest = (20 * np.arange(8) + 10) // 8
  shrunk = inside[:, nearest][:, :, nearest].reshape(1797, 64)
  assert np.corrcoef(shrunk.ravel(), rows[:, :64].ravel())[0, 1] > 0.95
  np.testing.assert_array_equal(there.labels, rows[:, 64])


def test_the_digest_knows_the_order_of_images():
  images, labels = (
    np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1),
    np.arange(2),
  )
  one = data.Dataset("x", images, labels, images, labels, 2, (0,), (1,))
  two = one._replace(train_images=images[::-1])
  assert data.digest(one) == data.digest(one._replace(name="y"))
  assert data.digest(one) != data.digest(two)


def test_pickles_are_never_loaded(tmp_path):
  class Bomb:
    def __reduce__(self):
      return (pytest.fail, ("code was run",))

  with pytest.raises(errors.DataError, match="damaged or is no"):
    _load(tmp_path, _own(images=np.asarray([Bomb()] * 12, object)))


def test_a_damaged_npz_is_named(tmp_path):
  path = tmp_path / "own.npz"
  np.savez(path, **_own())
  raw = path.read_bytes()
  path.write_bytes(_flipped(raw, 200))
  with pytest.raises(errors.DataError, match=r"own\.npz is damaged"):
    data.load(str(path))


# --- TensorFlow Datasets -----------------------------------------------------


def test_a_prepared_directory_is_decoded_once(tmp_path, monkeypatch):
  arrays = _prepare_tfds(tmp_path / "tfds")
  loaded = data.load("cifar10")
  # TFDS shuffles when it prepares, and keeps each image with its label.
  for split, images in (
    ("train", loaded.train_images),
    ("test", loaded.test_images),
  ):
    expected = sorted(image.tobytes() for image in arrays[split])
    assert sorted(image.tobytes() for image in images) == expected
  for image, label in zip(
    loaded.train_images, loaded.train_labels, strict=True
  ):
    np.testing.assert_array_equal(image, arrays["train"][label])

  def fail(*_):
    raise AssertionError("decoded again")

  monkeypatch.setattr(data, "_decode", fail)
  again = data.load("cifar10")
  np.testing.assert_array_equal(again.train_images, loaded.train_images)
  # Another copy, or a newer one, is not the one in the cache.
  next((tmp_path / "tfds/cifar10/3.0.2").glob("*train*")).touch()
  with pytest.raises(AssertionError, match="decoded again"):
    data.load("cifar10")


def test_a_damaged_cache_is_made_anew(tmp_path):
  _prepare_tfds(tmp_path / "tfds")
  loaded = data.load("cifar10")
  (cached,) = (tmp_path / "cache/fljax/data").iterdir()
  whole = cached.read_bytes()
  cached.write_bytes(whole[:-50])
  again = data.load("cifar10")
  np.testing.assert_array_equal(again.train_images, loaded.train_images)
  assert cached.read_bytes() == whole


def test_what_tfds_says_is_passed_on_but_for_its_advice(caplog, monkeypatch):
  from tensorflow_datasets.core import read_only_builder

  def read():
    absl_logging.warning("OpenCV is not installed. We recommend using it.")
    absl_logging.warning("something else")
    yield {"image": np.zeros((4, 4, 3)), "label": 0}

  monkeypatch.setattr(
    read_only_builder,
    "builder_from_directory",
    lambda _: types.SimpleNamespace(as_data_source=lambda _: read()),
  )
  data._decode("cifar10", pathlib.Path("cifar10"))
  assert caplog.messages == ["something else"] * 2


def test_a_damaged_prepared_directory_is_named(tmp_path):
  _prepare_tfds(tmp_path / "tfds")
  (path,) = (tmp_path / "tfds/cifar10/3.0.2").glob("*train*")
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(errors.DataError, match=r"3\.0\.2 is damaged"):
    data.load("cifar10")
