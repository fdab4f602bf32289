"""Networks, split where they are pruned: stem, activations, head.

    logits = head(activations(stem(images)))

`stem` computes the input of the target convolution (the last one),
`activations` applies that convolution, batch normalisation if there is one,
and ReLU, `head` is the rest. One channel of the activations is one neuron.
Which leaves make a neuron is known here and nowhere else: others go through
`target_kernel`, `with_target_kernel` and `mask_neurons`.

Running statistics of batch normalisation are leaves of the parameters like
any other: the server averages them with the rest, whatever its rule, and an
attacker may send what it likes. Only what they mean differs, and only here
and in `local`: a gradient step leaves them alone, a forward pass of training
moves them.

A user's own network joins through `from_flax`; those that have a name are in
`networks`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import inspect
import itertools
from typing import Any
from typing import NamedTuple
from typing import cast

from flax import linen as nn
from flax import traverse_util
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fljax import errors

Array = jax.Array
Params = dict[str, Any]
# By part of the model, the running statistics that it keeps.
RunningStatistics = dict[str, Any]

# Flax's name for them: in params["stem"] and params["target"].
_STATISTICS = "batch_stats"


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
    neuron_paths: likewise for what else a neuron is made of, each
      [neurons]: a bias; batch normalisation's scale, shift, running mean and
      variance.
    image_shape: height, width, channels.
    num_classes: number of logits.
    neuron_sums: (params, activations) -> the head taken apart, which makes
      pruning curves fast; None where the head has no such form.
    in_training: (params, images, mask bool [batch]) -> activations as training
      has them, normalised by the batch's own statistics, and the running ones
      moved towards those; samples that do not count are left out. None where
      nothing is normalised by batches.
  """

  init: Callable[[Array], Params]
  stem: Callable[[Params, Array], Array]
  activations: Callable[[Params, Array], Array]
  head: Callable[[Params, Array], Array]
  neurons: int
  kernel_path: tuple[str, ...]
  neuron_paths: tuple[tuple[str, ...], ...]
  image_shape: tuple[int, int, int]
  num_classes: int
  neuron_sums: Callable[[Params, Array], NeuronSums] | None = None
  in_training: (
    Callable[[Params, Array, Array], tuple[Array, RunningStatistics]] | None
  ) = None


def apply(model: Model, params: Params, images: Array) -> Array:
  """Logits [batch, classes] of images [batch, height, width, channels]."""
  hidden = model.stem(params, images)
  return model.head(params, model.activations(params, hidden))


def in_training(
  model: Model, params: Params, images: Array, mask: Array
) -> tuple[Array, RunningStatistics]:
  """The part of a forward pass of training that precedes the head.

  Args:
    model: the network.
    params: its parameters.
    images: [batch, height, width, channels].
    mask: bool [batch], the samples that count.

  Returns:
    The activations, and the running statistics after this batch, for
    `with_running_statistics`; without batch normalisation those of inference,
    and nothing.
  """
  if model.in_training is None:
    return model.activations(params, model.stem(params, images)), {}
  return model.in_training(params, images, mask)


def summed_activations(
  model: Model, params: Params, images: Array, mask: Array
) -> Array:
  """Each neuron's activation, summed over images.

  Args:
    model: the network.
    params: its parameters.
    images: [batch, height, width, channels].
    mask: bool [batch], the images that count.

  Returns:
    float [neurons]: of each image the mean over the channel's positions, after
    the ReLU.
  """
  active = model.activations(params, model.stem(params, images))
  means = active.reshape(len(mask), -1, model.neurons).mean(axis=1)
  return jnp.where(mask[:, jnp.newaxis], means, 0).sum(axis=0)


def is_running_statistic(path: tuple[Any, ...]) -> bool:
  """Whether a leaf of the parameters is a running statistic, by its path.

  Args:
    path: as `jax.tree_util.tree_map_with_path` gives it.
  """
  return any(getattr(key, "key", None) == _STATISTICS for key in path)


def with_running_statistics(
  params: Params, statistics: RunningStatistics
) -> Params:
  """The same parameters with other running statistics."""
  changed = {
    part: {**params[part], _STATISTICS: own} for part, own in statistics.items()
  }
  return {**params, **changed}


def as_type(params: Params, dtype: jnp.dtype) -> Params:
  """Parameters of another type, but for running statistics.

  What a batch moves them by would be rounded away.
  """
  kept = {
    part: own[_STATISTICS] for part, own in params.items() if _STATISTICS in own
  }
  return with_running_statistics(
    jax.tree.map(lambda leaf: leaf.astype(dtype), params), kept
  )


def require_plain_target(model: Model, who: str) -> None:
  """Refuses a target convolution that batch normalisation follows.

  Args:
    model: the network.
    who: takes its kernel for what neurons weigh their inputs by, which then
      also depends on their scales and variances.

  Raises:
    errors.ConfigError: it is one.
  """
  if any(path[0] == _STATISTICS for path in model.neuron_paths):
    raise errors.ConfigError(
      f"{who} goes by the weights of the last convolution, which batch"
      " normalisation scales anew: it is for models without."
    )


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
  """Removes neurons: their kernel and all that follows it become zero.

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
  for path in (model.kernel_path, *model.neuron_paths):
    leaf = _get(target, path)
    keep = mask.reshape((1,) * (leaf.ndim - 1) + (-1,))
    target = _set(target, path, jnp.where(keep, leaf, jnp.zeros_like(leaf)))
  return {**params, "target": target}


def classifier_path(model: Model, params: Params) -> tuple[str, ...]:
  """Where in params["head"] the kernel of the layer that gives logits is.

  It is the two-dimensional kernel each of whose columns one logit depends on,
  and no other logit does.

  Args:
    model: the network.
    params: its parameters, or their shapes and types.

  Raises:
    errors.ConfigError: there is none, or more than one.
  """
  leaves = traverse_util.flatten_dict(params["head"])
  found = [
    path
    for path, leaf in leaves.items()
    if path[-1] == "kernel"
    and leaf.ndim == 2
    and leaf.shape[1] == model.num_classes
    and _gives_logits(model, params["head"], path)
  ]
  if len(found) != 1:
    raise errors.ConfigError(
      f"the model's head has {'no' if not found else 'more than one'} linear"
      f" layer that gives its {model.num_classes} logits."
    )
  return found[0]


def _gives_logits(model: Model, head: Any, path: tuple[str, ...]) -> bool:
  """Whether a kernel's first column moves the first logit, and that alone."""
  # Positive weights and activations keep a ReLU open in between.
  rng = np.random.default_rng(0)

  def active(params: Params) -> Array:
    images = jnp.zeros((1, *model.image_shape), jnp.uint8)
    return model.activations(params, model.stem(params, images))

  shapes = jax.eval_shape(model.init, jax.random.key(0))
  # Whoever asks may be under a trace.
  with jax.ensure_compile_time_eval():
    params = {"head": _positive(head, rng)}
    seen = _positive(jax.eval_shape(active, shapes), rng)
    kernel = head_leaf(params, path)
    moved = with_head_leaf(params, path, kernel.at[:, 0].add(1))
    logits = jax.jit(model.head)
    change = np.asarray(logits(moved, seen) - logits(params, seen))[0]
  alone = np.abs(change[1:]).max(initial=0) <= 1e-5 * abs(change[0])
  return bool(change[0] != 0 and alone)


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
  """Makes a model of three Flax modules.

  They hold nothing but parameters, or, in stem and target, the running
  statistics of batch normalisation, Flax's "batch_stats". A module that has
  them is called with `train=False` at inference, and in training with
  `train=True` and the samples that count as `mask`, bool [batch]; that of
  `flax.linen.BatchNorm` has the inputs' number of axes. They are kept in
  params["stem"]["batch_stats"] and params["target"]["batch_stats"].

  Args:
    stem: everything before the target convolution; None if that is the first
      layer.
    target: the convolution to prune, batch normalisation if any, and the
      activation function φ. Its output's last axis is the neuron, and so is
      its kernel's.
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
      here, before anything is trained: modules that are none of Flax's linen
      (of its nnx, `flax.nnx.bridge.ToLinen` makes one), parts that do not fit
      together, a mean or std of other channels, another state, no unique
      kernel, φ(0) ≠ 0, neurons that are no one's own, a wrong number of
      logits.
  """
  modules = {"stem": stem, "target": target, "head": head}
  for part, module in modules.items():
    missing = part == "stem" and module is None
    if not (missing or isinstance(module, nn.Module)):
      raise errors.ConfigError(
        f"the model's {part} must be a flax.linen.Module, not"
        f" {type(module).__name__}; flax.nnx.bridge.ToLinen makes one of a"
        " module of nnx."
      )
  channels = image_shape[-1]
  for name, values in (("mean", mean), ("std", std)):
    if np.ndim(values) != 1 or len(values) not in (1, channels):
      raise errors.ConfigError(
        f"{name} is {values}; images of {channels} channels need one value of"
        " each, or one for all, in a tuple."
      )
  if min(std) <= 0:
    raise errors.ConfigError(f"std must be positive, not {min(std):g}.")
  # Models are told apart by what they hold.
  image_shape = cast(tuple[int, int, int], tuple(image_shape))
  kernel = None if kernel is None else tuple(kernel)

  def run(part: str, params: Params, inputs: Array) -> Array:
    module = modules[part]
    if module is None:
      return inputs
    variables = _variables(params[part])
    mode: dict[str, Any] = {"train": False} if _STATISTICS in variables else {}
    return cast(Array, module.apply(variables, inputs, **mode))

  def run_in_training(
    part: str, params: Params, inputs: Array, mask: Array
  ) -> tuple[Array, RunningStatistics]:
    module = modules[part]
    if module is None or _STATISTICS not in params[part]:
      return run(part, params, inputs), {}
    variables = _variables(params[part])
    # A module may look at them in training too, but no step shall move them.
    variables[_STATISTICS] = lax.stop_gradient(variables[_STATISTICS])
    outputs, changed = module.apply(
      variables,
      inputs,
      train=True,
      mask=mask,
      mutable=[_STATISTICS],
    )
    return outputs, {part: changed[_STATISTICS]}

  def init(key: Array) -> Params:
    params: Params = {}
    value = prepare(jnp.zeros((1, *image_shape), jnp.uint8), mean, std)
    for part, part_key in zip(modules, jax.random.split(key, 3), strict=True):
      module = modules[part]
      variables = {} if module is None else module.init(part_key, value)
      extra = set(variables) - {"params"}
      if part != "head":
        extra -= {_STATISTICS}
      if extra:
        raise errors.ConfigError(
          f"the model's {part} keeps {', '.join(sorted(extra))} beside its"
          " parameters; only batch normalisation in stem and target may, as"
          f" {_STATISTICS}."
        )
      params[part] = dict(variables.get("params", {}))
      if _STATISTICS in variables:
        _check_arguments(module, part)
        params[part][_STATISTICS] = dict(variables[_STATISTICS])
      value = run(part, params, value)
    return params

  def prepared(params: Params, images: Array) -> Array:
    if images.shape[-3:] != image_shape:
      raise errors.ConfigError(
        f"images of {images.shape[-3:]} are none of the model's, which are"
        f" {image_shape}."
      )
    # Parameters of another type than float32 compute in it.
    weights = jax.tree.leaves([_weights(own) for own in params.values()])
    dtype = weights[0].dtype if weights else jnp.float32
    return prepare(images, mean, std).astype(dtype)

  def stem_apply(params: Params, images: Array) -> Array:
    return run("stem", params, prepared(params, images))

  def in_training(
    params: Params, images: Array, mask: Array
  ) -> tuple[Array, RunningStatistics]:
    # Or the statistics of a batch of padding alone would not be numbers; what
    # comes of such a batch is dropped.
    mask = mask | ~mask.any()
    inputs = prepared(params, images)
    hidden, first = run_in_training("stem", params, inputs, mask)
    active, last = run_in_training("target", params, hidden, mask)
    return active, {**first, **last}

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
    if normalising := any(_STATISTICS in own for own in params.values()):
      # Of a size that is hardly that of another axis.
      batch = jax.ShapeDtypeStruct((31, *image_shape), jnp.uint8)
      counted = jax.ShapeDtypeStruct((31,), jnp.bool_)
      jax.eval_shape(in_training, params, batch, counted)
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
  leaves = traverse_util.flatten_dict(_weights(params["target"]))
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
  model = Model(
    init=init,
    stem=stem_apply,
    activations=activations,
    head=head_apply,
    neurons=neurons,
    kernel_path=kernel,
    neuron_paths=_neuron_paths(params["target"], kernel, neurons),
    image_shape=image_shape,
    num_classes=num_classes,
    in_training=in_training if normalising else None,
  )
  _check_removable(model, params["target"], hidden)
  return model


def _weights(own: Params) -> Params:
  """A part's parameters without its running statistics."""
  return {name: own[name] for name in own if name != _STATISTICS}


def _variables(own: Params) -> dict[str, Any]:
  """What Flax takes a part's parameters and statistics as."""
  if _STATISTICS not in own:
    return {"params": own}
  # An update that an attacker amplifies may leave a variance below zero.
  statistics = {
    path: jnp.maximum(leaf, 0) if path[-1] == "var" else leaf
    for path, leaf in traverse_util.flatten_dict(own[_STATISTICS]).items()
  }
  return {
    "params": _weights(own),
    _STATISTICS: traverse_util.unflatten_dict(statistics),
  }


def _check_arguments(module: nn.Module | None, part: str) -> None:
  """Training and inference differ, and padding must not be counted."""
  taken = inspect.signature(type(module).__call__).parameters
  missing = [name for name in ("train", "mask") if name not in taken]
  if missing:
    raise errors.ConfigError(
      f"the model's {part} normalises batches, so its __call__ must take"
      f" train=False and mask=None (bool [batch]); {' and '.join(missing)}"
      f" {'are' if missing[1:] else 'is'} missing."
    )


def _neuron_paths(
  target: Params, kernel: tuple[str, ...], neurons: int
) -> tuple[tuple[str, ...], ...]:
  """The kernel's bias, and what batch normalisation has for each neuron."""
  leaves = traverse_util.flatten_dict(target)
  found = [(*kernel[:-1], "bias")]
  for path, leaf in leaves.items():
    if path[0] == _STATISTICS and leaf.shape == (neurons,):
      weights = [(*path[1:-1], name) for name in ("scale", "bias")]
      found += [path, *weights]
  return tuple(path for path in dict.fromkeys(found) if path in leaves)


def _positive(shapes: Any, rng: np.random.Generator) -> Any:
  """Arrays of these shapes and types, drawn from between 0.1 and 1."""
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype),
    shapes,
  )


def _moderate(shapes: Any, rng: np.random.Generator) -> Any:
  """Likewise, but kernels of both signs, whose sums are neither large nor tiny.

  A gate that mixes neurons is not open or closed all the way then.
  """

  def draw(leaf: Any) -> Array:
    if leaf.ndim < 2:
      return jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype)
    fan_in = np.prod(leaf.shape[:-1])
    return jnp.asarray(rng.normal(0, 1.5 / fan_in**0.5, leaf.shape), leaf.dtype)

  return jax.tree.map(draw, shapes)


def _check_removable(model: Model, target: Any, hidden: Any) -> None:
  """A neuron is removed by zeroing what is its own; no other may notice."""
  rng = np.random.default_rng(0)

  # As arguments: of a convolution of constants under a maximum, XLA's CPU
  # backend (jax 0.10.2) returns memory that nobody has written.
  @jax.jit
  def activations(params: Params, inputs: Array) -> Array:
    return model.activations(params, inputs)

  inputs = _positive(hidden, rng)
  stays = jnp.arange(model.neurons) % 2 == 1
  for own, mask in itertools.product(
    (_positive(target, rng), *(_moderate(target, rng) for _ in range(3))),
    (stays, ~stays, jnp.zeros_like(stays)),
  ):
    params = {"target": own}
    before = activations(params, inputs)
    after = activations(mask_neurons(model, params, mask), inputs)
    if (after[..., ~mask] != 0).any():
      raise errors.ConfigError(
        "the model's target gives a value other than zero where all of a"
        " neuron is zero, so its neurons cannot be removed: it must be one"
        " convolution, batch normalisation if any, and an activation function"
        " with φ(0) = 0, such as ReLU."
      )
    rounding = 1e-5 * jnp.abs(before).max()
    if not jnp.allclose(
      after[..., mask], before[..., mask], rtol=1e-3, atol=rounding
    ):
      raise errors.ConfigError(
        "the model's target mixes its neurons: removing one changes others. It"
        " must be one convolution, batch normalisation if any, and an"
        " activation function of each neuron."
      )
