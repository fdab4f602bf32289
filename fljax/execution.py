"""How a backend computes what it computes: the one table of measured choices.

Results agree to rounding whatever is chosen here; speed and memory do not.
The measurements are in BUILD_NOTES.md, "Speed".

The precision of products is the exception, as accelerators round what they
multiply: training's is a setting, and what decides anything is `exact`.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import NamedTuple
from typing import ParamSpec
from typing import TypeVar

import jax
import jax.numpy as jnp

from fljax import layers

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Of products of float32 arrays. On CPU the first three are float32; TPUs round
# the factors to bfloat16 at "default" and take three or six passes of that for
# the others; Hopper GPUs round to TF32 at "default". At "bfloat16" everything
# between the parameters and the loss is stored in that type as well.
PRECISIONS = ("default", "high", "highest", "bfloat16")


def compute_dtype(precision: str) -> jnp.dtype:
  """The type of weights and activations in a forward and backward pass."""
  return jnp.dtype(jnp.bfloat16 if precision == "bfloat16" else jnp.float32)


def at_precision(
  precision: str,
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
  """Fixes the precision of a function's products, whatever is set outside.

  Products are matrix products and convolutions that ask for no precision of
  their own.

  Args:
    precision: one of `PRECISIONS`.

  Returns:
    A decorator; under `jax.jit` it stands inside, as tracing is what it acts
    on.
  """
  # Factors that are bfloat16 already have nothing to be rounded.
  products = "default" if precision == "bfloat16" else precision

  def decorate(
    function: Callable[_Arguments, _Result],
  ) -> Callable[_Arguments, _Result]:
    @functools.wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
      with jax.default_matmul_precision(products):
        return function(*args, **kwargs)

    return wrapped

  return decorate


# For whatever decides something: the clients' reports, the searches and the
# evaluations. A rank, or the comparison of an accuracy with a floor, turns on
# differences that bfloat16 or TF32 rounds away; and none of these is a large
# part of a run.
exact = at_precision("highest")


class Plan(NamedTuple):
  """The choices for one backend.

  Attributes:
    forms: of convolutions and poolings.
    client_chunk: clients trained at once, see `parallel.map_clients`.
    evaluation_batch: images evaluated at once.
    sweep: how one program trains several experiments (`fljax.sweep`): "vmap"
      all at once, "map" one by one.
  """

  forms: layers.Forms
  client_chunk: int
  evaluation_batch: int
  sweep: str


# XLA's CPU backend has no fast path for the grouped convolution that `vmap`
# over kernels makes, nor for any convolution inside a loop (jax issues 12868,
# 26568, 13800), and small batches of one client at a time stay in its cache.
# Accelerators are filled by many clients at once. The TPU's compiler moves 3.8
# times fewer bytes with the native convolution; on GPUs the grouped one is
# several times slower than batched matrix products.
_ACCELERATOR = Plan(
  forms=layers.Forms(conv="lax", pooling="reshape"),
  client_chunk=0,
  evaluation_batch=1000,
  sweep="vmap",
)
PLANS = {
  "cpu": Plan(
    forms=layers.Forms(conv="winograd", pooling="reshape"),
    client_chunk=1,
    evaluation_batch=50,
    sweep="map",
  ),
  "gpu": _ACCELERATOR._replace(
    forms=layers.Forms(conv="slices", pooling="reshape")
  ),
  "tpu": _ACCELERATOR,
}


def plan_for(backend: str | None = None) -> Plan:
  """The measured choices for a backend ("cpu", "gpu", "tpu").

  Args:
    backend: None is the one in use; an unknown one is taken for an
      accelerator.

  Returns:
    Its plan.
  """
  return PLANS.get(backend or jax.default_backend(), _ACCELERATOR)
