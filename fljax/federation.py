"""A federation as a pytree: clients are the leading axis of every array.

Who attacks, how strongly and from when on is data here, not a subclass: one
compiled program trains benign and malicious clients together.
"""

from __future__ import annotations

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from fljax import data
from fljax import errors
from fljax import partition as partitions
from fljax import triggers

Array = jax.Array

# A round that does not come.
NEVER = np.iinfo(np.int32).max


class Federation(struct.PyTreeNode):
  """All clients, or a round's cohort of them, or (without the axis) one.

  Attributes:
    ids: int32 [clients], each client's own number. Randomness is derived from
      it, so that the order of clients does not matter.
    images: uint8 [clients, samples, height, width, channels]; not stamped
      yet, stamping happens in the step.
    labels: int32 [clients, samples], what the client trains towards.
    mask: bool [clients, samples], False for padding.
    poisoned: bool [clients, samples], True where the client's trigger is
      stamped; these samples count only while the client attacks.
    attacker: bool [clients].
    attack_start: int32 [clients], the first round in which it attacks.
    attack_end: int32 [clients], the first round after that in which it does
      so no longer.
    scale: float32 [clients], the attack's amplification γ of the update while
      the client attacks.
    rate: float32 [clients], what the client's local steps are multiplied by.
    attack_rate: float32 [clients], what they are multiplied by in addition
      while the client attacks.
    trigger: one trigger per client.
    mesh: where the clients axis is spread over devices; None on one. Set by
      `parallel.place`.
    padding: rows at the end of the clients axis that are nobody, so that the
      rest spreads evenly. Everything but arrays' shapes ignores them.
  """

  ids: Array
  images: Array
  labels: Array
  mask: Array
  poisoned: Array
  attacker: Array
  attack_start: Array
  attack_end: Array
  scale: Array
  rate: Array
  attack_rate: Array
  trigger: triggers.Trigger
  mesh: jax.sharding.Mesh | None = struct.field(pytree_node=False, default=None)
  padding: int = struct.field(pytree_node=False, default=0)

  @property
  def num_clients(self) -> int:
    """Length of the clients axis without padding."""
    return self.ids.shape[0] - self.padding


def create(
  images: np.ndarray,
  labels: np.ndarray,
  partition: partitions.Partition,
  *,
  num_attackers: int = 0,
  pieces: list[triggers.Trigger] | None = None,
  attack_start: int = 0,
  attack_rounds: int = 0,
) -> Federation:
  """Gathers each client's images.

  The first `num_attackers` clients are marked as attackers; what they do with
  their data is the business of `attacks`.

  Args:
    images: [train, height, width, channels], uint8 or floating point in
      [0, 1].
    labels: int32 [train], from 0.
    partition: who gets which image.
    num_attackers: how many clients are malicious.
    pieces: triggers of the attackers; attacker i gets piece i mod len(pieces).
      None stamps nothing.
    attack_start: the first round (from 0) in which attackers attack.
    attack_rounds: for how many rounds they do; 0 for good.

  Returns:
    The federation, without poisoned samples, with γ = 1 and everybody's
    local steps as they are.

  Raises:
    errors.DataError: see `data.require_usable`.
    errors.ConfigError: there are more attackers than clients.
  """
  data.require_usable(images, labels)
  clients = partition.indices.shape[0]
  if num_attackers > clients:
    raise errors.ConfigError(
      f"{num_attackers} attackers are more than the {clients} clients."
    )
  ids = np.arange(clients, dtype=np.int32)
  pieces = pieces or [triggers.from_pixels([], images.shape[1:])]
  end = attack_start + attack_rounds if attack_rounds else NEVER
  return Federation(
    ids=jnp.asarray(ids),
    images=jnp.asarray(images[partition.indices]),
    labels=jnp.asarray(labels[partition.indices], jnp.int32),
    mask=jnp.asarray(partition.mask),
    poisoned=jnp.zeros(partition.indices.shape, bool),
    attacker=jnp.asarray(ids < num_attackers),
    attack_start=jnp.full(clients, attack_start, jnp.int32),
    attack_end=jnp.full(clients, min(end, NEVER), jnp.int32),
    scale=jnp.ones(clients, jnp.float32),
    rate=jnp.ones(clients, jnp.float32),
    attack_rate=jnp.ones(clients, jnp.float32),
    trigger=jax.tree.map(
      lambda *leaves: jnp.stack(leaves)[ids % len(pieces)], *pieces
    ),
  )


def select(federation: Federation, clients: Array) -> Federation:
  """The cohort of the given positions.

  Args:
    federation: with a leading clients axis.
    clients: int32 [cohort], positions on that axis; a scalar drops the axis.

  Returns:
    The federation of those clients, on no mesh.
  """
  chosen = jax.tree.map(lambda leaf: leaf[clients], federation)
  return chosen.replace(mesh=None, padding=0)


def active_attackers(federation: Federation, round_index: Array) -> Array:
  """Which clients attack in a round: bool [clients]."""
  begun = round_index >= federation.attack_start
  return federation.attacker & begun & (round_index < federation.attack_end)


def training_mask(federation: Federation, active: Array) -> Array:
  """Which samples count: bool [..., samples].

  Args:
    federation: with or without the clients axis.
    active: bool [...], whether the client attacks now. While it does not, its
      poisoned samples are left out.

  Returns:
    The mask.
  """
  return federation.mask & (~federation.poisoned | active[..., jnp.newaxis])


def poisoned_only(federation: Federation) -> Federation:
  """The same clients with none but their backdoored samples."""
  return federation.replace(mask=federation.mask & federation.poisoned)
