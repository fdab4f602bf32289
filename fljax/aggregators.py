"""How the server combines the stacked updates of a cohort."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax
from jax import lax
import jax.numpy as jnp

from fljax import errors
from fljax import models

Array = jax.Array
Params = Any


class AggregatorUpdate(Protocol):
  """Combines a round's updates."""

  def __call__(
    self, updates: Params, weights: Array, state: Any
  ) -> tuple[Params, Any]:
    """Combines updates.

    Args:
      updates: each leaf [cohort, ...], local model minus global model.
      weights: float32 [cohort], each client's number of samples n_i.
      state: the aggregator's own state.

    Returns:
      One update, each leaf [...], and the next state.
    """


class Aggregator(NamedTuple):
  """Pure functions.

  Attributes:
    init: params -> state.
    update: see `AggregatorUpdate`.
    shares: weights [cohort] -> shares [cohort], if the rule is a sum
      Σ share_i·Δω_i without a state. Such a sum is formed while clients train
      and the stacked updates are never held. None: `update` needs them all.
  """

  init: Callable[[Params], Any]
  update: AggregatorUpdate
  shares: Callable[[Array], Array] | None = None


def linear(shares: Callable[[Array], Array]) -> Aggregator:
  """The rule Σ share_i·Δω_i.

  Args:
    shares: weights [cohort] -> shares [cohort].

  Returns:
    The aggregator.
  """

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    return weighted_sum(updates, shares(weights)), state

  return Aggregator(init=lambda params: (), update=update, shares=shares)


def weighted_sum(updates: Params, shares: Array) -> Params:
  """Σ share_i·Δω_i over the leading axis of every leaf."""
  return jax.tree.map(
    lambda leaf: jnp.tensordot(
      # Or accelerators would round the updates.
      shares.astype(leaf.dtype),
      leaf,
      axes=1,
      precision="highest",
    ),
    updates,
  )


def mean() -> Aggregator:
  """The plain mean: ω + (1/N)·ΣΔω_i, the paper's simplified rule.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section III-A, second equation.
  """
  return linear(lambda weights: jnp.full_like(weights, 1 / len(weights)))


def weighted_mean() -> Aggregator:
  """The mean weighted by numbers of samples: Σn_i·Δω_i / Σn_i.

  Clients without any sample have no weight; a cohort without any changes
  nothing.

  References:
    Communication-Efficient Learning of Deep Networks from Decentralized Data
    (McMahan et al.), Algorithm 1; in the paper Section III-A, first equation.
  """
  return linear(lambda weights: weights / jnp.maximum(weights.sum(), 1))


def left_out(clients: int, share: float) -> int:
  """How many clients may be malicious, f.

  Of so many the highest reports, and of so many the lowest, are left out.

  Args:
    clients: how many report.
    share: of them, in [0, 0.5].

  Returns:
    `ceil(share · clients)`, or fewer, so that of what is left out on each side
    at least one remains.
  """
  return min(math.ceil(share * clients - 1e-9), (clients - 1) // 2)


def trimmed_mean(share: float = 0.2) -> Aggregator:
  """The mean of each parameter's updates without the most extreme ones.

  As long as attackers are no more than what is left out on a side, every
  parameter's update lies between two honest ones, whatever they send; what is
  not a number counts as infinite. Benign clients of few labels are extreme as
  well, so it costs some of what they learn.

  Args:
    share: of the cohort, on each side, in [0, 0.5], see `left_out`.

  Returns:
    The aggregator; it needs all updates at once.

  References:
    Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
    (Yin, Chen, Ramchandran, Bartlett), Definition 2.
  """

  def combine(leaf: Array) -> Array:
    known = jnp.where(jnp.isnan(leaf), jnp.inf, leaf)
    return _mean_of_middle(known, left_out(len(leaf), share))

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    del weights
    return jax.tree.map(combine, updates), state

  return Aggregator(init=lambda params: (), update=update)


def median() -> Aggregator:
  """The median of each parameter's updates; of an even number, the middle two.

  References:
    As for `trimmed_mean`, Definition 1.
  """
  return trimmed_mean(0.5)


def krum(share: float = 0.2) -> Aggregator:
  """The one update that lies nearest to most others.

  It has the least sum of squared distances to its n − f − 2 nearest, over all
  that is sent, batch normalisation's running statistics included. Where clients
  hold few labels each, it is one client's model, of those labels.

  Args:
    share: of the cohort that may be malicious, for f, see `left_out`. What is
      proved of it holds for 2f + 2 < n.

  Returns:
    The aggregator; it needs all updates at once.

  References:
    Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
    (Blanchard, El Mhamdi, Guerraoui, Stainer), Section 4.
  """

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    malicious = left_out(len(weights), share)
    chosen = jnp.argmin(_krum_scores(updates, malicious))
    return jax.tree.map(lambda leaf: leaf[chosen], updates), state

  return Aggregator(init=lambda params: (), update=update)


def multi_krum(share: float = 0.2) -> Aggregator:
  """The mean of the n − f updates with the least scores of Krum.

  Args:
    share: as for `krum`.

  Returns:
    The aggregator; it needs all updates at once.

  References:
    As for `krum`, "Multi-Krum".
  """

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    malicious = left_out(len(weights), share)
    chosen = jnp.argsort(_krum_scores(updates, malicious))
    chosen = chosen[: len(weights) - malicious]
    shares = jnp.zeros_like(weights).at[chosen].set(1 / len(chosen))
    # Or what is not finite would come in at a share of 0, too.
    known, _ = finite_rows(updates)
    return weighted_sum(known, shares), state

  return Aggregator(init=lambda params: (), update=update)


def _inner_products(updates: Params) -> Array:
  """[cohort, cohort], of all that is sent."""
  rows = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(updates)]
  products = [jnp.matmul(one, one.T, precision="highest") for one in rows]
  return jnp.stack(products).sum(axis=0)


def _krum_scores(updates: Params, malicious: int) -> Array:
  """[cohort], infinite of what is not finite."""
  inner = _inner_products(updates)
  squares = jnp.diagonal(inner)
  distances = jnp.maximum(squares[:, None] + squares[None] - 2 * inner, 0)
  distances = jnp.where(jnp.isfinite(distances), distances, jnp.inf)
  near = max(len(squares) - malicious - 2, 1)
  # The nearest of all is the update itself.
  return jnp.sort(distances, axis=1)[:, 1 : near + 1].sum(axis=1)


def geometric_median(steps: int = 8) -> Aggregator:
  """What has the least sum of distances to the updates.

  By the smoothed Weiszfeld algorithm, from the median of each parameter.
  Distances are over all that is sent, batch normalisation's running statistics
  included. Less than half of the clients cannot take it arbitrarily far,
  whatever they send; what is not finite is left out, but counts as zeros in
  that median.

  Args:
    steps: of the algorithm.

  Returns:
    The aggregator; it needs all updates at once.

  References:
    Robust Aggregation for Federated Learning (Pillutla, Kakade, Harchaoui),
    Algorithm 2, every client weighing the same.
  """

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    del weights
    known, finite = finite_rows(updates)
    start, _ = median().update(known, finite, ())
    *_, found = lax.fori_loop(0, steps, _weiszfeld, (known, finite, start))
    return found, state

  return Aggregator(init=lambda params: (), update=update)


# Cosine distances below it, angles of less than a degree, may be rounding: of
# 10,000 values in float32 up to 4e-6 were seen, and models are larger.
_SAME = 1e-4
# Distances below it count as it: ν, the usual value.
_SMOOTHING = 1e-6


def _weiszfeld(
  step: Array, carry: tuple[Params, Array, Params]
) -> tuple[Params, Array, Params]:
  """One step towards the geometric median: (updates, who counts, guess)."""
  del step
  known, counts, guess = carry
  away = jax.tree.map(lambda leaf, one: leaf - one[None], known, guess)
  distances = jnp.sqrt(_squared_norms(away))
  shares = counts / jnp.maximum(distances, _SMOOTHING)
  return known, counts, weighted_sum(known, shares / shares.sum())


def norm_clipping() -> Aggregator:
  """The mean of updates none of which is longer than the median one.

  Longer ones are scaled down to it, which takes amplification (γ) away. The
  median norm of a round needs no tuning, and is no attacker's as long as they
  are a minority; batch normalisation's running statistics are clipped apart,
  to the median norm of theirs. What is not finite counts as no change.

  Returns:
    The aggregator; it needs all updates at once.

  References:
    Can You Really Backdoor Federated Learning? (Sun, Kairouz, Suresh, McMahan),
    "Norm thresholding of updates"; the median as in FLAME: Taming Backdoors in
    Federated Learning (Nguyen et al.), Algorithm 1.
  """

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    known, finite = finite_rows(updates)
    mean, _ = _clipped_mean(known, finite, jnp.full_like(weights, 1))
    return mean, state

  return Aggregator(init=lambda params: (), update=update)


def _clipped_mean(
  known: Params, finite: Array, counts: Array
) -> tuple[Params, Array]:
  """The mean of updates none of which is longer than the median one.

  Args:
    known: each leaf [cohort, ...], finite.
    finite: float32 [cohort], whose norm the median is of.
    counts: float32 [cohort], of whom the mean is.

  Returns:
    The mean, and the median norm, of all but running statistics, which are
    clipped apart.
  """
  leaves, form = jax.tree_util.tree_flatten_with_path(known)
  kinds = [models.is_running_statistic(path) for path, _ in leaves]
  clipped: list[Array] = [leaf for _, leaf in leaves]
  bounds = {}
  for kind in set(kinds):
    own = [index for index, one in enumerate(kinds) if one == kind]
    norms = jnp.sqrt(_squared_norms([clipped[index] for index in own]))
    bounds[kind] = jnp.nanmedian(jnp.where(finite, norms, jnp.nan))
    shares = bounds[kind] / jnp.maximum(norms, bounds[kind])
    # Where all are zero, nothing is to be scaled.
    shares = jnp.where(jnp.isfinite(shares), shares, 0) * counts / counts.sum()
    for index in own:
      clipped[index] = weighted_sum(clipped[index], shares)
  return jax.tree.unflatten(form, clipped), bounds[False]


def flame(noise: float = 0.001) -> Aggregator:
  """The mean of a majority of like direction, none long, and a little noise.

  Updates are clustered by the cosine distances between them; those outside the
  majority's cluster are left out, as are updates that are not finite. The rest
  are clipped to the median norm of all, as in `norm_clipping`. To every
  parameter of their mean Gaussian noise is added, whose deviation is a share of
  that norm. Batch normalisation's running statistics are no part of directions
  and get no noise.

  Where clients hold few labels each, their updates are nearly at right angles,
  and directions say little.

  Args:
    noise: λ, the deviation's share of the median norm; 0 adds none.

  Returns:
    The aggregator; it needs all updates at once. Its state is a random key,
    drawn from the bits of the model that it begins with.

  References:
    FLAME: Taming Backdoors in Federated Learning (Nguyen et al., USENIX
    Security 2022), Algorithm 1; λ = 0.001 as there for images. Directions are
    those of updates; there it is models that are compared.
  """

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    del weights
    known, finite = finite_rows(updates)
    steps = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(known)
      if not models.is_running_statistic(path)
    ]
    inner = _inner_products(steps)
    norms = jnp.sqrt(jnp.diagonal(inner))
    lengths = norms[:, None] * norms[None]
    # No direction is orthogonal to all.
    distances = 1 - inner / jnp.where(lengths, lengths, 1)
    # Or rounding would tell equal directions apart.
    distances = jnp.where(distances < _SAME, 0, distances)
    both = finite[:, None] * finite[None] > 0
    members = _densest_majority(
      jnp.where(both, distances, jnp.inf), (finite > 0).sum() // 2 + 1
    )
    mean, bound = _clipped_mean(known, finite, members.astype(jnp.float32))
    state, own = jax.random.split(state)
    deviation = noise * jnp.nan_to_num(bound)

    def noisy(path: tuple[Any, ...], leaf: Array, index: int) -> Array:
      if models.is_running_statistic(path):
        return leaf
      drawn = jax.random.normal(jax.random.fold_in(own, index), leaf.shape)
      return leaf + deviation * drawn

    if noise:
      leaves, form = jax.tree_util.tree_flatten_with_path(mean)
      mean = jax.tree.unflatten(
        form,
        [noisy(*leaf, index) for index, leaf in enumerate(leaves)],
      )
    return mean, state

  def init(params: Params) -> Array:
    # Another seed, or another model to tune, gets other noise.
    total = jnp.stack([leaf.sum() for leaf in jax.tree.leaves(params)]).sum()
    bits = lax.bitcast_convert_type(total.astype(jnp.float32), jnp.uint32)
    return jax.random.fold_in(jax.random.PRNGKey(0), bits)

  return Aggregator(init=init, update=update)


@jax.jit
def _densest_majority(distances: Array, majority: Array) -> Array:
  """Which of some things are in the first cluster that is a majority.

  For hundreds of things it takes a part of a second.

  Clusters grow by single linkage: things that a chain of distances below a
  bound connects are one. The bound rises until a cluster is large enough. That
  is what HDBSCAN's condensed tree comes to if a cluster must be more than half
  of all, a thing is dense by itself (`min_samples=1`) and a single cluster is
  allowed: nothing else is ever a cluster, and what leaves it before it falls
  apart is noise.

  Args:
    distances: [things, things], infinite of what belongs to nothing.
    majority: how many are enough.

  Returns:
    bool [things]; if no cluster is ever large enough, the largest there is.
  """
  count = len(distances)
  bounds = jnp.sort(jnp.where(jnp.isfinite(distances), distances, 4).ravel())

  def connected(bound: Array) -> Array:
    reached = (distances <= bound) | jnp.eye(count, dtype=bool)
    for _ in range((count - 1).bit_length()):
      steps = reached.astype(jnp.float32)
      reached = steps @ steps > 0
    return reached

  def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = ends
    middle = (low + high) // 2
    enough = connected(bounds[middle]).sum(axis=1).max() >= majority
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  ends = jnp.int32(0), jnp.int32(count * count - 1)
  _, found = lax.fori_loop(0, (count * count).bit_length(), halve, ends)
  clusters = connected(bounds[found])
  return clusters[jnp.argmax(clusters.sum(axis=1))]


def robust_learning_rate(share: float = 0.2) -> Aggregator:
  """The mean, in the other direction where clients disagree about the sign.

  A parameter whose updates' signs sum up to less than 2f either way moves away
  from their mean. Batch normalisation's running statistics are averaged: a
  variance that moved away could become negative. What is not finite counts as
  no change.

  Args:
    share: of the cohort that may be malicious, for f, see `left_out`. Of ten
      clients 0.2 makes the threshold 4, its authors' against one attacker.

  Returns:
    The aggregator; it needs all updates at once.

  References:
    Defending Against Backdoors in Federated Learning with Robust Learning Rate
    (Ozdayi, Kantarcioglu, Gel), Algorithm 1.
  """

  def combine(path: tuple[Any, ...], leaf: Array) -> Array:
    known = jnp.where(jnp.isfinite(leaf), leaf, 0)
    mean = weighted_sum(known, jnp.full(len(leaf), 1 / len(leaf)))
    if models.is_running_statistic(path):
      return mean
    agreement = weighted_sum(jnp.sign(known), jnp.ones(len(leaf)))
    threshold = 2 * left_out(len(leaf), share)
    return jnp.where(jnp.abs(agreement) >= threshold, mean, -mean)

  def update(updates: Params, weights: Array, state: Any) -> tuple[Params, Any]:
    del weights
    return jax.tree_util.tree_map_with_path(combine, updates), state

  return Aggregator(init=lambda params: (), update=update)


def _squared_norms(updates: Params) -> Array:
  """Of each client's update, over all leaves; [cohort]."""
  norms = [
    jnp.square(leaf).reshape(len(leaf), -1).sum(axis=1)
    for leaf in jax.tree.leaves(updates)
  ]
  return jnp.stack(norms).sum(axis=0)


def finite_rows(updates: Params) -> tuple[Params, Array]:
  """What is known of updates.

  Args:
    updates: each leaf [cohort, ...].

  Returns:
    The updates, zero where a client's are not all finite or its norm is not,
    and float32 [cohort], 1 where they are.
  """
  finite = jnp.isfinite(_squared_norms(updates))
  known = jax.tree.map(
    lambda leaf: jnp.where(
      finite.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0
    ),
    updates,
  )
  return known, finite.astype(jnp.float32)


# Up to so many rows are sorted by a network of minima and maxima of rows, which
# XLA fuses, more of them in stages of half of all rows each. `jnp.sort` along
# the clients' axis takes some 100 and 20 times as long on a CPU.
_NETWORK = 16
# Of all rows, so many values are sorted at a time: they stay in a core's cache.
_AT_ONCE = 2**18


def _mean_of_middle(leaf: Array, out: int) -> Array:
  """Of each column sorted, the mean without so many at either end.

  Args:
    leaf: [rows, ...] without NaN.
    out: left out on each side, less than half of the rows.

  Returns:
    [...].
  """
  count = len(leaf)
  if count <= _NETWORK:
    return _sorted_by_rows(leaf)[out : count - out].mean(axis=0)
  rows = leaf.reshape(count, -1)
  columns = rows.shape[1]
  width = min(columns, max(1, _AT_ONCE // _power_of_two(count)))
  rows = jnp.pad(rows, ((0, 0), (0, -columns % width)))
  blocks = rows.reshape(count, -1, width)

  def middle(index: Array) -> Array:
    block = lax.dynamic_index_in_dim(blocks, index, 1, keepdims=False)
    return _sorted_in_stages(block)[out : count - out].mean(axis=0)

  means = lax.map(middle, jnp.arange(blocks.shape[1]))
  return means.reshape(-1)[:columns].reshape(leaf.shape[1:])


def _sorted_by_rows(leaf: Array) -> Array:
  """Sorts along the leading axis; work and compilation grow by its square."""
  rows = list(leaf)
  for step in range(len(rows)):
    for low in range(step % 2, len(rows) - 1, 2):
      one, other = rows[low], rows[low + 1]
      rows[low] = jnp.minimum(one, other)
      rows[low + 1] = jnp.maximum(one, other)
  return jnp.stack(rows)


def _power_of_two(count: int) -> int:
  """The first that is no less."""
  return 1 << (count - 1).bit_length()


def _sorted_in_stages(rows: Array) -> Array:
  """Sorts [rows, columns] along the rows by bitonic merges.

  References:
    Sorting Networks and Their Applications (Batcher, 1968).
  """
  count, columns = rows.shape
  size = _power_of_two(count)
  rows = jnp.pad(rows, ((0, size - count), (0, 0)), constant_values=jnp.inf)

  def ordered(one: Array, other: Array, mirrored: bool) -> Array:
    low, high = jnp.minimum(one, other), jnp.maximum(one, other)
    high = high[:, ::-1] if mirrored else high
    return jnp.stack([low, high], axis=1).reshape(size, columns)

  span = 2
  while span <= size:
    # Two sorted halves: the first with the second backwards, ...
    halves = rows.reshape(-1, 2, span // 2, columns)
    rows = ordered(halves[:, 0], halves[:, 1, ::-1], mirrored=True)
    step = span // 4
    while step:
      # ... and each half with itself, ever closer.
      pairs = rows.reshape(-1, 2, step, columns)
      rows = ordered(pairs[:, 0], pairs[:, 1], mirrored=False)
      step //= 2
    span *= 2
  return rows[:count]


# By name: of the share of clients that may be malicious, to whom that is
# something. `extensions.aggregator` adds to them.
AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
  "mean": lambda trim: mean(),
  "weighted": lambda trim: weighted_mean(),
  "trimmed_mean": trimmed_mean,
  "median": lambda trim: median(),
  "krum": krum,
  "multi_krum": multi_krum,
  "geometric_median": lambda trim: geometric_median(),
  "norm_clipping": lambda trim: norm_clipping(),
  "flame": lambda trim: flame(),
  "robust_learning_rate": robust_learning_rate,
}
# Those of them to which that share is nothing.
WITHOUT_TRIM = (
  "mean",
  "weighted",
  "median",
  "geometric_median",
  "norm_clipping",
  "flame",
)


def build(name: str, *, trim: float, **parameters: Any) -> Aggregator:
  """An aggregator by its name in `AGGREGATORS`.

  Args:
    name: which.
    trim: share of the clients that may be malicious; those `WITHOUT_TRIM` do
      not look at it.
    **parameters: of a user's own, see `extensions`.

  Returns:
    The aggregator.

  Raises:
    errors.ConfigError: there is no such name.
  """
  errors.require_choice("aggregator", name, AGGREGATORS)
  return AGGREGATORS[name](trim, **parameters)
