"""Named data sets as arrays; the only module that knows TensorFlow Datasets.

MNIST ships with the package, and so do digits for a server that has none of its
clients' distribution (`labelled`). Fashion-MNIST and CIFAR-10 are read from a
prepared TensorFlow Datasets directory (ArrayRecord files, which need no
TensorFlow) or from IDX files, and a user's own data set from an `.npz` file.
What takes long to decode is decoded once and kept as arrays in the user's
cache folder.

Nothing here unpickles: arrays are loaded with `allow_pickle=False`.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import gzip
import hashlib
import logging
import os
from pathlib import Path
import struct
from typing import Literal
from typing import NamedTuple
import zipfile
import zlib

import numpy as np

from fljax import errors

BUNDLED_MNIST = Path(__file__).parent / "mnist"
# A name of `labelled`, and its file.
OPTDIGITS = "optdigits"
_BUNDLED_OPTDIGITS = Path(__file__).parent / OPTDIGITS / f"{OPTDIGITS}.csv.gz"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# Channel means and standard deviations of the training images in [0, 1].
_STATISTICS = {
  "mnist": ((0.1307,), (0.3081,)),
  "fashion_mnist": ((0.2860,), (0.3530,)),
  "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
NAMES = tuple(_STATISTICS)

_IDX_FILES = {
  "train_images": "train-images-idx3-ubyte.gz",
  "train_labels": "train-labels-idx1-ubyte.gz",
  "test_images": "t10k-images-idx3-ubyte.gz",
  "test_labels": "t10k-labels-idx1-ubyte.gz",
}


class Labelled(NamedTuple):
  """Labelled images.

  Attributes:
    images: uint8 [n, height, width, channels].
    labels: int32 [n].
  """

  images: np.ndarray
  labels: np.ndarray


class Dataset(NamedTuple):
  """Labelled images, split into training and test.

  Attributes:
    name: what the data set is called in reports.
    train_images: uint8 [train, height, width, channels].
    train_labels: int32 [train].
    test_images: uint8 [test, height, width, channels].
    test_labels: int32 [test].
    num_classes: labels are 0, ..., num_classes - 1.
    mean: per channel, of the training images scaled to [0, 1].
    std: per channel, likewise.
  """

  name: str
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  num_classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]


def load(
  name: str, data_dir: str | None = None, *, download: bool = False
) -> Dataset:
  """Loads a data set.

  Args:
    name: one of `NAMES`, or the path of an `.npz` file (see `from_npz`).
    data_dir: a TensorFlow Datasets directory, or a directory with the four
      IDX files. `None` looks where TensorFlow Datasets would
      (`TFDS_DATA_DIR`, else `~/tensorflow_datasets`); MNIST then needs no
      look at all, because it is bundled.
    download: whether a missing data set may be downloaded and prepared by
      TensorFlow Datasets.

  Returns:
    The data set.

  Raises:
    errors.DataError: it cannot be found, read, or is damaged; the message
      says where it was looked for and what to do.
  """
  if name.endswith(".npz"):
    return from_npz(Path(name).expanduser())
  if name not in _STATISTICS:
    raise errors.DataError(
      f"unknown data set {name!r}: choose one of {', '.join(NAMES)}, or"
      " give the path of an .npz file."
    )
  if name == "mnist" and data_dir is None:
    return _named(name, _read_idx(BUNDLED_MNIST))

  root = Path(data_dir or _default_data_dir()).expanduser()
  looked = [root / name]
  prepared = _find_prepared(root, name)
  if prepared is None and download:
    prepared = _download(root, name)
  if prepared is not None:
    return _named(name, _cached(name, prepared))
  folders = [root] if name != "cifar10" and data_dir is not None else []
  looked += folders
  if name == "fashion_mnist":
    folders.append(DEBIAN_FASHION_MNIST)
    looked.append(DEBIAN_FASHION_MNIST)
  for folder in folders:
    if (folder / _IDX_FILES["train_images"]).is_file():
      return _named(name, _read_idx(folder))
  raise errors.DataError(
    f"{name} was not found in {', '.join(str(p) for p in looked)}:"
    f" {_HOW_TO_GET[name]}"
  )


_HOW_TO_GET = {
  "mnist": (
    "leave out --data_dir to use the bundled copy, or point it at a"
    " prepared TensorFlow Datasets directory or at the four IDX files."
  ),
  "fashion_mnist": (
    "install Debian's package dataset-fashion-mnist, or point --data_dir"
    " at a prepared TensorFlow Datasets directory or at the four IDX"
    " files."
  ),
  "cifar10": (
    "point --data_dir at a TensorFlow Datasets directory prepared with"
    " file_format='array_record', or allow a download with --download."
  ),
}


def _named(name: str, arrays: dict[str, np.ndarray]) -> Dataset:
  mean, std = _STATISTICS[name]
  return Dataset(name=name, num_classes=10, mean=mean, std=std, **arrays)


def _default_data_dir() -> str:
  return os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")


def digest(of: Dataset | Labelled) -> str:
  """SHA-256 over images and labels, in their order.

  Another copy of a data set may hold the same images in another order, and
  then gives clients other ones.
  """
  sha256 = hashlib.sha256()
  for array in of:
    if not isinstance(array, np.ndarray):
      continue
    sha256.update(f"{array.dtype} {array.shape}".encode())
    sha256.update(np.ascontiguousarray(array).data)
  return sha256.hexdigest()


def require_usable(images: np.ndarray, labels: np.ndarray) -> None:
  """Refuses what would be computed with, and mean something else.

  Args:
    images: any number of them, of whatever type.
    labels: theirs.

  Raises:
    errors.DataError: images are not [n, height, width, channels]; labels are
      not n integers from 0, of which a negative one would be a last one;
      integer images are not in 0..255 or floating point ones not in [0, 1], to
      which they would be limited.
  """
  images, labels = np.asarray(images), np.asarray(labels)
  if images.ndim != 4:
    raise errors.DataError(
      "images must be [n, height, width, channels]; these are"
      f" {list(images.shape)}."
    )
  if labels.shape != images.shape[:1] or not (
    np.issubdtype(labels.dtype, np.integer) or not labels.size
  ):
    raise errors.DataError(
      f"labels of {len(images)} images must be as many integers; these are"
      f" {labels.dtype} {list(labels.shape)}."
    )
  if labels.size and labels.min() < 0:
    raise errors.DataError(f"label {labels.min()} is none: they are from 0.")
  if not images.size or images.dtype in (np.uint8, np.bool_):
    return
  # Of types that are not NumPy's own, bfloat16 is one.
  integers = np.issubdtype(images.dtype, np.integer)
  low, high = float(images.min()), float(images.max())
  if not (low >= 0 and high <= (255 if integers else 1)):
    raise errors.DataError(
      f"{'integer' if integers else 'floating point'} images must be in"
      f" {'0..255' if integers else '[0, 1]'}; these are from {low:g} to"
      f" {high:g}."
    )


def cache_dir() -> Path:
  """The folder for what fljax can compute again: decoded data, programs."""
  root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return Path(root).expanduser() / "fljax"


# --- IDX files ---------------------------------------------------------------


def _read_idx(folder: Path) -> dict[str, np.ndarray]:
  arrays = {}
  for key, file_name in _IDX_FILES.items():
    arrays[key] = read_idx_file(folder / file_name)
  for split in ("train", "test"):
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if images.ndim != 3 or labels.shape != images.shape[:1]:
      raise errors.DataError(
        f"{folder}: the {split} images {images.shape} and labels"
        f" {labels.shape} do not belong together."
      )
    if labels.size and labels.max() > 9:
      raise errors.DataError(
        f"{folder}: the {split} labels go to {labels.max()}; this is no data"
        " set of ten classes (an .npz file may have any number)."
      )
    arrays[f"{split}_images"] = images[..., np.newaxis]
    arrays[f"{split}_labels"] = labels.astype(np.int32)
  return arrays


def read_idx_file(path: Path) -> np.ndarray:
  """Reads one gzip-compressed IDX file of unsigned bytes.

  Args:
    path: the file.

  Returns:
    uint8, of the shape that the file's header gives.

  Raises:
    errors.DataError: the file is missing or damaged.

  References:
    The IDX format, described on the MNIST database's page (LeCun, Cortes).
  """
  try:
    with gzip.open(path, "rb") as stream:
      raw = stream.read()
  except FileNotFoundError as error:
    raise errors.DataError(f"{path} is missing.") from error
  except (OSError, EOFError, zlib.error) as error:
    raise errors.DataError(
      f"{path} is damaged and cannot be unpacked ({error})."
    ) from error
  # Two zero bytes, the element type (8: unsigned byte), the number of axes.
  if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
    raise errors.DataError(f"{path} is damaged: it has no IDX header.")
  shape = tuple(
    int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big")
    for axis in range(raw[3])
  )
  body = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
  if body.size != np.prod(shape):
    raise errors.DataError(
      f"{path} is damaged: its header promises {np.prod(shape)} values and"
      f" it holds {body.size}."
    )
  return body.reshape(shape)


# --- TensorFlow Datasets -----------------------------------------------------


def _find_prepared(root: Path, name: str) -> Path | None:
  """The newest prepared version of a data set under a TFDS directory."""
  versions = [
    info.parent
    for info in (root / name).glob("*/dataset_info.json")
    if info.parent.name.replace(".", "").isdigit()
  ]
  if not versions:
    return None
  return max(
    versions, key=lambda v: tuple(int(part) for part in v.name.split("."))
  )


def _decode(name: str, prepared: Path) -> dict[str, np.ndarray]:
  """Decodes both splits of a prepared TFDS directory, image by image."""
  # Heavy, and needed by nobody else: imported where it is used.
  from tensorflow_datasets.core import read_only_builder

  arrays = {}
  try:
    builder = read_only_builder.builder_from_directory(str(prepared))
    for split in ("train", "test"):
      source = builder.as_data_source(split)
      images, labels = [], []
      with _without_advice():
        for example in source:
          images.append(np.asarray(example["image"], np.uint8))
          labels.append(int(example["label"]))
      arrays[f"{split}_images"] = np.stack(images)
      arrays[f"{split}_labels"] = np.asarray(labels, np.int32)
  except ImportError as error:
    raise errors.DataError(
      f"{prepared} cannot be read without the module {error.name!r}."
    ) from error
  except Exception as error:  # TFDS raises whatever its readers raise.
    raise errors.DataError(
      f"{prepared} is damaged or was not prepared with"
      f" file_format='array_record' ({type(error).__name__}:"
      f" {errors.first_line(error)})."
    ) from error
  if not len(arrays["train_images"]) or not len(arrays["test_images"]):
    raise errors.DataError(f"{prepared} holds no {name} images.")
  return arrays


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
  """Lets TFDS not advise to install OpenCV: images are decoded only once."""

  def keep(record: logging.LogRecord) -> bool:
    return "OpenCV is not installed" not in record.getMessage()

  logger = logging.getLogger("absl")
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def _download(root: Path, name: str) -> Path:
  """Lets TensorFlow Datasets download and prepare a data set."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
    # MNIST and Fashion-MNIST name their files alike, and TFDS keys its
    # extraction cache by file name: one download folder for both would turn
    # the second into the first.
    builder.download_and_prepare(download_dir=str(root / "downloads" / name))
  except Exception as error:
    raise errors.DataError(
      f"{name} could not be downloaded and prepared in {root}"
      f" ({type(error).__name__}: {errors.first_line(error)})."
    ) from error
  prepared = _find_prepared(root, name)
  if prepared is None:
    raise errors.DataError(f"{name} was prepared, but not found in {root}.")
  return prepared


def _cached(name: str, prepared: Path) -> dict[str, np.ndarray]:
  """Decodes a prepared directory once; later calls read the arrays."""
  fingerprint = hashlib.sha256()
  for path in sorted(prepared.iterdir()):
    status = path.stat()
    fingerprint.update(
      f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode()
    )
  path = cache_dir() / "data" / f"{name}-{fingerprint.hexdigest()[:16]}.npz"
  if path.is_file():
    # A damaged one is made anew: it is nobody's but ours.
    with contextlib.suppress(errors.DataError):
      return _load_npz(path)
  arrays = _decode(name, prepared)
  # A cache that cannot be written costs time, not correctness.
  with contextlib.suppress(OSError):
    _save_npz(path, arrays)
  return arrays


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    with open(partial, "wb") as stream:
      np.savez(stream, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
  """Turns what NumPy raises over a bad `.npz` into one sentence."""
  try:
    yield
  except FileNotFoundError as error:
    raise errors.DataError(f"{path} does not exist.") from error
  except (
    *(OSError, ValueError, EOFError, TypeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
  ) as e:
    raise errors.DataError(
      f"{path} is damaged or is no .npz file of plain arrays"
      f" ({errors.first_line(e)})."
    ) from e


def _load_npz(path: Path) -> dict[str, np.ndarray]:
  """Arrays of an .npz file; memory-mapped where it holds them uncompressed."""
  with _naming(path), zipfile.ZipFile(path) as archive:
    arrays = {}
    for member in archive.infolist():
      key = member.filename.removesuffix(".npy")
      with archive.open(member) as stream:
        # A mapped array's bytes are not looked at again: read them once, which
        # compares them with their checksum.
        while stream.read(1 << 24):
          pass
      arrays[key] = _map_member(path, archive, member)
    return arrays


def _map_member(
  path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> np.ndarray:
  with archive.open(member) as stream:
    version = np.lib.format.read_magic(stream)
    read_header = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
      raise ValueError(f"{member.filename} is of an unknown format")
    shape, fortran, dtype = read_header(stream)
    header = stream.tell()
    if dtype.hasobject:
      raise ValueError(f"{member.filename} holds Python objects")
    if member.compress_type != zipfile.ZIP_STORED or not np.prod(shape):
      stream.seek(0)
      return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
  with open(path, "rb") as file:
    # A member begins after its local header, of fixed part, name and extra.
    file.seek(member.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
  start = member.header_offset + 30 + name + extra + header
  order: Literal["C", "F"] = "F" if fortran else "C"
  return np.memmap(path, dtype, "r", start, shape, order)


# --- a user's own data -------------------------------------------------------

_OWN_KEYS = (
  ("train_images", "train_labels", "test_images", "test_labels"),
  ("x_train", "y_train", "x_test", "y_test"),
  ("images", "labels"),
)


# Of which one becomes a test image, where a file has no test split.
_SIXTH = 6


def from_npz(path: Path) -> Dataset:
  """Reads a user's own data set.

  The file holds one of these sets of arrays:

  | images and labels | test split |
  | --- | --- |
  | `train_images train_labels test_images test_labels` | as given |
  | `x_train y_train x_test y_test` | as given |
  | `images labels` | a sixth of the images, chosen at random once for all |

  Images are [n, height, width] or [n, height, width, channels], uint8 in
  0..255 or floating point in [0, 1] (rounded to 256 levels); labels are
  integers [n] from 0.

  Args:
    path: the file.

  Returns:
    The data set, named after the file.

  Raises:
    errors.DataError: the file is missing, damaged, or holds something else.
  """
  keys, parts = _own_arrays(path)
  if len(parts) == 2:
    images, labels = parts
    _check_pair(path, keys[0], images, labels)
    if len(images) < _SIXTH:
      raise errors.DataError(
        f"{path}: {len(images)} images are too few, as one in {_SIXTH} becomes"
        " a test image."
      )
    # The same split whatever the seed of a run, and blind to any pattern in
    # the order of the images.
    test = np.zeros(len(images), bool)
    chosen = np.random.default_rng(0).permutation(len(images))
    test[chosen[: len(images) // _SIXTH]] = True
    parts = [images[~test], labels[~test], images[test], labels[test]]
  names = keys if len(keys) == 4 else (keys * 2)
  for image_key, images, labels in (
    (names[0], parts[0], parts[1]),
    (names[2], parts[2], parts[3]),
  ):
    _check_pair(path, image_key, images, labels)
  train_images, test_images = (
    _as_uint8(path, parts[0]),
    _as_uint8(path, parts[2]),
  )
  if train_images.shape[1:] != test_images.shape[1:]:
    raise errors.DataError(
      f"{path}: training images are {train_images.shape[1:]} and test"
      f" images {test_images.shape[1:]}."
    )
  num_classes = int(max(parts[1].max(), parts[3].max())) + 1
  # Not all numbers up to the highest label, which may be anything.
  present = np.unique(parts[1])
  if len(present) < num_classes:
    gaps = np.flatnonzero(present != np.arange(len(present)))
    absent = int(gaps[0]) if len(gaps) else len(present)
    raise errors.DataError(
      f"{path}: label {absent} has no training image; labels must be 0 to"
      " the number of classes less 1, and all must occur"
      + (
        ", among those five sixths of the images that are not test images."
        if len(keys) == 2
        else "."
      )
    )
  mean, std = _statistics(train_images)
  return Dataset(
    name=path.stem,
    train_images=train_images,
    train_labels=parts[1].astype(np.int32),
    test_images=test_images,
    test_labels=parts[3].astype(np.int32),
    num_classes=num_classes,
    mean=tuple(float(m) for m in mean),
    std=tuple(float(s) if s > 0 else 1.0 for s in std),
  )


def labelled(name: str) -> Labelled:
  """Reads images that are to be no data set by themselves.

  Args:
    name: "optdigits", 1,797 digits by other writers than MNIST's, of 8 x 8
      pixels made 20 x 20 in the middle of 28 x 28, which are bundled; or the
      path of an .npz file as for `from_npz`, whose test split, if it has one,
      is left out, and of whose labels some may be missing.

  Returns:
    All of its images and labels, or all of its training split.

  Raises:
    errors.DataError: the file is missing, damaged, or holds something else.
  """
  if name == OPTDIGITS:
    return _read_optdigits()
  path = Path(name).expanduser()
  keys, parts = _own_arrays(path)
  images, labels = parts[:2]
  _check_pair(path, keys[0], images, labels)
  return Labelled(_as_uint8(path, images), labels.astype(np.int32))


def _read_optdigits() -> Labelled:
  with gzip.open(_BUNDLED_OPTDIGITS, "rt", encoding="ascii") as stream:
    rows = np.loadtxt(stream, delimiter=",", dtype=np.int32)
  small = rows[:, :-1].reshape(-1, 8, 8)
  # Linear interpolation between the centres of pixels, along either axis.
  places = (np.arange(20) + 0.5) * 8 / 20 - 0.5
  stretch = np.stack(
    [np.interp(places, np.arange(8), row) for row in np.eye(8)], axis=1
  )
  large = np.round(stretch @ small @ stretch.T * (255 / 16)).astype(np.uint8)
  images = np.pad(large, ((0, 0), (4, 4), (4, 4)))[..., np.newaxis]
  return Labelled(images, rows[:, -1])


def _own_arrays(path: Path) -> tuple[tuple[str, ...], list[np.ndarray]]:
  """The names and arrays of a user's file, unchecked: two of them, or four."""
  arrays = _load_npz(path)
  for keys in _OWN_KEYS:
    if all(key in arrays for key in keys):
      return keys, [arrays[key] for key in keys]
  raise errors.DataError(
    f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}: it needs"
    f" {' or '.join(' '.join(keys) for keys in _OWN_KEYS)}."
  )


def _statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation per channel of images in [0, 1], without a copy."""
  counts = np.zeros((images.shape[-1], 256), np.int64)
  for start in range(0, len(images), 1000):
    for channel, count in enumerate(counts):
      part = images[start : start + 1000, ..., channel]
      count += np.bincount(part.ravel(), minlength=256)
  levels = np.arange(256) / 255
  weights = counts / counts.sum(axis=1, keepdims=True)
  mean = weights @ levels
  return mean, np.sqrt(np.maximum(weights @ levels**2 - mean**2, 0))


def _check_pair(
  path: Path, key: str, images: np.ndarray, labels: np.ndarray
) -> None:
  if images.ndim not in (3, 4) or not images.size:
    raise errors.DataError(
      f"{path}: {key} has shape {images.shape}; it must be [n, height,"
      " width] or [n, height, width, channels]."
    )
  if labels.shape != images.shape[:1]:
    raise errors.DataError(
      f"{path}: {len(images)} {key} need as many labels in one axis, not"
      f" an array of shape {labels.shape}."
    )
  if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
    raise errors.DataError(
      f"{path}: the labels of {key} must be integers from 0."
    )


def _as_uint8(path: Path, images: np.ndarray) -> np.ndarray:
  if images.ndim == 3:
    images = images[..., np.newaxis]
  if images.dtype == np.uint8:
    return images
  if np.issubdtype(images.dtype, np.floating) and (
    images.min() >= 0 and images.max() <= 1
  ):
    return np.round(images * 255).astype(np.uint8)
  raise errors.DataError(
    f"{path}: images must be uint8, or floating point in [0, 1]; these are"
    f" {images.dtype} from {images.min()} to {images.max()}."
  )
