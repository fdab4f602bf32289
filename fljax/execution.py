"""How a backend computes what it computes: the one table of measured choices.

Results agree to rounding whatever is chosen here; speed and memory do not.
The measurements are in BUILD_NOTES.md, "Speed".
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from fljax import layers


class Plan(NamedTuple):
  """The choices for one backend.

  Attributes:
    forms: of convolutions and poolings.
    client_chunk: clients trained at once, see `local.map_clients`.
    evaluation_batch: images evaluated at once.
  """

  forms: layers.Forms
  client_chunk: int
  evaluation_batch: int


# XLA's CPU backend has no fast path for the grouped convolution that `vmap`
# over kernels makes, nor for any convolution inside a loop (jax issues 12868,
# 26568, 13800), and small batches of one client at a time stay in its cache.
# The TPU's compiler moves 3.8 times fewer bytes with the native convolution,
# and accelerators are filled by many clients at once.
_ACCELERATOR = Plan(
  forms=layers.Forms(conv="lax", pooling="reshape"),
  client_chunk=0,
  evaluation_batch=1000,
)
PLANS = {
  "cpu": Plan(
    forms=layers.Forms(conv="blocks", pooling="reshape"),
    client_chunk=1,
    evaluation_batch=50,
  ),
  "gpu": _ACCELERATOR,
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
