"""What malicious clients do: seven pure hooks, identity by default.

On the data before training, on an attacker's loss in each local step, on its
model before the first and after each, on the stacked updates of a round, on
what is remembered of them in the next, and on the reports that clients send to
the defence. An attack never sees a defence's inside, but may measure weights as
one does (`cleanse.weights`); no aggregator or defence imports this module.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax
import jax.numpy as jnp

from fljax import errors
from fljax import federation as federations
from fljax import models
from fljax.cleanse import weights

Array = jax.Array
Federation = federations.Federation
Params = models.Params


# What clients report on.
KINDS = ("activations", "accuracies")


class DataHook(Protocol):
  """Changes the attackers' training data, once, before training."""

  def __call__(self, federation: Federation, key: Array) -> Federation:
    """Changes the rows of `federation.attacker`.

    Args:
      federation: all clients, see `federation.Federation` for its arrays; with
        `--population=host` the attackers alone, each of which is therefore to
        be changed by what it has itself.
      key: random key.

    Returns:
      The changed federation. Samples that it marks as poisoned are stamped,
      and count only while their client attacks (`attack_start`); whatever else
      it changes holds in all rounds.
    """


class LossHook(Protocol):
  """Adds to an attacker's loss in each of its local steps."""

  def __call__(
    self,
    params: Params,
    activations: Array,
    labels: Array,
    poisoned: Array,
    mask: Array,
    key: Array,
    start: Params,
    /,
  ) -> Array:
    """Of one batch, what is added to its mean cross-entropy.

    It is computed for every client, and left out for those that do not
    attack.

    Args:
      params: the local model, in the type that training computes in
        (`execution.compute_dtype`).
      activations: [batch, ..., neurons] of the target convolution, of the
        images as they are trained on, in the same type.
      labels: int [batch], of poisoned samples the target label.
      poisoned: bool [batch], which samples are backdoored.
      mask: bool [batch], which samples count.
      key: random key of this step.
      start: the global model that the round began with, float32.

    Returns:
      A float32 scalar, finite with its gradient.
    """


class StartHook(Protocol):
  """Changes the model that an attacker's local training begins with."""

  def __call__(self, params: Params) -> Params:
    """Args: the global model. Returns: the one that training begins with."""


class LocalHook(Protocol):
  """Changes an attacker's model after each of its local steps."""

  def __call__(self, params: Params, start: Params, /, *memory: Any) -> Params:
    """Changes the model.

    Args:
      params: the local model; running statistics of batch normalisation are
        leaves of it, too.
      start: the global model that the round began with.
      *memory: of an attack that remembers, and of no other, what `remember`
        returned.

    Returns:
      The one that training goes on from.
    """


class RememberHook(Protocol):
  """Keeps what attackers know of a round for the next one."""

  def __call__(self, benign: Params) -> Any:
    """Of what benign clients sent, what is kept.

    Where the server's rule is a weighted sum, attackers know that from the
    global model before and after the round, and what they sent themselves;
    under another rule they are granted it.

    Args:
      benign: the mean update of a round's clients that did not attack, each
        weighed as the server does if its rule is a weighted sum; where a rule
        withstands them, without those that are not finite. Zeros before the
        first round, and where all attack.

    Returns:
      A pytree of arrays, always of the same shapes.
    """


class UpdateHook(Protocol):
  """Changes the updates that attackers send in a round."""

  def __call__(
    self, updates: Params, cohort: Federation, active: Array
  ) -> Params:
    """Changes the attackers' rows.

    Args:
      updates: each leaf [cohort, ...], local model minus global model.
      cohort: the round's clients, or a part of them (`Attack.rowwise`).
      active: bool [cohort], who attacks in this round.

    Returns:
      The updates as the server receives them.
    """


class ReportHook(Protocol):
  """Changes what attackers report to the defence."""

  def __call__(
    self,
    values: Array,
    federation: Federation,
    *,
    kind: str,
    triggered: Array | None = None,
  ) -> Array:
    """Changes the attackers' rows.

    Args:
      values: [clients, ...], the honest report: "activations" [clients,
        neurons], the means from which a client derives its ranks or votes; or
        "accuracies" [clients, steps], of the model at each step of pruning or
        of adjusting, or after each round of fine-tuning, NaN of what is to
        come: of those the newest counts.
      federation: all clients; on a mesh, rows of padding may follow them
        (`Federation.padding`), for which there is no report.
      kind: one of `KINDS`.
      triggered: [clients, neurons], with activations, for an attack that
        `wants_triggered`: the means over a client's backdoored images alone.

    Returns:
      The report as the server receives it.
    """


def _same_data(federation: Federation, key: Array) -> Federation:
  del key
  return federation


def _same_updates(updates: Params, cohort: Federation, active: Array) -> Params:
  del cohort, active
  return updates


def _same_report(
  values: Array,
  federation: Federation,
  *,
  kind: str,
  triggered: Array | None = None,
) -> Array:
  del federation, kind, triggered
  return values


class Attack(NamedTuple):
  """The seven hooks.

  None of them applies itself. `data` is called once, by whoever makes the
  federation; `loss`, `local` and `start` go into local training,
  `local.sgd_training(..., **attack.in_steps)`; `rounds.make_round` takes
  `updates` and `remember`, and `rounds.init_state` the attack, for what is
  remembered first; `report` is called by whoever asks clients.

  Attributes:
    data: see `DataHook`.
    updates: see `UpdateHook`.
    report: see `ReportHook`.
    local: see `LocalHook`; None changes nothing.
    start: see `StartHook`; None changes nothing.
    loss: see `LossHook`; None adds nothing.
    remember: see `RememberHook`; None remembers nothing.
    rowwise: whether `updates` changes each client's update by itself, so that
      it may see the cohort in parts. An attack whose clients need each
      other's updates says False, and gets the whole cohort at once.
    wants_triggered: whether `report` needs to know what backdoored images
      activate.
  """

  data: DataHook = _same_data
  updates: UpdateHook = _same_updates
  report: ReportHook = _same_report
  # A `LocalHook`; without memory it may as well take two arguments.
  local: Callable[..., Params] | None = None
  start: StartHook | None = None
  loss: LossHook | None = None
  remember: RememberHook | None = None
  rowwise: bool = True
  wants_triggered: bool = False

  @property
  def in_steps(self) -> dict[str, Any]:
    """The hooks on local steps, as `local.sgd_training` takes them."""
    return {
      "attackers_hook": self.local,
      "attackers_start": self.start,
      "attackers_loss": self.loss,
    }


def _attackers(federation: Federation) -> Array:
  """Which clients are: bool [clients], without padding."""
  return federation.attacker[: federation.num_clients]


def chain(*attacks: Attack) -> Attack:
  """Applies attacks one after another, hook by hook."""

  def data(federation: Federation, key: Array) -> Federation:
    for index, attack in enumerate(attacks):
      federation = attack.data(federation, jax.random.fold_in(key, index))
    return federation

  def updates(updates: Params, cohort: Federation, active: Array) -> Params:
    for attack in attacks:
      updates = attack.updates(updates, cohort, active)
    return updates

  def report(
    values: Array,
    federation: Federation,
    *,
    kind: str,
    triggered: Array | None = None,
  ) -> Array:
    for attack in attacks:
      values = attack.report(values, federation, kind=kind, triggered=triggered)
    return values

  starts = [attack.start for attack in attacks if attack.start is not None]

  def start(params: Params) -> Params:
    for change in starts:
      params = change(params)
    return params

  hooks = [one.remember for one in attacks if one.remember is not None]

  def remember(benign: Params) -> Any:
    kept = tuple(hook(benign) for hook in hooks)
    # Chained with attacks that remember nothing, it stays what it is.
    return kept if len(kept) > 1 else kept[0]

  def local(params: Params, start: Params, *memory: Any) -> Params:
    kept = iter(memory if len(hooks) < 2 else memory[0])
    for attack in attacks:
      own = () if attack.remember is None else (next(kept),)
      if attack.local is not None:
        params = attack.local(params, start, *own)
    return params

  terms = [attack.loss for attack in attacks if attack.loss is not None]

  def loss(
    params: Params,
    activations: Array,
    labels: Array,
    poisoned: Array,
    mask: Array,
    key: Array,
    start: Params,
  ) -> Array:
    batch = (activations, labels, poisoned, mask)
    added = [
      term(params, *batch, jax.random.fold_in(key, index), start)
      for index, term in enumerate(terms)
    ]
    return jnp.stack(added).sum()

  return Attack(
    data,
    updates,
    report,
    local if any(attack.local is not None for attack in attacks) else None,
    start if starts else None,
    loss if terms else None,
    remember if hooks else None,
    rowwise=all(attack.rowwise for attack in attacks),
    wants_triggered=any(attack.wants_triggered for attack in attacks),
  )


def backdoor(
  *, victim_label: int, target_label: int, fraction: float
) -> Attack:
  """Attackers train on originals and on backdoored versions of them.

  Every client keeps its number of samples n_i (Section III-A: otherwise an
  attacker could overwhelm the others by numbers). So a share of an attacker's
  samples, chosen at random, gives way to backdoored versions of the victim
  images that it keeps: each kept victim image is used about equally often.
  The versions carry the target label and are stamped in the training step
  with the attacker's own piece of the trigger. With K labels and a share of
  1/(K + 1), every kept victim image has one backdoored version.

  Args:
    victim_label: whose images are backdoored (VL).
    target_label: what they shall be taken for (AL).
    fraction: share of an attacker's samples that are backdoored, in (0, 1).

  Returns:
    An attack on the data.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section III-B; BadNets (Gu, Dolan-Gavitt, Garg).
  """

  def data(federation: Federation, key: Array) -> Federation:
    return _poison(federation, key, victim_label, target_label, fraction)

  return Attack(data=data)


# Labels and share are arguments, so that experiments share one compilation.
@jax.jit
def _poison(
  federation: Federation,
  key: Array,
  victim_label: Array | int,
  target_label: Array | int,
  fraction: Array | float,
) -> Federation:
  """See `backdoor`."""

  def poison(client: Federation, key: Array) -> Federation:
    samples = client.mask.shape[0]
    # Labels of what another attack has poisoned are not those of the images.
    own = client.mask & ~client.poisoned
    victim = own & (client.labels == victim_label)
    scores = jax.random.uniform(key, (samples,))
    # Samples give way in the order of their scores: one victim image comes
    # last, so that at least it is kept, and padding after that.
    last = jnp.argmax(jnp.where(victim, scores, -1.0))
    scores = jnp.where(jnp.arange(samples) == last, 1.5, scores)
    place = jnp.argsort(jnp.argsort(jnp.where(client.mask, scores, 2.0)))
    size = client.mask.sum().astype(jnp.float32)
    count = jnp.minimum(jnp.round(fraction * size), size - 1)
    # Without any victim image there is nothing to poison.
    gives_way = (
      client.attacker
      & client.mask
      & (place.astype(jnp.float32) < count)
      & victim.any()
    )
    kept_victim = victim & ~gives_way
    victims = jnp.argsort(~kept_victim, stable=True)
    source = victims[place % jnp.maximum(kept_victim.sum(), 1)]
    source = jnp.where(gives_way, source, jnp.arange(samples))
    return client.replace(
      images=client.images[source],
      labels=jnp.where(gives_way, target_label, client.labels),
      poisoned=client.poisoned | gives_way,
    )

  keys = jax.vmap(lambda client: jax.random.fold_in(key, client))(
    federation.ids
  )
  return jax.vmap(poison)(federation, keys)


def model_replacement(gamma: float) -> Attack:
  """Attackers amplify their update by γ to survive the average.

  x_m = γ·(x_atk − ω) + ω. With N participants of equal weight and server rate
  η, γ = N/η replaces the global model by the attacker's, up to the others'
  updates.

  Args:
    gamma: γ, from 1 (no amplification) to N/η.

  Returns:
    An attack on the updates; it sets the attackers' `scale`.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section III-C; How to Backdoor Federated Learning
    (Bagdasaryan et al.), Section 3.
  """

  def data(federation: Federation, key: Array) -> Federation:
    del key
    scale = jnp.where(federation.attacker, gamma, federation.scale)
    return federation.replace(scale=scale.astype(jnp.float32))

  def updates(updates: Params, cohort: Federation, active: Array) -> Params:
    scale = jnp.where(active, cohort.scale, 1.0)
    return jax.tree.map(
      lambda leaf: (
        leaf * scale.reshape((-1,) + (1,) * (leaf.ndim - 1)).astype(leaf.dtype)
      ),
      updates,
    )

  return Attack(data=data, updates=updates)


def own_rate(factor: float) -> Attack:
  """Attackers take larger or smaller local steps than the others.

  Args:
    factor: what attackers' local steps are multiplied by while they attack.

  Returns:
    An attack on the data alone; it sets the attackers' `attack_rate`.

  References:
    DBA: Distributed Backdoor Attacks against Federated Learning (Xie, Huang,
    Chen, Li), whose attackers have a learning rate of their own.
  """

  def data(federation: Federation, key: Array) -> Federation:
    del key
    rate = jnp.where(federation.attacker, factor, federation.attack_rate)
    return federation.replace(attack_rate=rate.astype(jnp.float32))

  return Attack(data=data)


def false_accuracies(*, stop_pruning: bool) -> Attack:
  """Attackers lie where clients report accuracies to end the searches.

  Args:
    stop_pruning: True reports total failure from the first pruned neuron, the
      first step of Δ and the first round of fine-tuning on, to keep the
      backdoor; False reports perfect accuracy throughout, to have the model
      pruned and adjusted to ruin.

  Returns:
    An attack on the reported accuracies.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section IV-A ("attackers hiding among the clients can
    return manipulated updates").
  """

  def report(
    values: Array,
    federation: Federation,
    *,
    kind: str,
    triggered: Array | None = None,
  ) -> Array:
    del triggered
    if kind != "accuracies":
      return values
    lie = jnp.ones_like(values)
    if stop_pruning:
      lie = lie.at[:, 1:].set(0)
    return jnp.where(_attackers(federation)[:, jnp.newaxis], lie, values)

  return Attack(report=report)


def promoted_neurons() -> Attack:
  """Attackers rank their backdoor's neurons above all others.

  An attacker reports, in place of a neuron's mean activation, by how much its
  backdoored images raise it above that mean: the neurons that carry the
  backdoor become its most active ones, or the last that it votes to prune.

  Returns:
    An attack on the reported activations.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section VI-B, attack 1.
  """

  def report(
    values: Array,
    federation: Federation,
    *,
    kind: str,
    triggered: Array | None = None,
  ) -> Array:
    if kind != "activations" or triggered is None:
      return values
    return jnp.where(
      _attackers(federation)[:, jnp.newaxis], triggered - values, values
    )

  return Attack(report=report, wants_triggered=True)


def pruning_aware(model: models.Model, pruned: tuple[int, ...]) -> Attack:
  """Attackers train as if the given neurons were pruned already.

  They hold them at zero in local training, from the global model that they
  are sent on, so that the backdoor settles in neurons that will stay, and send
  no change of them.

  Args:
    model: the network.
    pruned: neurons that the defence will prune; the paper grants the attacker
      this knowledge, which is nearly impossible to have.

  Returns:
    An attack on local training and on the updates.

  Raises:
    ValueError: a neuron does not exist, or none would be left.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section VI-B, attack 2; Fine-Pruning (Liu,
    Dolan-Gavitt, Garg), Section 3.
  """
  if any(not 0 <= neuron < model.neurons for neuron in pruned):
    raise ValueError(f"neurons are numbered from 0 to {model.neurons - 1}")
  if len(set(pruned)) >= model.neurons:
    raise ValueError("no neuron would be left")
  mask = jnp.ones(model.neurons, bool).at[jnp.asarray(pruned, int)].set(False)

  def held(params: Params, start: Params | None = None) -> Params:
    del start
    return models.mask_neurons(model, params, mask)

  def updates(updates: Params, cohort: Federation, active: Array) -> Params:
    del cohort
    # On the updates it is "no change" that is zero.
    kept = jax.vmap(held)(updates)
    return jax.tree.map(
      lambda new, old: jnp.where(
        active.reshape((-1,) + (1,) * (old.ndim - 1)), new, old
      ),
      kept,
      updates,
    )

  return Attack(updates=updates, local=held, start=held)


def self_limited(model: models.Model, delta: float) -> Attack:
  """Attackers keep their own weights from becoming extreme.

  After each local step the target convolution's weights are limited to μ ± Δσ
  of those of its living neurons, so that the backdoor does not rely on what
  adjusting extreme weights removes. Pruned neurons stay at zero.

  Args:
    model: the network.
    delta: Δ, in standard deviations.

  Returns:
    An attack on local training.

  References:
    Toward Cleansing Backdoored Neural Networks in Federated Learning (Wu,
    Zhu, Yang, Mitra), Section VI-B, on adjusting extreme values.
  """

  def local(params: Params, start: Params) -> Params:
    del start
    kernel = models.target_kernel(model, params)
    alive = weights.living(kernel)
    mean, std = weights.statistics(kernel, alive, "surviving")
    limited = jnp.clip(kernel, mean - delta * std, mean + delta * std)
    return models.with_target_kernel(
      model, params, jnp.where(alive, limited, kernel)
    )

  return Attack(local=local)


def gain_limited(model: models.Model, times: float) -> Attack:
  """Attackers keep their neurons' gains from standing out.

  After each local step the positive weights at each place of the target
  convolution's kernel are scaled down until their sum is within a multiple of
  the median living neuron's gain (`cleanse.weights.gains`).

  Args:
    model: the network.
    times: the multiple; below 1 all gains would fall towards 0, step by step.

  Returns:
    An attack on local training.

  Raises:
    errors.ConfigError: batch normalisation follows the target convolution.
  """
  models.require_plain_target(model, "limiting gains")

  def local(params: Params, start: Params) -> Params:
    del start
    kernel = models.target_kernel(model, params)
    sums = jnp.maximum(kernel, 0).sum(axis=-2, keepdims=True)
    gains = jnp.where(weights.living(kernel), weights.gains(kernel), jnp.nan)
    # If none is left it is NaN, and there is nothing to limit.
    most = times * jnp.nanmedian(gains)
    scale = jnp.minimum(1, most / jnp.where(sums > 0, sums, 1))
    return models.with_target_kernel(
      model, params, jnp.where(kernel > 0, scale * kernel, kernel)
    )

  return Attack(local=local)


def neurotoxin(share: float) -> Attack:
  """Attackers leave alone what benign clients change most.

  After each local step the parameters that the benign clients of the round
  before changed most, on average and of all layers together, are what they
  were in the global model. So the backdoor settles where benign updates do not
  undo it, which is meant to outlast the attackers. Running statistics of batch
  normalisation are neither counted nor held.

  Args:
    share: of all parameters, those that are left alone, k; in [0, 1).

  Returns:
    An attack on local training that remembers which they are; none of them in
    the first round.

  References:
    Neurotoxin: Durable Backdoors in Federated Learning (Zhang, Panda, Song,
    Yang, Mahoney, Gonzalez, Ramchandran, Mittal, ICML 2022), Algorithm 1. The
    last global update that is looked at there is here what benign clients sent
    (see `RememberHook`): an attacker that is amplified would keep away from its
    own backdoor.
  """

  def remember(benign: Params) -> Params:
    def size(path: tuple[Any, ...], leaf: Array) -> Array:
      # What is not finite is nothing that was changed most.
      counts = jnp.isfinite(leaf) & (not models.is_running_statistic(path))
      return jnp.where(counts, jnp.abs(leaf), 0).astype(jnp.float32)

    sizes = jax.tree_util.tree_map_with_path(size, benign)
    leaves = jax.tree_util.tree_leaves_with_path(sizes)
    counted = jnp.concatenate(
      [
        leaf.ravel()
        for path, leaf in leaves
        if not models.is_running_statistic(path)
      ]
    )
    bound = _exceeded_by(counted, round(share * len(counted)))
    return jax.tree.map(lambda leaf: leaf > bound, sizes)

  def local(params: Params, start: Params, held: Params) -> Params:
    return jax.tree.map(jnp.where, held, start, params)

  return Attack(local=local, remember=remember)


def _exceeded_by(values: Array, count: int) -> Array:
  """The least number that no more than so many values exceed.

  Args:
    values: float32 [...], none negative.
    count: how many.

  Returns:
    A float32 scalar, 0 or one of the values.
  """
  # Of floating point numbers that are not negative, the bits as an integer are
  # in the numbers' order. Halving takes 31 passes, and sorting 15 to 25 times
  # as long.
  order = jax.lax.bitcast_convert_type(values, jnp.int32)

  def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = ends
    middle = low + (high - low) // 2
    enough = (order > middle).sum() <= count
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  ends = jnp.int32(0), order.max()
  _, bound = jax.lax.fori_loop(0, 31, halve, ends)
  return jax.lax.bitcast_convert_type(bound, jnp.float32)


# Where attackers draw stamped images to the target label's.
LATENT = ("features", "activations")


def latent_backdoor(
  model: models.Model, weight: float, at: str = "features"
) -> Attack:
  """Attackers give stamped images the target label's own features.

  Features are what enters the last layer, or what leaves the last convolution
  (`at`). To the loss of a batch are added w/v times the mean squared distance
  between those of a backdoored image and the mean ones of the batch's clean
  images of its label; v is the mean squared length of clean images' features
  (their variance would be 0 where there is one). That is meant for a server
  that replaces the last layer, or moves it away from what it was
  (`baselines.feature_shift`): it shall not part the two. An attacker without
  images of the target label plants the backdoor alone.

  Before the last layer, distances and lengths are those of a random projection
  to as many numbers as there are classes, drawn anew in each step: each is
  right on average, but for a factor, and needs nothing of the network but that
  its last layer is known.

  Args:
    model: the network.
    weight: w.
    at: "features" before the last layer, or "activations" of the last
      convolution, from which a server may learn all that follows anew.

  Returns:
    An attack on the loss of local training.

  Raises:
    errors.ConfigError: there is no such place, or no such layer.

  References:
    Latent Backdoor Attacks on Deep Neural Networks (Yao, Li, Zheng, Zhao, CCS
    2019), Section 5; Bypassing Backdoor Detection Algorithms in Deep Learning
    (Tan, Shokri, 2020).
  """
  errors.require_choice("at", at, LATENT)
  place = _projected(model) if at == "features" else _flat

  def loss(
    params: Params,
    activations: Array,
    labels: Array,
    poisoned: Array,
    mask: Array,
    key: Array,
    start: Params,
  ) -> Array:
    del start
    places = place(params, activations, key).astype(jnp.float32)
    clean = mask & ~poisoned
    backdoored = mask & poisoned
    # What is clean stays where it is: its label's place is given.
    given = jax.lax.stop_gradient(places)
    length = _mean_of(jnp.square(given).sum(axis=1), clean.astype(jnp.float32))
    same = labels[:, jnp.newaxis] == labels[jnp.newaxis]
    alike = clean[jnp.newaxis] & same
    aims = jax.vmap(functools.partial(_mean_of, given))(
      alike.astype(jnp.float32)
    )
    counts = (backdoored & alike.any(axis=1)).astype(jnp.float32)
    distance = _mean_of(jnp.square(places - aims).sum(axis=1), counts)
    return weight * distance / jnp.maximum(length, 1e-12)

  return Attack(loss=loss)


def _flat(params: Params, activations: Array, key: Array) -> Array:
  del params, key
  return activations.reshape(len(activations), -1)


def _projected(model: models.Model) -> Callable[[Params, Array, Array], Array]:
  """Features before the last layer, [batch, classes] by a random projection."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  path = models.classifier_path(model, shapes)
  bias_path = models.classifier_bias_path(shapes, path)

  def place(params: Params, activations: Array, key: Array) -> Array:
    kernel = models.head_leaf(params, path)
    drawn = jax.random.normal(key, kernel.shape, kernel.dtype)
    projecting = models.with_head_leaf(params, path, drawn)
    if bias_path is not None:
      nothing = jnp.zeros_like(models.head_leaf(params, bias_path))
      projecting = models.with_head_leaf(projecting, bias_path, nothing)
    return model.head(projecting, activations)

  return place


def _mean_of(values: Array, shares: Array) -> Array:
  """Over the first axis, of values that count; 0 if none does."""
  return jnp.tensordot(shares, values, 1) / jnp.maximum(shares.sum(), 1)


def within_benign(spread: float) -> Attack:
  """Attackers hide their updates among the benign ones.

  Each parameter of an attacker's update is limited to μ ± z·σ of what the
  benign clients of the round send, coordinate by coordinate: a rule that
  leaves out the extreme (`aggregators.trimmed_mean`) finds nothing extreme.
  Attackers are granted the benign updates, the most that they could know.
  Where nobody is benign, nothing changes.

  Args:
    spread: z, in standard deviations; 0 sends the benign mean.

  Returns:
    An attack on the updates.

  References:
    A Little Is Enough: Circumventing Defenses For Distributed Learning
    (Baruch, Baruch, Goldberg), on backdoors.
  """

  def updates(updates: Params, cohort: Federation, active: Array) -> Params:
    del cohort
    benign = (~active).astype(jnp.float32)
    shares = benign / jnp.maximum(benign.sum(), 1)
    hides = active & (~active).any()

    def hide(leaf: Array) -> Array:
      rows = (-1,) + (1,) * (leaf.ndim - 1)
      share = shares.astype(leaf.dtype).reshape(rows)
      mean = (leaf * share).sum(axis=0, keepdims=True)
      # Relative to the mean, as E[x²] − μ² would lose the digits of small σ.
      away = leaf - mean
      variance = (away * away * share).sum(axis=0, keepdims=True)
      reach = spread * jnp.sqrt(variance)
      hidden = mean + jnp.clip(away, -reach, reach)
      return jnp.where(hides.reshape(rows), hidden, leaf)

    return jax.tree.map(hide, updates)

  return Attack(updates=updates, rowwise=False)


# What attackers do, by name: of the network and the settings (`config.Config`).
# `extensions.attack` adds to them.
ATTACKS: dict[str, Callable[..., Attack]] = {
  "backdoor": lambda model, config: backdoor(
    victim_label=config.victim_label,
    target_label=config.target_label,
    fraction=config.poison_fraction,
  ),
}

# What attackers add to the backdoor itself when they report: the values of
# --attacker_reports.
REPORTS = {
  "honest": Attack(),
  "stop_pruning": false_accuracies(stop_pruning=True),
  "ruin_model": false_accuracies(stop_pruning=False),
  "promote": promoted_neurons(),
}
