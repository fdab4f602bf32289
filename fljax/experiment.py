"""One experiment: `setup` turns a config into values and pure functions.

`run` lets `driver` take them through the phases, in the folder of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
import contextlib
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fljax import aggregators
from fljax import attacks
from fljax import config as configs
from fljax import console as consoles
from fljax import data
from fljax import driver as driving
from fljax import errors
from fljax import evaluate
from fljax import execution
from fljax import extensions as extensions_lib
from fljax import federation as federations
from fljax import layers
from fljax import local
from fljax import models
from fljax import networks
from fljax import parallel
from fljax import partition as partitions
from fljax import population as populations
from fljax import programs
from fljax import rounds
from fljax import triggers
from fljax import workdir as workdirs
from fljax.baselines import feature_shift

Array = jax.Array
Config = configs.Config


class Experiment(NamedTuple):
  """Everything a config describes.

  Attributes:
    config: the settings.
    dataset: images and labels.
    model: the network.
    federation: all clients, poisoned; a `Population` if they are on the host.
    client_validation: the same clients with the images that they keep out of
      their training, or None. Nothing of them is poisoned.
    attack: the attackers' hooks.
    aggregator: the server's rule.
    block: rounds of training as one program; it donates its state.
    tuning_block: rounds of fine-tuning; the same one, unless the server or
      the attackers do something else there (`Config.tuning`).
    shift_block: rounds of federated Feature Shift Tuning, if there are some.
    key: the random key of training.
    validation: the server's own images, or None.
    test: the whole test split, for TA.
    backdoored: stamped test images, for AA; None without attackers.
    mesh: the devices that work is spread over; None for a single one.
    digests: of the data set, and of images that the server has from
      elsewhere (`data.digest`), by `workdir.DIGESTS`.
  """

  config: Config
  dataset: data.Dataset
  model: models.Model
  federation: federations.Federation | populations.Population
  client_validation: federations.Federation | populations.Population | None
  attack: attacks.Attack
  aggregator: aggregators.Aggregator
  block: rounds.Block
  tuning_block: rounds.Block
  shift_block: rounds.Block | None
  key: Array
  validation: evaluate.Examples | None
  test: evaluate.Examples
  backdoored: evaluate.Examples | None
  mesh: parallel.Mesh | None
  digests: dict[str, str]

  @property
  def examples(self) -> dict[str, evaluate.Examples]:
    """What a block of rounds ends with measuring."""
    named = {
      "test": self.test,
      "backdoored": self.backdoored,
      "validation": self.validation,
    }
    return {name: value for name, value in named.items() if value is not None}

  def init_state(self) -> rounds.ServerState:
    """The server's state before the first round."""
    key = jax.random.fold_in(jax.random.key(self.config.seed), 2)
    state = rounds.init_state(self.model, self.aggregator, key, self.attack)
    return parallel.replicate(state, self.mesh)

  def init_tuning(self, params: models.Params) -> Any:
    """The state of fine-tuning's rule before its first round."""
    name = self.config.fine_tune_aggregation
    rule = _aggregator(self.config, None if name == "same" else name)
    return parallel.replicate(rule.init(params), self.mesh)


def setup(
  config: Config,
  *,
  like: Experiment | None = None,
  dataset: data.Dataset | None = None,
  plan: execution.Plan | None = None,
) -> Experiment:
  """Builds an experiment.

  Args:
    config: its settings.
    like: an experiment on the same data set, see `closest`. That is shared,
      not loaded again, and so are its test images on the device; and, if it is
      of the same structure (`Config.structure`), everything that is compiled.
    dataset: takes the place of the one that the settings name.
    plan: how to compute; None is the backend's.

  Returns:
    The experiment; nothing has been trained, and nothing written but caches.

  Raises:
    errors.DataError: the data set cannot be had.
    errors.ConfigError: a setting does not fit the data set or the network.
  """
  # Whose programs are shared, where those of `like` are.
  twin = None
  if like is not None:
    if _data(config) != _data(like.config):
      raise ValueError("Experiments on different data share nothing.")
    dataset = like.dataset
    if config.structure() == like.config.structure():
      twin = like
  dataset = dataset or data.load(
    config.dataset, config.data_dir or None, download=config.download
  )
  image_shape = dataset.train_images.shape[1:]
  _check_labels(config, dataset)
  held_out, partition = _partition(config, dataset)
  kept_back = None
  if config.client_holdout:
    partition, kept_back = partitions.keep_back(
      partition,
      dataset.train_labels,
      config.client_holdout,
      # Not the stream that deals the images: those are the same as ever.
      np.random.default_rng((config.seed, 6)),
    )
    if not kept_back.mask.any():
      raise errors.ConfigError(
        f"--client_holdout={config.client_holdout:g} of"
        f" --samples_per_client={config.samples_per_client} leaves no client an"
        " image to measure on."
      )
  pieces = triggers.pieces(
    config.trigger,
    image_shape,
    **config.parameters_of("trigger", config.trigger),
  )
  root = jax.random.key(config.seed)

  plan = plan or execution.plan_for()
  model = twin.model if twin else _model(config, dataset, plan)
  for rule in {config.aggregation, config.fine_tune_aggregation}:
    if not extensions_lib.is_own("aggregator", rule):
      continue
    extensions_lib.require_rule(
      rule,
      _aggregator(config, rule),
      jax.eval_shape(model.init, root),
      config.clients_per_round or config.num_clients,
    )
  attack = _attack(config, model)
  mesh = parallel.make_mesh(config.devices)

  def poison(clients: federations.Federation) -> federations.Federation:
    return attack.data(clients, jax.random.fold_in(root, 1))

  images = (dataset.train_images, dataset.train_labels)
  who: dict[str, Any] = {
    "num_attackers": config.num_attackers,
    "pieces": pieces,
    "attack_start": config.attack_start,
    "attack_rounds": config.attack_rounds,
  }

  def gathered(
    dealt: partitions.Partition,
    change: Callable[[federations.Federation], federations.Federation],
  ) -> tuple[Any, federations.Federation]:
    """All clients, where they are to be, and what there is to see of them."""
    if config.population == "host":
      population = populations.Population(
        *images,
        dealt,
        poison=change,
        mesh=mesh,
        chunk=config.clients_per_round,
        **who,
      )
      return population, population.clients
    clients = change(federations.create(*images, dealt, **who))
    return parallel.place(clients, mesh), clients

  federation, clients = gathered(partition, poison)
  validating = None
  if kept_back is not None:
    validating, _ = gathered(kept_back, lambda clients: clients)
  poisons = np.any(clients.poisoned, axis=1).tolist()
  for client in range(config.num_attackers):
    if "backdoor" in config.attack_names and not poisons[client]:
      raise errors.ConfigError(
        f"attacker {client} has no image of --victim_label="
        f"{config.victim_label} to backdoor, or too few samples for"
        f" --poison_fraction={config.poison_fraction:g}{_kept(config)}."
      )
  if config.attacker_latent:
    clean = np.asarray(clients.mask) & ~np.asarray(clients.poisoned)
    aims = clean & (np.asarray(clients.labels) == config.target_label)
    for client in range(config.num_attackers):
      if not aims[client].any():
        raise errors.ConfigError(
          f"attacker {client} has no image of --target_label="
          f"{config.target_label}, whose features --attacker_latent takes: add"
          f" --attackers_hold_target{_kept(config)}."
        )

  # A batch that divides evenly is evaluated by all devices.
  devices = 1 if mesh is None else mesh.size
  evaluation_batch = -(-plan.evaluation_batch // devices) * devices
  if (
    like and like.mesh == mesh and like.test.labels.shape[1] == evaluation_batch
  ):
    test = like.test
  else:
    test = parallel.place_examples(
      evaluate.batched(
        dataset.test_images, dataset.test_labels, batch_size=evaluation_batch
      ),
      mesh,
    )
  if config.pruning == configs.GAIN and "fp" in config.phases:
    models.require_plain_target(model, f"--pruning={configs.GAIN}")
  if "fst" in config.phases:
    # Not after hours of training.
    models.classifier_path(model, jax.eval_shape(model.init, jax.random.key(0)))
  block = (
    twin.block if twin else _block(_kind_of_block(config, model, plan, {}))
  )
  tuning = config.tuning
  if not tuning:
    tuning_block = block
  elif twin and twin.config.tuning == tuning:
    tuning_block = twin.tuning_block
  else:
    tuning_block = _block(_kind_of_block(config, model, plan, tuning))
  shift_block = None
  if "ffst" in config.phases and twin and twin.config.tuning == tuning:
    shift_block = twin.shift_block
  if "ffst" in config.phases and shift_block is None:
    shifting = {**tuning, "shift": True}
    shift_block = _block(_kind_of_block(config, model, plan, shifting))
  known = workdirs.DATA_SHA256
  digests = {known: like.digests[known] if like else data.digest(dataset)}
  own = data.Labelled(
    dataset.train_images[held_out], dataset.train_labels[held_out]
  )
  if config.server_data:
    own, digests[workdirs.SERVER_SHA256] = _from_elsewhere(config, dataset)
  validation, stamped = None, None
  if len(own.labels):
    validation = evaluate.batched(*own, batch_size=evaluation_batch)
  if config.num_attackers:
    stamped = evaluate.backdoored(
      dataset.test_images,
      dataset.test_labels,
      trigger=triggers.union(pieces),
      victim_label=config.victim_label,
      target_label=config.target_label,
      over=config.attack_images,
      batch_size=evaluation_batch,
    )
  return Experiment(
    config=config,
    dataset=dataset,
    model=model,
    federation=federation,
    client_validation=validating,
    attack=attack,
    aggregator=_aggregator(config),
    block=block,
    tuning_block=tuning_block,
    shift_block=shift_block,
    key=parallel.replicate(jax.random.fold_in(root, 3), mesh),
    validation=validation and parallel.place_examples(validation, mesh),
    test=test,
    backdoored=stamped and parallel.place_examples(stamped, mesh),
    mesh=mesh,
    digests=digests,
  )


def closest(config: Config, known: Iterable[Experiment]) -> Experiment | None:
  """Of other experiments the one to set a config up like.

  Returns:
    The first of the same structure and fine-tuning (`Config.tuning`), else the
    first of the same structure, else the first on the same data set, else None.
  """
  related = [one for one in known if _data(one.config) == _data(config)]
  structure, tuning = config.structure(), config.tuning

  def shared(one: Experiment) -> tuple[bool, bool]:
    alike = one.config.structure() == structure
    return alike, alike and one.config.tuning == tuning

  # The first of the best.
  return max(related, key=shared, default=None)


def _data(config: Config) -> tuple[str, str, bool]:
  """What decides on which images there are to be dealt."""
  return config.dataset, config.data_dir, config.download


def _model(
  config: Config, dataset: data.Dataset, plan: execution.Plan
) -> models.Model:
  """The network."""
  normalisation: dict[str, tuple[float, ...]] = {}
  if config.normalisation == "standard":
    normalisation = {"mean": dataset.mean, "std": dataset.std}
  return networks.build(
    config.model,
    image_shape=dataset.train_images.shape[1:],
    num_classes=dataset.num_classes,
    **normalisation,
    **config.parameters_of("network", config.model),
    initialisation=config.initialisation,
    forms=layers.Forms(
      conv=plan.forms.conv if config.conv == "auto" else config.conv,
      pooling=plan.forms.pooling
      if config.pooling == "auto"
      else config.pooling,
    ),
  )


@dataclasses.dataclass(frozen=True)
class _KindOfBlock:
  """What makes rounds the program that they are.

  Attributes:
    structure: of the experiment (`Config.structure`).
    tuning: what fine-tuning has of its own (`Config.tuning`), or nothing; and
      "shift" of federated Feature Shift Tuning.
    model: the network.
    plan: how to compute.
    config: all settings of the experiment that asked first.
  """

  structure: tuple[tuple[str, Any], ...]
  tuning: tuple[tuple[str, Any], ...]
  model: models.Model
  plan: execution.Plan
  config: Config = dataclasses.field(compare=False)


def _kind_of_block(
  config: Config,
  model: models.Model,
  plan: execution.Plan,
  tuning: dict[str, Any],
) -> _KindOfBlock:
  structure = tuple(config.structure().items())
  return _KindOfBlock(structure, tuple(tuning.items()), model, plan, config)


# One run after the other in one process, with another seed or another
# cleansing, compiles its rounds once.
@functools.lru_cache(maxsize=8)
def _block(kind: _KindOfBlock) -> rounds.Block:
  """Rounds of training, fine-tuning or federated Feature Shift Tuning."""
  config, model, plan = kind.config, kind.model, kind.plan
  tuning = dict(kind.tuning)
  attack = _attack(config, model)
  stealth = tuning.get("stealth", config.attacker_stealth)
  if stealth and config.num_attackers:
    attack = attacks.chain(attack, attacks.within_benign(stealth))
  extra = None
  if "shift" in tuning:
    extra = feature_shift.by_clients(model)
  chunk = config.client_chunk
  on_host = config.population == "host"
  run_round = rounds.make_round(
    model,
    local.sgd_training(
      model,
      optimizer(config),
      epochs=config.local_epochs,
      batch_size=config.batch_size,
      most_steps=config.local_steps,
      last_conv_l2=config.last_conv_l2,
      precision=config.precision,
      augmentation=config.augment,
      extra=extra,
      **attack.in_steps,
    ),
    attack=attack,
    aggregator=_aggregator(config, tuning.get("aggregation")),
    cohort_size=0 if on_host else config.clients_per_round,
    server_rate=config.server_rate,
    client_chunk=plan.client_chunk if chunk < 0 else chunk,
    schedule=schedule(config),
  )
  if on_host:
    return rounds.make_streamed_block(
      model, run_round, config.clients_per_round
    )
  return rounds.make_block(model, run_round)


def _aggregator(
  config: Config, name: str | None = None
) -> aggregators.Aggregator:
  """The server's rule; that of training, unless it is named."""
  name = name or config.aggregation
  return aggregators.build(
    name,
    trim=config.aggregation_trim,
    **config.parameters_of("aggregator", name),
  )


def _attack(config: Config, model: models.Model) -> attacks.Attack:
  """All that attackers do."""
  return attacks.chain(
    *(
      attacks.ATTACKS[name](
        model, config, **config.parameters_of("attack", name)
      )
      for name in config.attack_names
    ),
    attacks.model_replacement(config.gamma),
    attacks.own_rate(
      (config.attacker_learning_rate or config.learning_rate)
      / config.learning_rate
    ),
    attacks.REPORTS[config.attacker_reports],
    *_adaptive(model, config),
  )


def _adaptive(model: models.Model, config: Config) -> list[attacks.Attack]:
  """The attacks that know the network, the defence or the others."""
  adaptive = []
  if config.attacker_neurotoxin:
    # First: what others keep within their limits is not put back.
    adaptive.append(attacks.neurotoxin(config.attacker_neurotoxin))
  if config.avoided_neurons:
    try:
      adaptive.append(attacks.pruning_aware(model, config.avoided_neurons))
    except ValueError as error:
      raise errors.ConfigError(
        f"--attacker_avoids={config.attacker_avoids} does not fit --model="
        f"{config.model}: {error}."
      ) from error
  if config.attacker_limit:
    adaptive.append(attacks.self_limited(model, config.attacker_limit))
  if config.attacker_gain:
    adaptive.append(attacks.gain_limited(model, config.attacker_gain))
  if config.attacker_latent:
    adaptive.append(
      attacks.latent_backdoor(
        model, config.attacker_latent, config.attacker_latent_at
      )
    )
  return adaptive


def optimizer(config: Config) -> optax.GradientTransformation:
  """Local SGD: clipped gradients, weight decay, momentum."""
  steps = []
  if config.gradient_clip:
    steps.append(optax.clip_by_global_norm(config.gradient_clip))
  if config.weight_decay:
    steps.append(optax.add_decayed_weights(config.weight_decay))
  steps.append(optax.sgd(config.learning_rate, config.momentum or None))
  return optax.chain(*steps)


def schedule(config: Config) -> Callable[[Array], Array] | None:
  """The factor of `optimizer`'s learning rate in each round.

  Linear from 1 in the first round to `final_learning_rate` in the last, and
  constant after it; None if the rate is.
  """
  if not config.final_learning_rate:
    return None
  fall = 1 - config.final_learning_rate / config.learning_rate

  def factor(done: Array) -> Array:
    if not config.rounds:
      # There is but fine-tuning, which goes by the last one.
      return jnp.float32(1 - fall)
    return 1 - fall * jnp.minimum(done / max(config.rounds - 1, 1), 1)

  return factor


def _check_labels(config: Config, dataset: data.Dataset) -> None:
  if not config.num_attackers:
    return
  for name in ("victim_label", "target_label"):
    label = getattr(config, name)
    if label >= dataset.num_classes:
      raise errors.ConfigError(
        f"--{name}={label} is out of range: {dataset.name} has labels 0 to"
        f" {dataset.num_classes - 1}."
      )
  if not (dataset.test_labels == config.victim_label).any():
    raise errors.ConfigError(
      f"{dataset.name} has no test image of --victim_label="
      f"{config.victim_label}."
    )


def _kept(config: Config) -> str:
  """Why a client may train on none of a label that it was dealt."""
  if not config.client_holdout:
    return ""
  return f"; of few, --client_holdout={config.client_holdout:g} may take all"


def _from_elsewhere(
  config: Config, dataset: data.Dataset
) -> tuple[data.Labelled, str]:
  """The server's images that are no training images; their file's digest."""
  there = data.labelled(config.server_data)
  wanted, found = dataset.train_images.shape[1:], there.images.shape[1:]
  if found != wanted:
    raise errors.ConfigError(
      f"--server_data={config.server_data}: its images are {found}, those of"
      f" {dataset.name} {wanted}."
    )
  if there.labels.max() >= dataset.num_classes:
    raise errors.ConfigError(
      f"--server_data={config.server_data}: its labels go to"
      f" {there.labels.max()}, those of {dataset.name} to"
      f" {dataset.num_classes - 1}."
    )
  if config.holds_out and len(there.labels) < 2:
    raise errors.ConfigError(
      f"--server_data={config.server_data}: of one image none can be left out"
      " of the server's training (--server_holdout)."
    )
  # Not the stream that deals the clients theirs: those are the same as ever.
  rng = np.random.default_rng((config.seed, 5))
  chosen = rng.permutation(len(there.labels))[: config.validation_size]
  images, labels = (array[chosen] for array in there)
  return data.Labelled(images, labels), data.digest(there)


def _partition(
  config: Config, dataset: data.Dataset
) -> tuple[np.ndarray, partitions.Partition]:
  """The server's validation indices, and who gets which of the rest."""
  labels = dataset.train_labels
  rng = np.random.default_rng(config.seed)
  held_out, pool = partitions.hold_out(len(labels), config.validation_size, rng)
  sizes: dict[str, Any] = {
    "num_clients": config.num_clients,
    "samples_per_client": config.samples_per_client,
    "rng": rng,
  }
  if config.partition == "iid":
    return held_out, partitions.iid(pool, **sizes)
  sizes["num_classes"] = dataset.num_classes
  needed = [config.victim_label]
  if config.attackers_hold_target:
    needed.append(config.target_label)
  sizes["required"] = dict.fromkeys(range(config.num_attackers), needed)
  if config.partition == "dirichlet":
    return held_out, partitions.dirichlet(
      labels, pool, alpha=config.dirichlet_alpha, **sizes
    )
  return held_out, partitions.by_labels(
    labels, pool, labels_per_client=config.labels_per_client, **sizes
  )


# --- running -----------------------------------------------------------------


def run(config: Config, *, quiet: bool = False) -> dict[str, Any]:
  """Trains, cleanses and reports; continues where an earlier run stopped.

  Args:
    config: the experiment and its workdir.
    quiet: whether to show nothing on the terminal.

  Returns:
    The contents of results.json.

  Raises:
    errors.FljaxError: with one sentence for the user.
  """
  use_devices(config)
  use_compilation_cache(config)
  first = jax.process_index() == 0
  console = consoles.Console(quiet=quiet or not first)
  with workdirs.open_for_all(
    config.workdir, config.identity(), config.defaults()
  ) as workdir:
    results = workdir.results()
    if results is not None:
      check_finished([workdir], config)
      console.say(f"{workdir.path} is complete; nothing is left to do.")
      driving.write_report(config, results, workdir)
      return results
    console.say(consoles.header(config))
    with driving.Stop.on_signals() as stop:
      return drive(setup(config), workdir, console, stop)


def load(
  workdir: str, *, phase: str = "", data_dir: str = "", extensions: str = ""
) -> tuple[Experiment, rounds.ServerState]:
  """What a run's folder describes, and a model that it holds.

  Args:
    workdir: the folder; nothing in it is changed.
    phase: whose model, by its name in results.json; empty is the one that the
      run ended with, or stands at. Side results ("fp+aw", baselines) have a
      name only.
    data_dir: as in the settings, of data sets that are not bundled.
    extensions: as in the settings, of parts of your own that the run uses and
      that are not registered yet.

  Returns:
    The experiment, as `setup` makes it, and the server's state with the
    model, `state.params`, and its mask, `state.neuron_mask`.

  Raises:
    errors.ConfigError: an extension that it needs is missing.
    errors.WorkdirError: the folder holds no run, a run of other settings than
      there are, of other data, or of parts whose code has changed, or no such
      phase.
    errors.CheckpointError: the checkpoint is damaged.
    errors.DataError: the data set cannot be had.
  """
  folder = Path(workdir).expanduser()
  settings, digests = workdirs.read_settings(folder)
  unknown = sorted(settings.keys() - Config.defaults().keys())
  if unknown:
    raise errors.WorkdirError(
      f"{folder} is of another version of fljax: it has the settings"
      f" {', '.join(unknown)}."
    )
  code = {
    key: settings.pop(key, {})
    for key in (configs.TRAINING_CODE, configs.CLEANSING_CODE)
  }
  try:
    config = Config(
      **settings, workdir=str(folder), data_dir=data_dir, extensions=extensions
    )
  except errors.ConfigError as error:
    own = sorted({*code[configs.TRAINING_CODE], *code[configs.CLEANSING_CODE]})
    if not own or extensions:
      raise
    raise errors.ConfigError(
      f"{error} {folder} uses parts of its own ({', '.join(own)}): give the"
      " file that registers them as extensions."
    ) from error
  if config.code != code:
    raise errors.WorkdirError(
      f"{folder} is of other code: it is {code} there, {config.code} here."
    )
  experiment = setup(config)
  for name, here in experiment.digests.items():
    if here != digests.get(name):
      raise errors.WorkdirError(
        f"{folder} is of other data: {name} is {digests.get(name)} there,"
        f" {here} here."
      )
  like = experiment.init_state()
  state = workdirs.read_state(folder, like, phase)
  return experiment, parallel.replicate(
    jax.tree.map(jnp.asarray, state), experiment.mesh
  )


def check_finished(
  folders: Iterable[workdirs.Workdir | workdirs.Shared],
  config: Config,
  digests: dict[str, str] | None = None,
) -> None:
  """Refuses finished runs of other data than there is now.

  Args:
    folders: theirs.
    config: names the data.
    digests: theirs, if they are known. Otherwise files of a user's own are
      looked at that are still there: of data sets that have a name there is
      but one, and results outlive their data.

  Raises:
    errors.WorkdirError: a run has other data.
  """

  def look() -> dict[str, str]:
    found = {}
    if config.dataset.endswith(".npz"):
      with contextlib.suppress(errors.DataError):
        found[workdirs.DATA_SHA256] = data.digest(data.load(config.dataset))
    if config.server_data:
      with contextlib.suppress(errors.DataError):
        server = data.labelled(config.server_data)
        found[workdirs.SERVER_SHA256] = data.digest(server)
    return found

  # Of several processes the first looks, so that all go on alike.
  now = parallel.on_first(look) if digests is None else digests
  for folder in folders:
    folder.check(now)


def drive(
  experiment: Experiment,
  workdir: workdirs.Workdir | workdirs.Shared,
  console: consoles.Console,
  stop: driving.Stop,
) -> dict[str, Any]:
  """Runs what is not done yet of an experiment, in its folder.

  Args:
    experiment: from `setup`.
    workdir: its folder, opened under its identity.
    console: where it is told.
    stop: from `driving.Stop.on_signals`.

  Returns:
    The contents of results.json.

  Raises:
    errors.FljaxError: with one sentence for the user.
  """
  driver = driving.Driver(experiment, workdir, console, stop)
  driver.claim()
  driver.restore()
  return driver.finish()


def use_devices(config: Config) -> None:
  """Divides the CPU and joins other processes, before JAX's first use."""
  wanted = config.cpu_devices
  if not wanted and getattr(jax.config, "jax_num_cpu_devices", -1) < 1:
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux: those that we may use.
      cores = len(os.sched_getaffinity(0))
    wanted = min(cores, config.clients_per_round or config.num_clients)
  parallel.wait_for_slow_devices()
  if wanted:
    try:
      jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:
      # JAX has started already, which matters only to who asked for it.
      if jax.local_device_count() < config.cpu_devices:
        raise errors.ConfigError(
          f"--cpu_devices={config.cpu_devices} comes too late: JAX has"
          f" started with {jax.local_device_count()}."
        ) from None
  parallel.start(config.coordinator, config.num_processes, config.process_id)


def use_compilation_cache(config: Config) -> None:
  """Keeps compiled programs between runs, unless told not to."""
  folder: Path | None = data.cache_dir() / "programs"
  if config.compilation_cache == "off":
    folder = None
  elif config.compilation_cache != "default":
    folder = Path(config.compilation_cache).expanduser()
  programs.keep(folder)
