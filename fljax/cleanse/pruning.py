"""Federated pruning: ranks (RAP) or votes (MVP) -> order -> masks -> curve.

A neuron mask is bool [neurons], True for neurons that stay. The pruning
sequence has neurons + 1 steps: step k is the model without the first k
neurons of the order.
"""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp

from fljax import evaluate
from fljax import execution
from fljax import federation as federations
from fljax import models
from fljax.cleanse import reports

Array = jax.Array


def ranks(means: Array) -> Array:
  """Each client's ranking: rank 1 is its most active neuron.

  Invariant under strictly increasing transforms of a client's activations.
  Equally active neurons are ranked by their index.

  Args:
    means: [clients, neurons], mean activations a_i.

  Returns:
    int32 [clients, neurons], each row a permutation of 1, ..., neurons.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section IV-A1: R_{i,n}, "in decreasing order of
    recorded activation".
  """
  order = jnp.argsort(-means, axis=1, stable=True)
  return (jnp.argsort(order, axis=1) + 1).astype(jnp.int32)


def votes(means: Array, rate: float) -> Array:
  """Each client's votes: 1 for the neurons that it would prune.

  A client votes to prune its least active neurons. (The paper calls V a vote
  "on whether to keep" a neuron; as its mean over neurons is the pruning rate
  p, V = 1 can only mean pruning.)

  Args:
    means: [clients, neurons], mean activations a_i.
    rate: p in [0, 1]; round(p · neurons) votes are cast.

  Returns:
    int32 [clients, neurons] of 0 and 1.

  References:
    The paper, Section IV-A2: V_{i,n}.
  """
  neurons = means.shape[1]
  kept = neurons - round(rate * neurons)
  return (ranks(means) > kept).astype(jnp.int32)


def rank_scores(means: Array) -> Array:
  """RAP: R_i, the mean rank of each neuron over clients; float32 [neurons]."""
  return ranks(means).mean(axis=0, dtype=jnp.float32)


def vote_scores(means: Array, rate: float) -> Array:
  """MVP: V_i, the share of clients that vote to prune; float32 [neurons]."""
  return votes(means, rate).mean(axis=0, dtype=jnp.float32)


# Name -> function of means [clients, neurons] and p -> scores [neurons]; the
# neuron with the largest score is pruned first.
SCORES: dict[str, Callable[[Array, float], Array]] = {
  "rap": lambda means, rate: rank_scores(means),
  "mvp": vote_scores,
}


def pruning_order(scores: Array) -> Array:
  """The global pruning sequence: the largest score goes first.

  The largest mean rank is the least active neuron, the largest share of votes
  the one most wanted away, the largest gain (`weights.gains`) the one most
  easily raised. Votes tie heavily with few voters, and the server has nothing
  but the scores: the lower index goes first.

  Args:
    scores: [neurons].

  Returns:
    int32 [neurons], a permutation of the neurons.
  """
  return jnp.argsort(-scores, stable=True).astype(jnp.int32)


def mask_without_first(order: Array, count: Array | int) -> Array:
  """The neuron mask after pruning the first `count` neurons of an order.

  Args:
    order: int32 [neurons].
    count: 0, ..., neurons.

  Returns:
    bool [neurons].
  """
  return jnp.argsort(order) >= count


@functools.partial(jax.jit, static_argnums=0)
@execution.exact
def pruning_curve(
  model: models.Model,
  params: models.Params,
  order: Array,
  examples: evaluate.Examples,
) -> Array:
  """Accuracy at every step of the pruning sequence.

  Activations are computed once; only what follows the target convolution is
  computed per step.

  Args:
    model: the network.
    params: the unpruned model.
    order: int32 [neurons], the pruning sequence.
    examples: what accuracy is measured on.

  Returns:
    float32 [neurons + 1]; entry k is without the first k neurons.

  References:
    The paper, Algorithm 1, "Federated Pruning", and Fig. 5.
  """

  def one_batch(batch: evaluate.Examples) -> Array:
    active = model.activations(params, model.stem(params, batch.images))
    return right_along(model, params, order, active, batch.labels, batch.mask)

  hits = lax.map(one_batch, examples).sum(axis=(0, 2))
  return evaluate.share(hits, examples.mask)


@functools.partial(jax.jit, static_argnums=0)
def client_curves(
  model: models.Model,
  params: models.Params,
  order: Array,
  federation: federations.Federation,
) -> Array:
  """The accuracies that clients report when the server cannot validate.

  Each client measures every step on samples of its own.

  Args:
    model: the network.
    params: the unpruned model.
    order: int32 [neurons], sent back by the server.
    federation: all clients.

  Returns:
    float32 [clients, neurons + 1].

  References:
    The paper, Section IV-A ("it can pass the global pruning sequence back to
    each client").
  """

  def one_batch(
    common: tuple[models.Params, Array],
    images: Array,
    labels: Array,
    mask: Array,
  ) -> Array:
    params, order = common
    active = model.activations(params, model.stem(params, images))
    right = right_along(model, params, order, active, labels, mask)
    return right.sum(axis=1)

  return reports.client_mean(one_batch, (params, order), federation)


def right_along(
  model: models.Model,
  params: models.Params,
  order: Array,
  active: Array,
  labels: Array,
  mask: Array,
) -> Array:
  """Which examples of a batch are right at every step of the sequence.

  Args:
    model: the network.
    params: the unpruned model.
    order: int32 [neurons].
    active: [batch, ..., neurons], unpruned activations.
    labels: int32 [batch].
    mask: bool [batch].

  Returns:
    bool [neurons + 1, batch].
  """
  if model.neuron_sums is not None:
    # From the model without any neuron upwards: sums without cancellation.
    taken = model.neuron_sums(params, active)
    backwards = order[::-1]

    def add(sums: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
      inputs, weights = part
      right = evaluate.right(taken.rest(sums), labels, mask)
      return sums + inputs @ weights, right

    start = jnp.broadcast_to(taken.offset, (len(labels), len(taken.offset)))
    sums, right = lax.scan(
      add, start, (taken.inputs[backwards], taken.weights[backwards])
    )
    unpruned = evaluate.right(taken.rest(sums), labels, mask)
    return jnp.concatenate([unpruned[jnp.newaxis], right[::-1]])

  place = jnp.argsort(order)

  def one_step(count: Array) -> Array:
    stays = (place >= count).reshape((1,) * (active.ndim - 1) + (-1,))
    logits = model.head(params, jnp.where(stays, active, 0))
    return evaluate.right(logits, labels, mask)

  return lax.map(one_step, jnp.arange(model.neurons + 1))
