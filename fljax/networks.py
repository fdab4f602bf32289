"""The paper's networks, and VGG11 with batch normalisation, by name.

Convolutions with ReLU and 2 x 2 poolings, then fully connected layers. What a
network must be to be pruned, and how a user's own joins, is in `models`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple
from typing import cast

from flax import linen as nn
import jax

from fljax import errors
from fljax import execution
from fljax import layers
from fljax import models

Array = jax.Array


class _Convolutional(nn.Module):
  """Convolutions of one kind, each with batch normalisation if `norm`."""

  size: int
  padding: int
  norm: bool
  kernel_init: layers.Initializer
  forms: layers.Forms

  @nn.nowrap
  def convolved(
    self, x: Array, features: int, *, then: str, train: bool, mask: Array | None
  ) -> Array:
    """What ReLU sees; the layers are the calling module's."""
    x = layers.Conv(
      features=features,
      size=self.size,
      padding=self.padding,
      kernel_init=self.kernel_init,
      forms=self.forms,
      then=then,
    )(x)
    if self.norm:
      x = layers.BatchNorm()(x, train=train, mask=mask)
    return x


class _Stem(_Convolutional):
  """Convolutions with ReLU, and 2 x 2 poolings, in the order of `spec`."""

  spec: tuple[int | str, ...]

  @nn.compact
  def __call__(
    self, x: Array, *, train: bool = False, mask: Array | None = None
  ) -> Array:
    for position, item in enumerate(self.spec):
      if item == "pool":
        continue
      pooled = self.spec[position + 1 : position + 2] == ("pool",)
      # ReLU is monotone: pooling first gives the same values and spares
      # three quarters of it. A normalisation may turn signs around.
      early = pooled and not self.norm
      then = "pool" if early else "pool later" if pooled else ""
      x = nn.relu(
        self.convolved(x, int(item), then=then, train=train, mask=mask)
      )
      if pooled and not early:
        x = layers.max_pool(x, form=self.forms.pooling)
    return x


class _Target(_Convolutional):
  """The last convolution, and ReLU."""

  pool: bool
  features: int

  @nn.compact
  def __call__(
    self, x: Array, *, train: bool = False, mask: Array | None = None
  ) -> Array:
    then = "pool later" if self.pool else ""
    return nn.relu(
      self.convolved(x, self.features, then=then, train=train, mask=mask)
    )


class _Head(nn.Module):
  """2 x 2 pooling, fully connected layers with ReLU, logits."""

  pool: bool
  hidden: tuple[int, ...]
  num_classes: int
  kernel_init: layers.Initializer
  forms: layers.Forms

  @nn.compact
  def __call__(self, x: Array, *, from_first: bool = False) -> Array:
    """From activations, or `from_first`: what the first layer gives."""
    if not from_first:
      x = self.pooled(x)
      x = x.reshape(x.shape[0], -1)
    widths = (*self.hidden, self.num_classes)
    for position, features in enumerate(widths):
      if position or not from_first:
        x = layers.Dense(
          features, kernel_init=self.kernel_init, name=f"Dense_{position}"
        )(x)
      if position < len(self.hidden):
        x = nn.relu(x)
    return x

  @nn.nowrap
  def pooled(self, active: Array) -> Array:
    """What the first fully connected layer sees, before it is flattened."""
    if not self.pool:
      return active
    return layers.max_pool(active, form=self.forms.pooling)

  @nn.nowrap
  def neuron_sums(
    self, params: models.Params, active: Array
  ) -> models.NeuronSums:
    """See `models.Model.neuron_sums`: pooling keeps channels apart."""
    inputs = self.pooled(active)
    batch, neurons = inputs.shape[0], inputs.shape[-1]
    inputs = inputs.reshape(batch, -1, neurons).transpose(2, 0, 1)
    first = params["head"]["Dense_0"]
    weights = first["kernel"].reshape(inputs.shape[2], neurons, -1)

    def rest(sums: Array) -> Array:
      variables = {"params": params["head"]}
      return cast(Array, self.apply(variables, sums, from_first=True))

    return models.NeuronSums(
      inputs=inputs,
      weights=weights.transpose(1, 0, 2),
      offset=first["bias"],
      rest=rest,
    )


class Architecture(NamedTuple):
  """What distinguishes one of these networks from another.

  Attributes:
    stem: channels of its convolutions before the last, and "pool".
    target: channels of the last convolution.
    size: of all kernels, in pixels on a side.
    padding: zeros on each side of every convolution's input.
    pool: whether the last convolution is pooled.
    hidden: widths of the fully connected layers before the logits.
    norm: whether each convolution is batch-normalised.
  """

  stem: tuple[int | str, ...]
  target: int
  size: int
  padding: int
  pool: bool
  hidden: tuple[int, ...]
  norm: bool = False


def _vgg11(width: int) -> Architecture:
  """Configuration A, its first convolution of so many channels, not 64."""
  one, two, four, eight = (width * factor for factor in (1, 2, 4, 8))
  return Architecture(
    stem=(
      *(one, "pool", two, "pool", four, four, "pool"),
      *(eight, eight, "pool", eight),
    ),
    target=eight,
    size=3,
    padding=1,
    pool=True,
    hidden=(eight, eight),
  )


# "Small NN" and "large NN" of Table VI; Section V for the others. The paper
# gives layer counts only: the fully connected widths, and the channels of the
# Fashion-MNIST network, are this project's.
NETWORKS = {
  "mnist_small": Architecture((8, "pool"), 16, 5, 0, True, (128,)),
  "mnist_large": Architecture((20, "pool"), 50, 5, 0, True, (500,)),
  "fashion_mnist": Architecture(
    (16, "pool", 32, "pool"), 64, 3, 1, True, (128,)
  ),
  # Conv(32), conv(64), pool, fc 128: small enough for CIFAR-10 on CPUs.
  "cifar_small": Architecture((32,), 64, 3, 0, True, (128,)),
  "vgg11": _vgg11(64),
  # A quarter of the width: a sixteenth of the arithmetic, for CPUs.
  "vgg11_quarter": _vgg11(16),
  # With batch normalisation and one fully connected layer instead of three, as
  # is usual for CIFAR-10.
  "vgg11_bn": _vgg11(64)._replace(norm=True, hidden=()),
  "vgg11_bn_quarter": _vgg11(16)._replace(norm=True, hidden=()),
}

# What builds networks of a user's own, see `extensions.network`.
BUILDERS: dict[str, Callable[..., models.Model]] = {}


def build(
  name: str,
  *,
  image_shape: tuple[int, int, int],
  num_classes: int,
  mean: Sequence[float] = (0.0,),
  std: Sequence[float] = (1.0,),
  initialisation: str = "uniform",
  forms: layers.Forms | None = None,
  **parameters: Any,
) -> models.Model:
  """Builds a network by its name, for images of any size that fits.

  Args:
    name: a key of `NETWORKS`, or of `BUILDERS`, which know nothing of initial
      weights and forms.
    image_shape: height, width, channels.
    num_classes: number of logits.
    mean: per channel, of images in [0, 1]: see `models.prepare`.
    std: likewise.
    initialisation: a key of `layers.INITIALISERS`.
    forms: how layers compute; None takes the backend's default.
    **parameters: of a user's own, see `extensions`.

  Returns:
    The model.

  Raises:
    errors.ConfigError: a name is unknown, or the images are too small for the
      network's poolings.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section V and Table VI; Very Deep Convolutional Networks
    (Simonyan, Zisserman), configuration A.
  """
  errors.require_choice("model", name, (*NETWORKS, *BUILDERS))
  errors.require_choice("initialisation", initialisation, layers.INITIALISERS)
  if name in BUILDERS:
    return _built_by(
      BUILDERS[name],
      tuple(image_shape),
      num_classes,
      tuple(mean),
      tuple(std),
      **parameters,
    )
  plan = NETWORKS[name]
  for side in image_shape[:2]:
    for item in (*plan.stem, plan.target, *(["pool"] if plan.pool else [])):
      shrink = plan.size - 1 - 2 * plan.padding
      side = side // 2 if item == "pool" else side - shrink
      if side < 1:
        raise errors.ConfigError(
          f"images of {image_shape[0]} x {image_shape[1]} are too small for"
          f" --model={name}."
        )
  return _built(
    plan,
    tuple(image_shape),
    num_classes,
    tuple(mean),
    tuple(std),
    initialisation,
    forms or execution.plan_for().forms,
  )


# One object per network, so that experiments in one process share what is
# compiled for it.
@functools.lru_cache(maxsize=32)
def _built_by(
  builder: Callable[..., models.Model],
  image_shape: tuple[int, int, int],
  num_classes: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  **parameters: Any,
) -> models.Model:
  return builder(
    image_shape=image_shape,
    num_classes=num_classes,
    mean=mean,
    std=std,
    **parameters,
  )


@functools.lru_cache(maxsize=32)
def _built(
  plan: Architecture,
  image_shape: tuple[int, int, int],
  num_classes: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  initialisation: str,
  forms: layers.Forms,
) -> models.Model:
  shared: dict[str, Any] = {
    "kernel_init": layers.INITIALISERS[initialisation],
    "forms": forms,
  }
  conv: dict[str, Any] = {
    "size": plan.size,
    "padding": plan.padding,
    "norm": plan.norm,
  }
  head = _Head(
    pool=plan.pool, hidden=plan.hidden, num_classes=num_classes, **shared
  )
  model = models.from_flax(
    stem=_Stem(spec=plan.stem, **conv, **shared),
    target=_Target(pool=plan.pool, features=plan.target, **conv, **shared),
    head=head,
    image_shape=image_shape,
    num_classes=num_classes,
    mean=mean,
    std=std,
  )
  return model._replace(neuron_sums=head.neuron_sums)
