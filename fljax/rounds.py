"""The federated round, and blocks of rounds as one compiled program.

A round is a pure function: sample a cohort, train its clients from the global
model, apply the attack to their stacked updates, aggregate, step. Fine-tuning
is the same round: the server's state carries the neuron mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from fljax import aggregators
from fljax import attacks
from fljax import federation as federations
from fljax import local
from fljax import models

Array = jax.Array
Params = models.Params


class ServerState(struct.PyTreeNode):
  """What the server carries from round to round.

  Attributes:
    params: the global model.
    neuron_mask: bool [neurons], False for pruned neurons, held at zero.
    aggregator: the aggregator's own state.
    round: int32 scalar, rounds done so far.
  """

  params: Params
  neuron_mask: Array
  aggregator: Any
  round: Array


class RoundMetrics(struct.PyTreeNode):
  """What a round, or the last of a block, tells.

  Attributes:
    loss: float32 scalar, mean training loss over the cohort's clients.
    bad_round: int32 scalar, the first round (from 1) whose loss or model was
      not finite; 0 if there was none.
  """

  loss: Array
  bad_round: Array


Round = Callable[
  [ServerState, federations.Federation, Array],
  tuple[ServerState, RoundMetrics],
]
Block = Callable[
  [ServerState, federations.Federation, Array, Array | int],
  tuple[ServerState, RoundMetrics],
]


def init_state(
  model: models.Model, aggregator: aggregators.Aggregator, key: Array
) -> ServerState:
  """A fresh model, no neuron pruned, no round done."""
  params = model.init(key)
  return ServerState(
    params=params,
    neuron_mask=jnp.ones(model.neurons, bool),
    aggregator=aggregator.init(params),
    round=jnp.zeros((), jnp.int32),
  )


def sample_cohort(ids: Array, size: int, key: Array) -> Array:
  """Samples clients uniformly, without replacement.

  Args:
    ids: int32 [clients]; who is chosen depends on these, not on positions.
    size: clients to choose.
    key: the round's random key.

  Returns:
    int32 [size], positions.
  """
  scores = jax.vmap(
    lambda client: jax.random.uniform(jax.random.fold_in(key, client))
  )(ids)
  return jnp.argsort(scores)[:size]


def make_round(
  model: models.Model,
  train: local.LocalTraining,
  *,
  attack: attacks.Attack,
  aggregator: aggregators.Aggregator,
  cohort_size: int = 0,
  server_rate: float = 1.0,
  client_chunk: int = 0,
) -> Round:
  """Builds the federated round.

  ω_{t+1} = ω_t + η·aggregate(attack(Δω_1, ..., Δω_cohort)), projected onto
  the models whose pruned neurons are zero.

  Args:
    model: the network.
    train: one client's training.
    attack: its hook on the updates is applied.
    aggregator: combines the updates.
    cohort_size: clients sampled per round, without replacement (k·N of
      Section III-A); 0 takes all, in order.
    server_rate: η.
    client_chunk: clients trained at once, see `local.map_clients`.

  Returns:
    The round: (state, federation, key) -> (state, metrics). The key is that
    of the whole training; the round's own is derived from it and from
    `state.round`, each client's from its id, so that neither the order of the
    clients nor an interruption changes any of them.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Sections III-A, III-C and IV-B (Equation 2).
  """

  def run(
    state: ServerState, federation: federations.Federation, key: Array
  ) -> tuple[ServerState, RoundMetrics]:
    round_key = jax.random.fold_in(key, state.round)
    sample_key, client_key = jax.random.split(round_key)
    if 0 < cohort_size < federation.num_clients:
      chosen = sample_cohort(federation.ids, cohort_size, sample_key)
      cohort = federations.select(federation, chosen)
    else:
      cohort = federation
    active = federations.active_attackers(cohort, state.round)

    def one_client(
      client: federations.Federation, active: Array
    ) -> tuple[Params, Array]:
      params, loss = train(
        state.params,
        client,
        state.neuron_mask,
        active,
        jax.random.fold_in(client_key, client.ids),
      )
      return jax.tree.map(jnp.subtract, params, state.params), loss

    updates, losses = local.map_clients(one_client, client_chunk)(
      cohort, active
    )
    updates = attack.updates(updates, cohort, active)
    counts = federations.training_mask(cohort, active).sum(axis=1)
    update, aggregator_state = aggregator.update(
      updates, counts.astype(jnp.float32), state.aggregator
    )
    params = jax.tree.map(
      lambda old, change: old + server_rate * change, state.params, update
    )
    params = models.mask_neurons(model, params, state.neuron_mask)
    loss = losses.mean()
    finite = jnp.isfinite(loss)
    for leaf in jax.tree.leaves(params):
      finite &= jnp.isfinite(leaf).all()
    state = state.replace(
      params=params, aggregator=aggregator_state, round=state.round + 1
    )
    return state, RoundMetrics(
      loss=loss, bad_round=jnp.where(finite, 0, state.round)
    )

  return run


def make_block(run_round: Round) -> Block:
  """Builds a block of rounds: one program for any number of them.

  The number is an argument of the program, not of its compilation, and the
  loop's body is compiled once: however training is cut into blocks, the bits
  of its result are the same.

  Args:
    run_round: the round.

  Returns:
    (state, federation, key, rounds) -> (state, metrics of the last round;
    `bad_round` of the first bad one). It donates the state: the caller's copy
    is gone.
  """

  def run(
    state: ServerState,
    federation: federations.Federation,
    key: Array,
    rounds: Array,
  ) -> tuple[ServerState, RoundMetrics]:
    def body(
      _: Array, carry: tuple[ServerState, RoundMetrics]
    ) -> tuple[ServerState, RoundMetrics]:
      state, before = carry
      state, metrics = run_round(state, federation, key)
      first = jnp.where(
        before.bad_round > 0, before.bad_round, metrics.bad_round
      )
      return state, metrics.replace(bad_round=first)

    nothing = RoundMetrics(
      loss=jnp.zeros((), jnp.float32), bad_round=jnp.zeros((), jnp.int32)
    )
    return lax.fori_loop(0, rounds, body, (state, nothing))

  return jax.jit(run, donate_argnums=0)
