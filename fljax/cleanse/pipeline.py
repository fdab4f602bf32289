"""The phases of cleansing, each callable alone on a user's own parameters.

    pruned = prune(model, params, means, on_validation, ...)
    tuned = fine_tune(block, state with pruned.params and neuron_mask, ...)
    adjusted = adjust(model, tuned.state.params, pruned.neuron_mask, ...)

How far to go is decided by accuracies, and where those come from is a
function that the caller passes: `validation_curves` for a server with images
of its own, `reported_curves` and `reported_rounds` for one that has to ask the
clients.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import TYPE_CHECKING
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fljax import errors
from fljax import evaluate
from fljax import federation as federations
from fljax import models
from fljax import population as populations
from fljax.cleanse import pruning
from fljax.cleanse import reports
from fljax.cleanse import selection
from fljax.cleanse import weights

if TYPE_CHECKING:  # Cleansing needs no attack, and rounds have one.
  from fljax import rounds as rounds_lib

Array = jax.Array

# The paper's process, by what `--cleanse` calls its phases: federated pruning,
# fine-tuning and adjusting.
WHOLE = ("fp", "ft", "aw")
# And federated Feature Shift Tuning (`baselines.feature_shift`).
PHASES = (*WHOLE, "ffst")

PruningAccuracies = Callable[[models.Params, Array], Iterable[float]]
DeltaAccuracies = Callable[
  [models.Params, Array, Array, np.ndarray], Iterable[float]
]


class Curves(NamedTuple):
  """Where accuracies come from.

  Attributes:
    pruning: (params, order) -> accuracies [neurons + 1] along the order.
    delta: (params, μ, σ, deltas) -> accuracies [steps]; may be lazy, the
      search takes no more than it needs.
  """

  pruning: PruningAccuracies
  delta: DeltaAccuracies


def validation_curves(
  model: models.Model, validation: evaluate.Examples
) -> Curves:
  """Accuracies on the server's own validation images.

  Args:
    model: the network.
    validation: nobody's training data, and no test data.

  Returns:
    The curves.
  """

  def along_order(params: models.Params, order: Array) -> np.ndarray:
    return np.asarray(
      pruning.pruning_curve(model, params, order, validation), np.float64
    )

  def along_deltas(
    params: models.Params, mean: Array, std: Array, deltas: np.ndarray
  ) -> Iterator[float]:
    return delta_accuracies(
      model, params, validation, mean=mean, std=std, deltas=deltas
    )

  return Curves(along_order, along_deltas)


def reported_curves(
  model: models.Model,
  federation: federations.Federation | populations.Population,
  *,
  trim: float,
  report: Callable[[Array], Array] = lambda values: values,
) -> Curves:
  """Accuracies that clients report, for a server without validation images.

  Args:
    model: the network.
    federation: all clients, with the samples that each measures on: what it
      trains on, or better what it keeps out of that (`partition.keep_back`).
    trim: share of clients left out on each side, see
      `selection.trimmed_mean`.
    report: what becomes of the honest reports [clients, steps] on their way
      to the server.

  Returns:
    The curves.
  """

  def along_order(params: models.Params, order: Array) -> np.ndarray:
    honest = populations.ask_clients(
      lambda clients: pruning.client_curves(model, params, order, clients),
      federation,
    )
    return selection.trimmed_mean(np.asarray(report(honest)), trim)

  def along_deltas(
    params: models.Params, mean: Array, std: Array, deltas: np.ndarray
  ) -> np.ndarray:
    steps = jnp.asarray(deltas, jnp.float32)
    honest = populations.ask_clients(
      lambda clients: weights.client_curves(
        model, params, mean, std, steps, clients
      ),
      federation,
    )
    return selection.trimmed_mean(np.asarray(report(honest)), trim)

  return Curves(along_order, along_deltas)


def reported_rounds(
  model: models.Model,
  federation: federations.Federation | populations.Population,
  *,
  rounds: int,
  trim: float,
  report: Callable[[Array], Array] = lambda values: values,
) -> Callable[[models.Params, int], float]:
  """The accuracy that clients report after each round of fine-tuning.

  Args:
    model: the network.
    federation: all clients, with the samples that each measures on, which
      should be none that it trains on.
    rounds: the most rounds of fine-tuning.
    trim: share of clients left out on each side, see
      `selection.trimmed_mean`.
    report: what becomes of the honest reports [clients, rounds + 1], NaN of
      rounds that are to come, on their way to the server.

  Returns:
    (params, rounds done) -> accuracy, for one fine-tuning: it remembers what
    was reported before. It raises errors.ConfigError if no client has
    answered.
  """
  honest = np.full((federation.num_clients, rounds + 1), np.nan, np.float32)

  def accuracy(params: models.Params, done: int) -> float:
    honest[:, done] = populations.ask_clients(
      lambda clients: reports.client_accuracies(model, params, clients),
      federation,
    )
    received = np.asarray(report(jnp.asarray(honest)))
    return float(selection.trimmed_mean(received[:, [done]], trim)[0])

  return accuracy


class Pruned(NamedTuple):
  """Outcome of pruning.

  Attributes:
    params: the pruned model.
    neuron_mask: bool [neurons], True for neurons that stay.
    order: int [neurons], the pruning sequence.
    accuracies: float [neurons + 1], what the choice was based on, or what was
      measured for the record; empty if nothing was.
    num_pruned: how many neurons were pruned, without those from before.
    anomaly: where gains decide, the anomaly index of the first in the order;
      not finite if most neurons are alike or none is alive.
  """

  params: models.Params
  neuron_mask: Array
  order: np.ndarray
  accuracies: np.ndarray
  num_pruned: int
  anomaly: float | None = None


def prune(
  model: models.Model,
  params: models.Params,
  means: Array,
  accuracies: PruningAccuracies,
  *,
  neuron_mask: Array | None = None,
  method: str = "mvp",
  rate: float = 0.5,
  max_drop: float = 0.01,
  drop_of: str = "total",
) -> Pruned:
  """Prunes as many neurons as the accuracy allows.

  Args:
    model: the network.
    params: the trained global model.
    means: [clients, neurons], each client's `reports.client_activations`; the
      server only ever sees the ranks or votes made of them. A row that is not
      finite, as that of a client without samples, is left out.
    accuracies: see `Curves`.
    neuron_mask: bool [neurons], False for neurons that are pruned already,
      which are neither ranked nor voted on and stay pruned; None if none is.
    method: "rap" or "mvp".
    rate: p, the share of neurons that each client votes to prune (MVP).
    max_drop: the accuracy that pruning may cost.
    drop_of: what may cost that, all pruned neurons together ("total") or each
      of them ("neuron"), see `selection.pruning_count`.

  Returns:
    The pruned model and how it came about; neurons that are pruned already
    come last in the order.

  Raises:
    errors.ConfigError: no row is finite, or there is no such method or drop.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section IV-A and Algorithm 1, "Federated Pruning".
  """
  errors.require_choice("method", method, pruning.SCORES)
  if neuron_mask is None:
    neuron_mask = jnp.ones(means.shape[1], bool)
  living, gone = jnp.flatnonzero(neuron_mask), jnp.flatnonzero(~neuron_mask)
  means = selection.answered(means)
  scores = pruning.SCORES[method](means[:, living], rate)
  order = jnp.concatenate([living[pruning.pruning_order(scores)], gone])
  curve = np.asarray(accuracies(params, order), np.float64)
  count = selection.pruning_count(curve, max_drop, drop_of)
  return _without_first(model, params, neuron_mask, order, curve, count)


def prune_outliers(
  model: models.Model,
  params: models.Params,
  accuracies: PruningAccuracies | None = None,
  *,
  neuron_mask: Array | None = None,
  threshold: float = 2.0,
) -> Pruned:
  """Prunes the neurons whose gain stands out, by the weights alone.

  Beyond the paper: no client reports anything, and accuracy decides nothing.

  Args:
    model: the network.
    params: the trained global model.
    accuracies: see `Curves`; for the record. None: nothing is measured.
    neuron_mask: bool [neurons], False for neurons that are pruned already,
      which count for nothing and stay pruned; None if none is.
    threshold: an anomaly index above it stands out, see
      `selection.anomaly_index`. Where most neurons are alike, so that the index
      is infinite for all others, none does.

  Returns:
    The pruned model and how it came about; those that are pruned already come
    last in the order.

  Raises:
    errors.ConfigError: batch normalisation follows the target convolution.
  """
  models.require_plain_target(model, "pruning by gain")
  gains = weights.gains(models.target_kernel(model, params))
  if neuron_mask is None:
    neuron_mask = jnp.ones(len(gains), bool)
  alive = jnp.where(neuron_mask, gains, jnp.nan)
  index = selection.anomaly_index(alive)
  outlying = (index > threshold) & jnp.isfinite(index)
  order = pruning.pruning_order(jnp.where(neuron_mask, gains, -1))
  pruned = _without_first(
    model,
    params,
    neuron_mask,
    order,
    np.asarray(accuracies(params, order) if accuracies else [], np.float64),
    int((outlying & (alive > jnp.nanmedian(alive))).sum()),
  )
  return pruned._replace(anomaly=float(index[order[0]]))


def _without_first(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  order: Array,
  curve: np.ndarray,
  count: int,
) -> Pruned:
  """The first of an order go; those pruned already are its last."""
  count = min(count, int(neuron_mask.sum()))
  mask = pruning.mask_without_first(order, count) & neuron_mask
  return Pruned(
    params=models.mask_neurons(model, params, mask),
    neuron_mask=mask,
    order=np.asarray(order),
    accuracies=curve,
    num_pruned=count,
  )


class FineTuned(NamedTuple):
  """Outcome of federated fine-tuning.

  Attributes:
    state: the server's state after the round that was kept.
    rounds: how many rounds were run.
    kept: which of them that was; 0 if none was run, or none was better than
      the model that came in.
    bad_round: whether the last of them was not finite.
  """

  state: rounds_lib.ServerState
  rounds: int
  kept: int
  bad_round: bool


def fine_tune(
  block: rounds_lib.Block,
  state: rounds_lib.ServerState,
  federation: federations.Federation,
  key: Array,
  *,
  rounds: int,
  patience: int = 0,
  enough: float | None = None,
  reported: Callable[[models.Params, int], float] | None = None,
  examples: dict[str, evaluate.Examples] | None = None,
  on_round: Callable[
    [int, rounds_lib.ServerState, rounds_lib.RoundMetrics], None
  ]
  | None = None,
) -> FineTuned:
  """Trains on with everybody, attackers included, under the neuron mask.

  With clients from `population.for_fine_tuning`, those attack too whose rounds
  (`Federation.attack_start`, `attack_end`) are past or to come.

  It is federated training and nothing else: pruned neurons stay at zero
  because the server's state carries the mask (`rounds.ServerState`).

  Args:
    block: from `rounds.make_block`; the very program that trained the model,
      unless clients, attackers or the server do something else now.
    state: the server's state with the pruned model and its mask. It is
      copied, so that it is still there afterwards.
    federation: all clients; their `scale` is the amplification that attackers
      keep up.
    key: random key of training.
    rounds: at most so many.
    patience: stops after so many rounds without better accuracy, on the
      server's validation images, examples["validation"], or as clients report
      it; 0, or neither of them, never does.
    enough: stops as soon as that accuracy is at least this, before the first
      round already: threshold_tuning of Algorithm 1. The attackers take part in
      every round, so that none is wanted that the model does not need. None
      never stops for that.
    reported: (params, rounds done) -> accuracy, see `reported_rounds`, where
      it takes the place of that on the server's images.
    examples: what to evaluate on after each round, by name.
    on_round: is told rounds done, state and metrics after each, with what was
      reported as accuracies["reported"]; where there is an accuracy to go by,
      before the first, too.

  Returns:
    The state after the round whose accuracy was best, the first of equals, or
    the state that came in: the server stops "when the accuracy does not
    improve any further", and rounds that did not improve it are undone, as
    everywhere in cleansing. Without an accuracy to go by, the state after the
    last round.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section IV-B, Equation 2, and Algorithm 1,
    "Fine-tuning".
  """
  by = "validation" if reported is None else "reported"

  def run(
    state: rounds_lib.ServerState, length: int, done: int
  ) -> tuple[rounds_lib.ServerState, rounds_lib.RoundMetrics]:
    state, metrics = block(state, federation, key, length, examples)
    if reported is not None and not int(metrics.bad_round):
      heard = jnp.float32(reported(state.params, done))
      metrics = metrics.replace(accuracies={**metrics.accuracies, by: heard})
    return state, metrics

  chosen = FineTuned(state, 0, 0, False)
  state = jax.tree.map(jnp.copy, state)  # Blocks donate theirs.
  best = float("-inf")
  if rounds and (reported is not None or "validation" in (examples or {})):
    # No round: what the block says of the model as it comes in.
    state, metrics = run(state, 0, 0)
    best = float(metrics.accuracies[by])
    if on_round is not None:
      on_round(0, state, metrics)
    if enough is not None and best >= enough - selection.TOLERANCE:
      return chosen
  for done in range(1, rounds + 1):
    state, metrics = run(state, 1, done)
    if int(metrics.bad_round):
      return FineTuned(state, done, done, True)
    if on_round is not None:
      on_round(done, state, metrics)
    if by not in metrics.accuracies:
      chosen = FineTuned(state, done, done, False)
      continue
    chosen = chosen._replace(rounds=done)
    measured = float(metrics.accuracies[by])
    if measured > best:
      best = measured
      kept = jax.tree.map(jnp.copy, state) if done < rounds else state
      chosen = FineTuned(kept, done, done, False)
    elif patience and done - chosen.kept >= patience:
      break
    if enough is not None and measured >= enough - selection.TOLERANCE:
      break
  return chosen


class Adjusted(NamedTuple):
  """Outcome of adjusting extreme weights.

  Attributes:
    params: the adjusted model.
    delta: the Δ that was kept; infinity if even the first step fell below
      the floor.
    zeroed: how many weights became zero.
    deltas: float [steps], the thresholds tried, infinity (no change) first;
      the last one fell below the floor, unless the search ran out of them.
    accuracies: float [steps], what the choice was based on.
    mean: μ.
    std: σ.
  """

  params: models.Params
  delta: float
  zeroed: int
  deltas: np.ndarray
  accuracies: np.ndarray
  mean: float
  std: float


def adjust(
  model: models.Model,
  params: models.Params,
  neuron_mask: Array,
  accuracies: DeltaAccuracies,
  *,
  start: float,
  step: float,
  max_drop: float = 0.01,
  statistics_over: str = "surviving",
) -> Adjusted:
  """Zeroes extreme weights with Δ falling until the accuracy would suffer.

  μ and σ are those of the kernel as it comes in, and stay fixed.

  Args:
    model: the network.
    params: the model to adjust.
    neuron_mask: bool [neurons], False for pruned neurons.
    accuracies: see `Curves`.
    start: the first Δ.
    step: ε, by which Δ falls.
    max_drop: the floor lies this far below the accuracy of `params`.
    statistics_over: see `weights.statistics`.

  Returns:
    The adjusted model and how it came about.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section IV-C and Algorithm 1, "Adjusting Weights".
  """
  kernel = models.target_kernel(model, params)
  mean, std = weights.statistics(kernel, neuron_mask, statistics_over)
  tried = [np.inf, *weights.delta_steps(start, step)]
  measured: list[float] = []
  for accuracy in accuracies(params, mean, std, np.asarray(tried)):
    measured.append(float(accuracy))
    if not accuracy >= measured[0] - max_drop - selection.TOLERANCE:
      break
  kept = selection.last_above(np.asarray(measured), measured[0] - max_drop)
  adjusted = weights.zero_extremes(kernel, mean, std, tried[kept])
  return Adjusted(
    params=models.with_target_kernel(model, params, adjusted),
    delta=float(tried[kept]),
    zeroed=count_zeroed(kernel, adjusted),
    deltas=np.asarray(tried[: len(measured)]),
    accuracies=np.asarray(measured),
    mean=float(mean),
    std=float(std),
  )


def count_zeroed(before: Array, after: Array) -> int:
  """How many weights of a kernel an adjustment turned to zero."""
  return int(((before != 0) & (after == 0)).sum())


def delta_accuracies(
  model: models.Model,
  params: models.Params,
  examples: evaluate.Examples,
  *,
  mean: Array | float,
  std: Array | float,
  deltas: np.ndarray,
) -> Iterator[float]:
  """Yields the accuracy at each Δ, computed only when asked for.

  The stem is computed once, and a Δ that zeroes no further weight costs
  nothing.

  Args:
    model: the network.
    params: the model to adjust.
    examples: what accuracy is measured on.
    mean: μ.
    std: σ.
    deltas: float [steps], decreasing.

  Yields:
    One accuracy per Δ.
  """
  kernel = models.target_kernel(model, params)
  cached = weights.cache_stem(model, params, examples)
  zeroed, accuracy = -1, float("nan")
  for delta in deltas:
    adjusted = weights.zero_extremes(kernel, mean, std, float(delta))
    count = count_zeroed(kernel, adjusted)
    if count != zeroed:
      zeroed = count
      accuracy = float(
        weights.accuracy_from_stem(model, params, adjusted, cached)
      )
    yield accuracy
