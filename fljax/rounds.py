"""The federated round, and blocks of rounds as one compiled program.

A round is a pure function: sample a cohort, train its clients from the global
model, apply the attack to their stacked updates, aggregate, step. Fine-tuning
is the same round: the server's state carries the neuron mask. On a mesh the
cohort is spread over the devices; the server's state is the same on all.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any
from typing import Protocol

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fljax import aggregators
from fljax import attacks
from fljax import errors
from fljax import evaluate
from fljax import federation as federations
from fljax import local
from fljax import models
from fljax import parallel

Array = jax.Array
Params = models.Params


class ServerState(struct.PyTreeNode):
  """What the server carries from round to round.

  Attributes:
    params: the global model.
    neuron_mask: bool [neurons], False for pruned neurons, held at zero.
    aggregator: the aggregator's own state.
    round: int32 scalar, rounds done so far.
    memory: what attackers remember of the round before, if they do
      (`attacks.RememberHook`): theirs, and of no use to the server.
    told: what the server tells clients beside the model, if it does; the same
      in all rounds.
  """

  params: Params
  neuron_mask: Array
  aggregator: Any
  round: Array
  memory: Any = ()
  told: Any = ()


class RoundMetrics(struct.PyTreeNode):
  """What a round, or the last of a block, tells.

  Attributes:
    loss: float32 scalar, mean training loss over the cohort's clients that
      have samples, or over those of a finite loss if the aggregator is no
      weighted sum. 0 if there was no round.
    bad_round: int32 scalar, the first round (from 1) whose loss or model was
      not finite; 0 if there was none.
    accuracies: float32 scalars by name, of the model after the round on each
      of the block's examples.
  """

  loss: Array
  bad_round: Array
  accuracies: dict[str, Array] = struct.field(default_factory=dict)


Round = Callable[
  [ServerState, federations.Federation, Array],
  tuple[ServerState, RoundMetrics],
]


class Block(Protocol):
  """Rounds of training as one program."""

  def __call__(
    self,
    state: ServerState,
    federation: Any,
    key: Array,
    rounds: Array | int,
    examples: dict[str, evaluate.Examples] | None = None,
  ) -> tuple[ServerState, RoundMetrics]:
    """Runs some rounds, then evaluates the model.

    Args:
      state: donated: the caller's copy is gone.
      federation: all clients; a `Population` for a `make_streamed_block`.
      key: random key of the whole training.
      rounds: how many; 0 only evaluates.
      examples: what to evaluate the model on, by name.

    Returns:
      The state, and the metrics of the last round; `bad_round` is the first
      bad one.
    """


def init_state(
  model: models.Model,
  aggregator: aggregators.Aggregator,
  key: Array,
  attack: attacks.Attack | None = None,
) -> ServerState:
  """A fresh model, no neuron pruned, no round done.

  Args:
    model: the network.
    aggregator: begins with a state of its own.
    key: random key of the initial weights.
    attack: only needed if it remembers (`attacks.RememberHook`).

  Returns:
    The state.
  """
  # Compiled: op by op, it takes longer than the rest of a second start.
  params = jax.jit(model.init)(key)
  memory: Any = ()
  if attack is not None and attack.remember is not None:
    memory = jax.jit(attack.remember)(jax.tree.map(jnp.zeros_like, params))
  return ServerState(
    params=params,
    neuron_mask=jnp.ones(model.neurons, bool),
    aggregator=aggregator.init(params),
    round=jnp.zeros((), jnp.int32),
    memory=memory,
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


def chosen_in_round(
  ids: Array, size: int, key: Array, round_index: Array
) -> Array:
  """Who takes part in a round: see `sample_cohort`.

  Args:
    ids: int32 [clients].
    size: clients to choose.
    key: random key of the whole training.
    round_index: from 0.

  Returns:
    int32 [size], positions.
  """
  sample_key, _ = jax.random.split(jax.random.fold_in(key, round_index))
  return sample_cohort(ids, size, sample_key)


def make_round(
  model: models.Model,
  train: local.LocalTraining,
  *,
  attack: attacks.Attack,
  aggregator: aggregators.Aggregator,
  cohort_size: int = 0,
  server_rate: float = 1.0,
  client_chunk: int = 0,
  schedule: Callable[[Array], Array | float] | None = None,
) -> Round:
  """Builds the federated round.

  ω_{t+1} = ω_t + η·aggregate(attack(Δω_1, ..., Δω_cohort)), projected onto
  the models whose pruned neurons are zero.

  Args:
    model: the network.
    train: one client's training.
    attack: its hook on the updates is applied, and what it remembers kept.
    aggregator: combines the updates.
    cohort_size: clients sampled per round, without replacement (k·N of
      Section III-A); 0 takes all, in order.
    server_rate: η.
    client_chunk: clients trained at once on a device, see
      `parallel.map_clients`; memory grows with it, unless the aggregator or
      the attack needs all updates at once.
    schedule: of local learning rates: from the rounds done so far, an int32
      scalar, what every client's local steps are multiplied by. None does
      not change them.

  Returns:
    The round: (state, federation, key) -> (state, metrics). The key is that
    of the whole training; the round's own is derived from it and from
    `state.round`, each client's from its id, so that neither the order of the
    clients nor an interruption changes any of them.

  Raises:
    errors.ConfigError: the chunk is below 0; or, by the round, the cohort is
      larger than the federation, or the attack remembers and the state was made
      without it.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Sections III-A, III-C and IV-B (Equation 2).
  """
  if client_chunk < 0:
    raise errors.ConfigError(
      f"client_chunk={client_chunk}: it is from 0, which trains all at once."
    )

  remember = attack.remember

  def local_update(
    common: tuple[Any, ...],
    client: federations.Federation,
    active: Array,
  ) -> tuple[Params, Array]:
    params, neuron_mask, key, told, *memory = common
    client_key = jax.random.fold_in(key, client.ids)
    own = {"told": told} if jax.tree.leaves(told) else {}
    after, loss = train(
      params, client, neuron_mask, active, client_key, *memory, **own
    )
    return jax.tree.map(jnp.subtract, after, params), loss

  def attacked_updates(
    common: Any, clients: federations.Federation, active: Array
  ) -> tuple[Any, Array]:
    updates, losses = parallel.each(local_update)(common, clients, active)
    sent = attack.updates(updates, clients, active)
    if remember is None:
      return sent, losses
    return (sent, _without(updates, active)), losses

  def run(
    state: ServerState, federation: federations.Federation, key: Array
  ) -> tuple[ServerState, RoundMetrics]:
    _, client_key = jax.random.split(jax.random.fold_in(key, state.round))
    _check_cohort(cohort_size, federation.num_clients)
    if 0 < cohort_size < federation.num_clients:
      ids = federation.ids[: federation.num_clients]
      chosen = chosen_in_round(ids, cohort_size, key, state.round)
      cohort = parallel.gather_cohort(federation, chosen)
    else:
      cohort = federation
    if schedule is not None:
      cohort = cohort.replace(rate=cohort.rate * schedule(state.round))
    active = federations.active_attackers(cohort, state.round)
    counts = federations.training_mask(cohort, active).sum(axis=1)
    weights = counts[: cohort.num_clients].astype(jnp.float32)
    common: tuple[Any, ...] = (
      state.params,
      state.neuron_mask,
      client_key,
      state.told,
    )
    if remember is not None:
      shapes = jax.eval_shape(remember, state.params)
      wanted: Any = jax.tree.structure(shapes)
      if wanted != jax.tree.structure(state.memory):
        raise errors.ConfigError(
          "the server's state was made without the attack, which remembers:"
          " give it to init_state."
        )
      common = (*common, state.memory)
    benign = (~active[: cohort.num_clients]).astype(jnp.float32)
    memory = state.memory
    if aggregator.shares is not None and attack.rowwise:
      shares = aggregator.shares(weights)
      update, losses = parallel.sum_over_clients(
        attacked_updates, common, shares, cohort, active, chunk=client_chunk
      )
      if remember is not None:
        update, others = update
        memory = remember(_over(others, (shares * benign).sum()))
      aggregator_state = state.aggregator
    else:
      updates, losses = parallel.map_clients(
        local_update, common, cohort, active, chunk=client_chunk
      )
      if remember is not None:
        # One that is not finite stops no rule that withstands it.
        known, finite = aggregators.finite_rows(updates)
        shares = benign * finite
        if aggregator.shares is not None:
          shares *= aggregator.shares(weights)
        total = aggregators.weighted_sum(known, shares)
        memory = remember(_over(total, shares.sum()))
      updates = attack.updates(
        updates,
        parallel.without_padding(cohort),
        active[: cohort.num_clients],
      )
      update, aggregator_state = aggregator.update(
        updates, weights, state.aggregator
      )
    params = jax.tree.map(
      lambda old, change: old + server_rate * change, state.params, update
    )
    params = models.mask_neurons(model, params, state.neuron_mask)
    trains = weights > 0
    if aggregator.shares is None:
      # A rule that withstands a client whose training is not finite shall not
      # be stopped by that client's loss.
      known = trains & jnp.isfinite(losses)
      loss = jnp.nanmean(jnp.where(known, losses, jnp.nan))
      loss = jnp.where(trains.any(), loss, 0)
    else:
      count = jnp.maximum(trains.astype(losses.dtype).sum(), 1)
      loss = jnp.where(trains, losses, 0).sum() / count
    finite = jnp.isfinite(loss)
    for leaf in jax.tree.leaves(params):
      finite &= jnp.isfinite(leaf).all()
    state = state.replace(
      params=params,
      aggregator=aggregator_state,
      round=state.round + 1,
      memory=memory,
    )
    return state, RoundMetrics(
      loss=loss, bad_round=jnp.where(finite, 0, state.round)
    )

  return run


def _without(updates: Params, active: Array) -> Params:
  """Updates [cohort, ...], zero where a client attacks, whatever it sends."""
  return jax.tree.map(
    lambda leaf: jnp.where(
      active.reshape(-1, *(1,) * (leaf.ndim - 1)), 0, leaf
    ),
    updates,
  )


def _over(total: Params, weight: Array) -> Params:
  """A sum of weight 0 is nobody's."""
  return jax.tree.map(lambda leaf: leaf / jnp.where(weight, weight, 1), total)


def make_block(model: models.Model, run_round: Round) -> Block:
  """Builds a block of rounds: one program for any number of them.

  The number is an argument of the program, not of its compilation, and the
  loop's body is compiled once: however training is cut into blocks, the bits
  of its result are the same.

  Args:
    model: the network, to evaluate.
    run_round: the round.

  Returns:
    The block.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def run(
    state: ServerState,
    federation: federations.Federation,
    key: Array,
    rounds: Array | int,
    examples: dict[str, evaluate.Examples] | None = None,
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

    state, metrics = lax.fori_loop(0, rounds, body, (state, _no_round()))
    return state, metrics.replace(
      accuracies=_accuracies(model, state.params, examples)
    )

  return run


def make_streamed_block(
  model: models.Model, run_round: Round, cohort_size: int
) -> Block:
  """Blocks of rounds over a `Population`: one program per round.

  Args:
    model: the network, to evaluate.
    run_round: the round, without client sampling.
    cohort_size: clients per round; who they are, and every random number, is
      as if `make_round` sampled them.

  Returns:
    The block. The host chooses and gathers the next cohort while the device
    trains.
  """
  one_round = jax.jit(run_round, donate_argnums=0)
  measure = jax.jit(functools.partial(_accuracies, model))
  choose = jax.jit(chosen_in_round, static_argnums=1)

  def run(
    state: ServerState,
    federation: Any,
    key: Array,
    rounds: Array | int,
    examples: dict[str, evaluate.Examples] | None = None,
  ) -> tuple[ServerState, RoundMetrics]:
    # Choosing is the host's: on one device, whatever the mesh.
    bits = np.asarray(jax.random.key_data(key))
    own_key = jax.random.wrap_key_data(
      jnp.asarray(bits), impl=jax.random.key_impl(key)
    )

    _check_cohort(cohort_size, federation.num_clients)

    ids, first = federation.clients.ids, int(state.round)
    # Of all rounds, before any of them: a device does one thing after another,
    # and the next choice would wait for the round in progress.
    chosen = jax.device_get(
      [
        choose(ids, cohort_size, own_key, np.int32(index))
        for index in range(first, first + int(rounds))
      ]
    )
    metrics = _no_round()
    bad_rounds: list[Array] = []
    waiting = federation.cohort(chosen[0]) if chosen else None
    for following in range(1, len(chosen) + 1):
      state, metrics = one_round(state, waiting, key)
      if bad_rounds:
        # No more than two cohorts are on the device.
        jax.block_until_ready(bad_rounds[-1])
      bad_rounds.append(metrics.bad_round)
      more = following < len(chosen)
      waiting = federation.cohort(chosen[following]) if more else None
    bad = next((one for one in bad_rounds if int(one)), metrics.bad_round)
    return state, metrics.replace(
      bad_round=bad, accuracies=measure(state.params, examples)
    )

  return run


def _check_cohort(size: int, clients: int) -> None:
  if size > clients:
    raise errors.ConfigError(
      f"a cohort of {size} clients is more than the {clients} that there are."
    )


def _no_round() -> RoundMetrics:
  return RoundMetrics(
    loss=jnp.zeros((), jnp.float32), bad_round=jnp.zeros((), jnp.int32)
  )


def _accuracies(
  model: models.Model,
  params: Params,
  examples: dict[str, evaluate.Examples] | None,
) -> dict[str, Array]:
  return {
    name: evaluate.accuracy(model, params, chosen)
    for name, chosen in (examples or {}).items()
  }
