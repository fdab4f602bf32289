"""Networks, split where they are pruned: stem, activations, head.

    logits = head(activations(stem(images)))

`stem` computes the input of the target convolution (the last one),
`activations` applies that convolution and its ReLU, `head` is the rest. One
channel of the activations is one neuron. Which kernel, kernel axis and bias
make a neuron is known here and nowhere else: others go through
`target_kernel`, `with_target_kernel` and `mask_neurons`.

A user's own network joins through `from_flax`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple
from typing import cast

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp

from fljax import errors
from fljax import execution
from fljax import layers

Array = jax.Array
Params = dict[str, Any]


class NeuronSums(NamedTuple):
  """A head whose first layer is a sum over neurons, taken apart.

  logits = rest(offset + Σ_n inputs[n] @ weights[n]). Removing a neuron removes
  its summand, so all steps of a pruning sequence cost hardly more than one
  evaluation.

  Attributes:
    inputs: [neurons, batch, positions], zero for a neuron that is inactive.
    weights: [neurons, positions, features].
    offset: [features].
    rest: [batch, features] -> logits [batch, classes].
  """

  inputs: Array
  weights: Array
  offset: Array
  rest: Callable[[Array], Array]


class Model(NamedTuple):
  """A network as pure functions of its parameters.

  Attributes:
    init: key -> params, a dict with the keys "stem", "target" and "head".
    stem: (params, images) -> input of the target convolution. Images are
      [batch, height, width, channels], uint8 or floating point in [0, 1];
      they are limited to [0, 1] and normalised here, at inference too
      (Section IV-C).
    activations: (params, stem output) -> [batch, ..., neurons], after the
      ReLU.
    head: (params, activations) -> logits [batch, classes].
    neurons: number of channels of the activations (P_L).
    kernel_path: where in params["target"] the target kernel is; its last
      axis is the neuron.
    bias_path: likewise for the bias [neurons], or None.
    image_shape: height, width, channels.
    num_classes: number of logits.
    neuron_sums: (params, activations) -> the head taken apart, which makes
      pruning curves fast; None where the head has no such form.
  """

  init: Callable[[Array], Params]
  stem: Callable[[Params, Array], Array]
  activations: Callable[[Params, Array], Array]
  head: Callable[[Params, Array], Array]
  neurons: int
  kernel_path: tuple[str, ...]
  bias_path: tuple[str, ...] | None
  image_shape: tuple[int, int, int]
  num_classes: int
  neuron_sums: Callable[[Params, Array], NeuronSums] | None = None


def apply(model: Model, params: Params, images: Array) -> Array:
  """Logits [batch, classes] of images [batch, height, width, channels]."""
  hidden = model.stem(params, images)
  return model.head(params, model.activations(params, hidden))


def target_kernel(model: Model, params: Params) -> Array:
  """The kernel of the target convolution, [..., neurons]."""
  return _get(params["target"], model.kernel_path)


def with_target_kernel(model: Model, params: Params, kernel: Array) -> Params:
  """The same parameters with another target kernel of the same shape."""
  return {
    **params,
    "target": _set(params["target"], model.kernel_path, kernel),
  }


def mask_neurons(model: Model, params: Params, mask: Array) -> Params:
  """Removes neurons: their kernel and bias become zero.

  Guarantees: idempotent; a removed neuron's activation is exactly zero for
  every input (its ReLU, or any activation function with φ(0) = 0); all other
  parameters are untouched. Gradients have the same structure and can be
  masked likewise.

  Args:
    model: the network.
    params: its parameters, or anything of their structure.
    mask: bool [neurons], True for neurons that stay.

  Returns:
    The masked parameters.
  """
  target = params["target"]
  for path in (model.kernel_path, model.bias_path):
    if path is not None:
      leaf = _get(target, path)
      keep = mask.reshape((1,) * (leaf.ndim - 1) + (-1,))
      target = _set(target, path, jnp.where(keep, leaf, jnp.zeros_like(leaf)))
  return {**params, "target": target}


def classifier_path(model: Model, params: Params) -> tuple[str, ...]:
  """Where in params["head"] the kernel of the layer that gives logits is.

  It is the two-dimensional kernel with as many columns as there are classes;
  of several that Flax has numbered, as in Dense_0 and Dense_1, the last.

  Raises:
    errors.ConfigError: there is none, or several of other names.
  """
  leaves = traverse_util.flatten_dict(params["head"])
  found: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = {}
  for path, leaf in leaves.items():
    fits = leaf.ndim == 2 and leaf.shape[1] == model.num_classes
    if path[-1] == "kernel" and fits:
      name, _, number = "/".join(path[:-1]).rpartition("_")
      numbered = number.isdigit()
      series = (name,) if numbered else path
      found.setdefault(series, []).append(
        (int(number) if numbered else 0, path)
      )
  if len(found) != 1:
    raise errors.ConfigError(
      f"the model's head has {'no' if not found else 'more than one'} linear"
      f" layer that may give its {model.num_classes} logits."
    )
  (candidates,) = found.values()
  return max(candidates)[1]


def classifier_bias_path(
  params: Params, path: tuple[str, ...]
) -> tuple[str, ...] | None:
  """Where the bias beside the kernel of `classifier_path` is, if it has one."""
  bias = (*path[:-1], "bias")
  return bias if bias in traverse_util.flatten_dict(params["head"]) else None


def head_leaf(params: Params, path: tuple[str, ...]) -> Array:
  """A leaf of params["head"]."""
  return _get(params["head"], path)


def with_head_leaf(
  params: Params, path: tuple[str, ...], leaf: Array
) -> Params:
  """The same parameters with another leaf of params["head"]."""
  return {**params, "head": _set(params["head"], path, leaf)}


def _get(tree: Any, path: tuple[str, ...]) -> Array:
  for key in path:
    tree = tree[key]
  return tree


def _set(tree: Any, path: tuple[str, ...], leaf: Array) -> Any:
  if not path:
    return leaf
  return {**tree, path[0]: _set(tree[path[0]], path[1:], leaf)}


def prepare(
  images: Array, mean: Sequence[float], std: Sequence[float]
) -> Array:
  """Limits images to their range and normalises them (Section IV-C).

  Args:
    images: [..., channels], integers limited to 0..255 or floating point
      limited to [0, 1].
    mean: per channel, of images in [0, 1].
    std: likewise, positive.

  Returns:
    float32, of the same shape.
  """
  if jnp.issubdtype(images.dtype, jnp.integer):
    scaled = images.astype(jnp.float32) / 255
  else:
    scaled = images.astype(jnp.float32)
  scaled = jnp.clip(scaled, 0, 1)
  shape = (1,) * (images.ndim - 1) + (-1,)
  shift = jnp.asarray(mean, jnp.float32).reshape(shape)
  scale = jnp.asarray(std, jnp.float32).reshape(shape)
  return (scaled - shift) / scale


def from_flax(
  *,
  stem: nn.Module | None,
  target: nn.Module,
  head: nn.Module,
  image_shape: tuple[int, int, int],
  num_classes: int,
  mean: Sequence[float] = (0.0,),
  std: Sequence[float] = (1.0,),
  kernel: tuple[str, ...] | None = None,
) -> Model:
  """Makes a model of three Flax modules that hold nothing but parameters.

  Args:
    stem: everything before the target convolution; None if that is the first
      layer.
    target: the convolution to prune and its activation function φ. Its
      output's last axis is the neuron, and so is its kernel's.
    head: everything after; it ends in logits.
    image_shape: height, width, channels.
    num_classes: number of logits.
    mean: per channel, of images in [0, 1]: see `prepare`.
    std: likewise.
    kernel: path of the kernel in `target`'s parameters, for example
      ("Conv_0", "kernel"). None finds it, if there is just one.

  Returns:
    The model.

  Raises:
    errors.ConfigError: the modules do not fit this form. All checks are done
      here, without running the network: parts that do not fit together, a
      state other than parameters, no unique kernel, φ(0) ≠ 0, a wrong number
      of logits.
  """
  modules = {"stem": stem, "target": target, "head": head}

  def run(part: str, params: Params, inputs: Array) -> Array:
    module = modules[part]
    if module is None:
      return inputs
    return cast(Array, module.apply({"params": params[part]}, inputs))

  def init(key: Array) -> Params:
    params: Params = {}
    value = prepare(jnp.zeros((1, *image_shape), jnp.uint8), mean, std)
    for part, part_key in zip(modules, jax.random.split(key, 3), strict=True):
      module = modules[part]
      variables = {} if module is None else module.init(part_key, value)
      extra = set(variables) - {"params"}
      if extra:
        raise errors.ConfigError(
          f"the model's {part} keeps {', '.join(sorted(extra))} beside its"
          " parameters; federated averaging of such state (batch"
          " normalisation, for example) is not defined here."
        )
      params[part] = dict(variables.get("params", {}))
      value = run(part, params, value)
    return params

  def stem_apply(params: Params, images: Array) -> Array:
    # Parameters of another type than float32 compute in it.
    weights = jax.tree.leaves(params)
    dtype = weights[0].dtype if weights else jnp.float32
    return run("stem", params, prepare(images, mean, std).astype(dtype))

  def activations(params: Params, inputs: Array) -> Array:
    return run("target", params, inputs)

  def head_apply(params: Params, inputs: Array) -> Array:
    return run("head", params, inputs)

  try:
    params = jax.eval_shape(init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    hidden = jax.eval_shape(stem_apply, params, images)
    active = jax.eval_shape(activations, params, hidden)
    logits = jax.eval_shape(head_apply, params, active)
  except (TypeError, ValueError, nn.module.errors.FlaxError) as error:
    if isinstance(error, errors.FljaxError):
      raise
    raise errors.ConfigError(
      f"the model does not accept images of {image_shape}:"
      f" {errors.first_line(error)}"
    ) from error
  neurons = active.shape[-1]
  if logits.shape != (1, num_classes):
    raise errors.ConfigError(
      f"the model's head gives {logits.shape} for one image; it must give"
      f" (1, {num_classes})."
    )
  leaves = traverse_util.flatten_dict(params["target"])
  if kernel is None:
    found = [path for path in leaves if path[-1] == "kernel"]
    if len(found) != 1:
      raise errors.ConfigError(
        f"the model's target has {len(found)} kernels; name one with"
        " kernel=(...)."
      )
    kernel = found[0]
  if kernel not in leaves or leaves[kernel].shape[-1] != neurons:
    raise errors.ConfigError(
      f"the model's target has no kernel {'/'.join(kernel)} whose last axis"
      f" is its {neurons} neurons."
    )
  bias: tuple[str, ...] | None = (*kernel[:-1], "bias")
  if bias not in leaves:
    bias = None
  model = Model(
    init=init,
    stem=stem_apply,
    activations=activations,
    head=head_apply,
    neurons=neurons,
    kernel_path=kernel,
    bias_path=bias,
    image_shape=image_shape,
    num_classes=num_classes,
  )
  _check_removable(model, params["target"], hidden)
  return model


def _check_removable(model: Model, target: Any, hidden: Any) -> None:
  """A neuron is removed by zeroing its weights, which needs φ(0) = 0."""

  def ones(shaped: Any) -> Array:
    return jnp.ones(shaped.shape, shaped.dtype)

  # As arguments: of a convolution of constants under a maximum, XLA's CPU
  # backend (jax 0.10.2) returns memory that nobody has written.
  @jax.jit
  def largest(params: Params, inputs: Array) -> Array:
    return jnp.abs(model.activations(params, inputs)).max()

  params = {"target": jax.tree.map(ones, target)}
  removed = mask_neurons(model, params, jnp.zeros(model.neurons, bool))
  if largest(removed, ones(hidden)) != 0:
    raise errors.ConfigError(
      "the model's target gives a value other than zero where kernel and"
      " bias are zero, so its neurons cannot be removed: it must be one"
      " convolution and an activation function with φ(0) = 0, such as ReLU."
    )


# --- the paper's networks ----------------------------------------------------


class _Stem(nn.Module):
  """Convolutions with ReLU, and 2 x 2 poolings, in the order of `spec`."""

  spec: tuple[int | str, ...]
  size: int
  padding: int
  kernel_init: layers.Initializer
  forms: layers.Forms

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for position, item in enumerate(self.spec):
      if item == "pool":
        continue
      # ReLU is monotone: pooling first gives the same values and spares
      # three quarters of it.
      pooled = self.spec[position + 1 : position + 2] == ("pool",)
      x = nn.relu(
        layers.Conv(
          features=int(item),
          size=self.size,
          padding=self.padding,
          kernel_init=self.kernel_init,
          forms=self.forms,
          then="pool" if pooled else "",
        )(x)
      )
    return x


class _Target(nn.Module):
  """The last convolution and its ReLU."""

  pool: bool
  features: int
  size: int
  padding: int
  kernel_init: layers.Initializer
  forms: layers.Forms

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return nn.relu(
      layers.Conv(
        features=self.features,
        size=self.size,
        padding=self.padding,
        kernel_init=self.kernel_init,
        forms=self.forms,
        then="pool later" if self.pool else "",
      )(x)
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
  def neuron_sums(self, params: Params, active: Array) -> NeuronSums:
    """See `Model.neuron_sums`: pooling keeps channels apart."""
    inputs = self.pooled(active)
    batch, neurons = inputs.shape[0], inputs.shape[-1]
    inputs = inputs.reshape(batch, -1, neurons).transpose(2, 0, 1)
    first = params["head"]["Dense_0"]
    weights = first["kernel"].reshape(inputs.shape[2], neurons, -1)

    def rest(sums: Array) -> Array:
      variables = {"params": params["head"]}
      return cast(Array, self.apply(variables, sums, from_first=True))

    return NeuronSums(
      inputs=inputs,
      weights=weights.transpose(1, 0, 2),
      offset=first["bias"],
      rest=rest,
    )


class _Architecture(NamedTuple):
  stem: tuple[int | str, ...]
  target: int
  size: int
  padding: int
  pool: bool
  hidden: tuple[int, ...]


def _vgg11(width: int) -> _Architecture:
  """Configuration A, its first convolution of so many channels, not 64."""
  one, two, four, eight = (width * factor for factor in (1, 2, 4, 8))
  return _Architecture(
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
MODELS = {
  "mnist_small": _Architecture((8, "pool"), 16, 5, 0, True, (128,)),
  "mnist_large": _Architecture((20, "pool"), 50, 5, 0, True, (500,)),
  "fashion_mnist": _Architecture(
    (16, "pool", 32, "pool"), 64, 3, 1, True, (128,)
  ),
  # Conv(32), conv(64), pool, fc 128: small enough for CIFAR-10 on CPUs.
  "cifar_small": _Architecture((32,), 64, 3, 0, True, (128,)),
  "vgg11": _vgg11(64),
  # A quarter of the width: a sixteenth of the arithmetic, for CPUs.
  "vgg11_quarter": _vgg11(16),
}


def build(
  name: str,
  *,
  image_shape: tuple[int, int, int],
  num_classes: int,
  mean: Sequence[float] = (0.0,),
  std: Sequence[float] = (1.0,),
  initialisation: str = "uniform",
  forms: layers.Forms | None = None,
) -> Model:
  """Builds one of the paper's networks for images of any size that fits.

  Args:
    name: a key of `MODELS`.
    image_shape: height, width, channels.
    num_classes: number of logits.
    mean: per channel, of images in [0, 1]: see `prepare`.
    std: likewise.
    initialisation: a key of `layers.INITIALISERS`.
    forms: how layers compute; None takes the backend's default.

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
  if name not in MODELS:
    raise errors.ConfigError(
      f"unknown model {name!r}: choose one of {', '.join(MODELS)}."
    )
  if initialisation not in layers.INITIALISERS:
    raise errors.ConfigError(
      f"unknown initialisation {initialisation!r}: choose one of"
      f" {', '.join(layers.INITIALISERS)}."
    )
  plan = MODELS[name]
  for side in image_shape[:2]:
    for item in (*plan.stem, plan.target, *(["pool"] if plan.pool else [])):
      shrink = plan.size - 1 - 2 * plan.padding
      side = side // 2 if item == "pool" else side - shrink
      if side < 1:
        raise errors.ConfigError(
          f"images of {image_shape[0]} x {image_shape[1]} are too small for"
          f" --model={name}."
        )
  shared: dict[str, Any] = {
    "kernel_init": layers.INITIALISERS[initialisation],
    "forms": forms or execution.plan_for().forms,
  }
  window: dict[str, Any] = {"size": plan.size, "padding": plan.padding}
  head = _Head(
    pool=plan.pool, hidden=plan.hidden, num_classes=num_classes, **shared
  )
  model = from_flax(
    stem=_Stem(spec=plan.stem, **window, **shared),
    target=_Target(pool=plan.pool, features=plan.target, **window, **shared),
    head=head,
    image_shape=image_shape,
    num_classes=num_classes,
    mean=mean,
    std=std,
  )
  return model._replace(neuron_sums=head.neuron_sums)
