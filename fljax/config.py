"""The configuration of a run: one frozen value, built from flags here only.

Every field is a flag of the same name; its default, help text and range stand
in one place. `launch/*.flags` are flagfiles of them. A value that is made loads
its `extensions`, whose parts its other settings may name.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection
import dataclasses
import math
from pathlib import Path
from typing import Any

from absl import flags

from fljax import aggregators
from fljax import attacks
from fljax import data
from fljax import errors
from fljax import evaluate
from fljax import execution
from fljax import extensions
from fljax import layers
from fljax import local
from fljax import networks
from fljax import triggers
from fljax.baselines import phases as baselines
from fljax.cleanse import pipeline
from fljax.cleanse import pruning
from fljax.cleanse import selection
from fljax.cleanse import weights

# Adjusting thins the margin of the victim class, and training on restores it.
RETURNING = ("ft", "aw")
# A value of --pruning that needs no report.
GAIN = "gain"
_LARGEST = 2**31 - 1
# Of Δ; where clients report accuracies, each of all.
_MOST_STEPS = 10_000
# Choices that a user's own join when they are registered.
_MODELS: ChainMap[str, Any] = ChainMap(networks.NETWORKS, networks.BUILDERS)
_TUNING_RULES: ChainMap[str, Any] = ChainMap(
  {"same": None}, aggregators.AGGREGATORS
)
# In config.json beside the settings: what parts of a user's own are made of.
TRAINING_CODE, CLEANSING_CODE = "code_of_training", "code_of_cleansing"
# Settings that are paths, or may be.
PATHS = (
  "workdir",
  "data_dir",
  "trained_in",
  "compilation_cache",
  "dataset",
  "server_data",
)
# Settings of several values, joined by commas.
LISTS = ("parameters", "attack", "attacker_avoids", "cleanse")


def _setting(
  default: Any,
  help_text: str,
  *,
  low: float | None = None,
  high: float | None = None,
  above: float | None = None,
  choices: Collection[str] | None = None,
  identity: bool = True,
  structure: bool = True,
  cleansing: bool = False,
) -> Any:
  """A field with its help text and range.

  Args:
    default: also fixes the flag's type.
    help_text: shown by --help, with the range.
    low: smallest value.
    high: largest value.
    above: the value must be larger than this.
    choices: allowed strings; a dictionary's keys, as they are when asked.
    identity: whether another value makes it another experiment; False for
      where files are and what is shown.
    structure: whether another value makes other programs; False for what
      reaches them as arrays of the same shapes, so that experiments which
      differ in nothing else can share them (`fljax.sweep`).
    cleansing: whether it matters only once the model is trained, so that
      experiments which differ in nothing else can share the model, and the
      programs that train it.

  Returns:
    The dataclass field.
  """
  return dataclasses.field(
    default=default,
    metadata={
      "help": help_text,
      "low": low,
      "high": high,
      "above": above,
      "choices": choices,
      "identity": identity,
      "structure": structure and not cleansing,
      "cleansing": cleansing,
    },
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that decides a run's result, and where it is written.

  Raises:
    errors.ConfigError: on construction, if a value is out of its range or
      contradicts another. What depends on the data set (labels, numbers of
      images) is checked when that is loaded.
  """

  # Where things are, and what is shown.
  workdir: str = _setting(
    "runs/fljax",
    "Folder for everything the run writes. The same command continues an"
    " interrupted run found there.",
    identity=False,
    structure=False,
  )
  data_dir: str = _setting(
    "",
    "TensorFlow Datasets directory, or folder of IDX files. Empty: MNIST is"
    " the bundled copy, others are looked for where TensorFlow Datasets"
    " keeps them.",
    identity=False,
  )
  download: bool = _setting(
    False,
    "Let TensorFlow Datasets download and prepare a missing data set.",
    identity=False,
  )
  figures: bool = _setting(
    True, "Draw figures and the HTML report.", identity=False
  )
  profile: bool = _setting(
    False,
    "Write a trace of one round of training, and of the evaluation after it,"
    " to the folder 'profile' in the workdir, for TensorBoard or"
    " ui.perfetto.dev. It is the first round after the first block.",
    identity=False,
  )
  trained_in: str = _setting(
    "",
    "Workdir of a run whose settings are the same but for those of cleansing,"
    " or of a sweep that has one: its trained model is taken over, and only"
    " cleansing is done.",
    identity=False,
    structure=False,
  )
  compilation_cache: str = _setting(
    "default",
    "Folder in which compiled programs are kept between runs; 'default' is"
    " the user's cache folder, 'off' keeps none.",
    identity=False,
  )

  extensions: str = _setting(
    "",
    "Python files, joined by commas, with networks, triggers, aggregation"
    " rules, attacks and defences of your own, for the settings to name: see"
    " fljax.extensions, and launch/extension_example.py.",
    identity=False,
    structure=False,
  )

  parameters: str = _setting(
    "",
    "Parameters of parts of your own, joined by commas, as in"
    " 'near.radius=2,clp.deviations=2.5': by the part's name, and that of a"
    " keyword argument of its function.",
  )

  # The experiment.
  dataset: str = _setting(
    "mnist",
    f"Data set: {', '.join(data.NAMES)}, or the path of an .npz file of"
    " images and labels.",
  )
  model: str = _setting(
    "mnist_large",
    "Network. '_bn' has batch normalisation, whose running statistics the"
    " server averages like weights, and one fully connected layer instead of"
    " three.",
    choices=_MODELS,
  )
  initialisation: str = _setting(
    "uniform",
    "Initial weights: 'uniform' is uniform in ±1/sqrt(fan_in), PyTorch's"
    " default.",
    choices=tuple(layers.INITIALISERS),
  )
  normalisation: str = _setting(
    "unit",
    "How images reach the network, after they are limited to their range:"
    " 'unit' scales it to [0, 1], 'standard' also shifts and scales to mean 0"
    " and deviation 1.",
    choices=("unit", "standard"),
  )
  seed: int = _setting(
    0,
    "Seed of everything random: partition, initial weights, batches,"
    " poisoning, client sampling.",
    low=0,
    structure=False,
  )

  # The clients.
  num_clients: int = _setting(10, "Clients in the federation (N).", low=1)
  clients_per_round: int = _setting(
    0, "Clients sampled in each round (k·N); 0 takes all.", low=0
  )
  samples_per_client: int = _setting(
    1500,
    "Training images per client (n_i); with the Dirichlet partition, on"
    " average.",
    low=1,
  )
  partition: str = _setting(
    "labels",
    "How images are dealt: 'labels' gives each client --labels_per_client"
    " labels, 'iid' a random share, 'dirichlet' label proportions drawn"
    " with --dirichlet_alpha.",
    choices=("labels", "iid", "dirichlet"),
  )
  labels_per_client: int = _setting(
    3,
    "Labels per client (K) of the 'labels' partition.",
    low=1,
    structure=False,
  )
  dirichlet_alpha: float = _setting(
    0.5, "Concentration of the 'dirichlet' partition.", above=0
  )
  validation_size: int = _setting(
    5000,
    "Training images that the server holds out to validate on; they are"
    " nobody's training data. With 0, clients report accuracies instead.",
    low=0,
  )
  client_holdout: float = _setting(
    0.0,
    "Share of its images, and of each of its labels, that a client keeps out of"
    " its training, whoever decides. Where clients do, it reports the accuracy"
    " on these, or nothing if they are none, and fine-tuning keeps its best"
    " round by that. With 0, accuracies that clients report are those on what"
    " they train on.",
    low=0,
    high=0.9,
  )

  # Federated averaging.
  rounds: int = _setting(60, "Rounds of federated training.", low=0)
  local_epochs: int = _setting(
    1, "Passes over its data that a client makes per round.", low=1
  )
  local_steps: int = _setting(
    0,
    "Most local steps per round: a client with more data in its"
    " --local_epochs sees a random part of it. 0 sets no limit.",
    low=0,
  )
  batch_size: int = _setting(20, "Images per local step.", low=1)
  augment: str = _setting(
    "none",
    "Random changes of training images, afresh in every step: 'flip' mirrors"
    " half of them left to right, 'crop' also shifts by up to 4 pixels each"
    " way; in Fine-Pruning's tuning and fst too. Triggers are stamped after"
    " it.",
    choices=tuple(local.AUGMENTATIONS),
  )
  learning_rate: float = _setting(0.1, "Local learning rate.", above=0)
  final_learning_rate: float = _setting(
    0.0,
    "Local learning rate of the last round, to which it falls linearly over"
    " --rounds; 0 keeps --learning_rate.",
    low=0,
  )
  momentum: float = _setting(
    0.0, "Momentum of local SGD, afresh in each round.", low=0, high=0.9999
  )
  weight_decay: float = _setting(
    0.0, "Weight decay of local SGD, on all parameters.", low=0
  )
  gradient_clip: float = _setting(
    0.0,
    "Largest L2 norm of the gradient of a local step, or of one of the server,"
    " over all parameters; longer ones are scaled down to it. 0 sets no limit.",
    low=0,
  )
  last_conv_l2: float = _setting(
    0.0,
    "λ of the penalty (λ/2)·Σw² on the last convolution's kernel alone"
    " (Section VI-A).",
    low=0,
  )
  aggregation: str = _setting(
    "mean",
    "'mean' is the paper's plain mean of updates, 'weighted' FedAvg's by"
    " number of images; 'trimmed_mean' and 'median' of each parameter, 'krum',"
    " 'multi_krum' and the 'geometric_median' withstand a minority, and learn"
    " less where clients differ; 'norm_clipping' averages updates that are no"
    " longer than the median one, 'flame' of these a majority whose directions"
    " are alike, and adds a little noise; 'robust_learning_rate' moves away"
    " from the mean where clients disagree about the sign.",
    choices=aggregators.AGGREGATORS,
  )
  aggregation_trim: float = _setting(
    0.2,
    "Share of a round's clients that may be malicious, f of n: trimmed_mean"
    " leaves f out on each side, multi_krum f at all, krum looks at the"
    " n - f - 2 nearest, robust_learning_rate wants signs that sum up to 2f."
    " Nothing to the others.",
    low=0,
    high=0.49,
  )
  server_rate: float = _setting(
    1.0, "Server learning rate η on the combined update.", above=0
  )
  eval_every: int = _setting(
    5, "Rounds between evaluations of the global model.", low=1
  )
  checkpoint_every: int = _setting(
    20, "Rounds between checkpoints while training.", low=1
  )

  # The attack.
  num_attackers: int = _setting(1, "Malicious clients.", low=0)
  attack: str = _setting(
    "backdoor",
    "What they do, in order, joined by commas: the 'backdoor' by data that"
    " the settings below describe, and attacks of your own (--extensions),"
    " beside it or instead. Amplification, rates and reports are as the"
    " settings say in any case.",
  )
  victim_label: int = _setting(
    9,
    "Label whose stamped images shall be misclassified (VL).",
    low=0,
    structure=False,
  )
  target_label: int = _setting(
    0, "Label they shall be taken for (AL).", low=0, structure=False
  )
  attackers_hold_target: bool = _setting(
    False,
    "Deal attackers images of the target label too, not of the victim label"
    " alone. What --attacker_latent needs.",
  )
  trigger: str = _setting(
    "pixel5",
    "Backdoor pattern: so many pixels in the lower right corner, the one in"
    " the very corner, the four pieces of the Distributed Backdoor Attack, or"
    " faint noise over the whole image (blended).",
    choices=triggers.TRIGGERS,
    structure=False,
  )
  poison_fraction: float = _setting(
    0.25,
    "Share of an attacker's images that are backdoored versions of its"
    " victim images.",
    above=0,
    high=0.99,
    structure=False,
  )
  gamma: float = _setting(
    3.0,
    "Amplification γ of an attacker's update: 1 is none; (clients per"
    " round)/(server rate) replaces the global model.",
    low=1,
    structure=False,
  )
  attacker_learning_rate: float = _setting(
    0.0,
    "Local learning rate of attackers while they attack; it falls with"
    " everybody's. 0 takes everybody's.",
    low=0,
    structure=False,
  )
  attack_start: int = _setting(
    0,
    "Rounds of training before the attackers begin to attack.",
    low=0,
    structure=False,
  )
  attack_rounds: int = _setting(
    0,
    "Rounds of training for which they attack, and train as benign clients do"
    " after them; 0 is to its end. In fine-tuning they attack in any case.",
    low=0,
    structure=False,
  )
  attacker_reports: str = _setting(
    "honest",
    "What attackers report: the truth; where clients report accuracies, by"
    " which pruning and adjusting end and a round of fine-tuning is kept, total"
    " failure to stop them, or perfection to have the model ruined; or ranks"
    " and votes that promote the backdoor's neurons.",
    choices=tuple(attacks.REPORTS),
    cleansing=True,
  )
  attacker_avoids: str = _setting(
    "",
    "Neurons, as in 3,17,22, that attackers hold at zero in training because"
    " they expect them to be pruned (Section VI-B, attack 2).",
  )
  attacker_limit: float = _setting(
    0.0,
    "Δ to which attackers limit their own weights of the last convolution"
    " after each local step, in standard deviations, so that none is extreme"
    " (Section VI-B); 0 does not.",
    low=0,
    high=1000,
  )
  attacker_gain: float = _setting(
    0.0,
    "Attackers keep, after each local step, what a single cell can raise a"
    " neuron of the last convolution by within so many times the median"
    " neuron's, so that --pruning=gain does not find theirs; at least 1, or 0:"
    " they do not.",
    low=0,
    high=1000,
  )
  attacker_stealth: float = _setting(
    0.0,
    "Standard deviations from the benign updates' mean within which attackers"
    " keep each parameter of what they send, amplified or not, so that rules"
    " against outliers find none (A Little Is Enough); 0 sets no limit.",
    low=0,
    high=1000,
  )
  attacker_neurotoxin: float = _setting(
    0.0,
    "Share of all parameters, those that benign clients changed most in the"
    " round before, which attackers leave alone, so that the backdoor is not"
    " undone where they do not attack any more (Neurotoxin, whose authors take"
    " 0.05); 0 is none.",
    low=0,
    high=0.99,
  )
  attacker_latent: float = _setting(
    0.0,
    "Weight, beside cross-entropy, with which attackers train stamped images"
    " to have the target label's features before the last layer, against a"
    " server that replaces that layer (fst). They need images of the target"
    " label: --attackers_hold_target. 0 does not.",
    low=0,
    high=1000,
  )
  attacker_latent_at: str = _setting(
    "features",
    "What --attacker_latent draws to the target label's: 'features' before the"
    " last layer, or 'activations' of the last convolution, by which a server"
    " that learns all after it anew could not tell stamped images.",
    choices=attacks.LATENT,
  )
  attack_images: str = _setting(
    "victim",
    "What attack success is measured on: stamped test images of the victim"
    " label, or of all 'others' than the target label.",
    choices=evaluate.OVER,
  )

  # Cleansing.
  cleanse: str = _setting(
    "fp,ft,aw",
    "Phases after training, in order: fp (federated pruning), ft"
    " (fine-tuning), aw (adjusting extreme weights); or, beyond the paper,"
    " ffst (Feature Shift Tuning in rounds with all clients, attackers among"
    " them); or, to compare with, what the server does alone with its own"
    " images: nc-prune and nc-unlearn (Neural Cleanse), fine-pruning, fst"
    " (Feature Shift Tuning); and nc-oracle (Neural Cleanse told the target"
    " label, on the test images, the best of several by AA), or a defence of"
    " your own (--extensions). Each is applied to the trained model if only"
    " such are named. ft and aw may come again, as in fp,aw,ft,aw. Empty for"
    " none.",
    cleansing=True,
  )
  pruning: str = _setting(
    "mvp",
    "Which neurons fp prunes: the least active ones by rank aggregation (rap)"
    " or majority voting (mvp), as many as --pruning_drop allows; or, beyond"
    " the paper, all those that a single cell of their input can raise by far"
    " more than others, by the weights alone (gain), for which no client"
    " reports anything and accuracy decides nothing.",
    choices=(*pruning.SCORES, GAIN),
    cleansing=True,
  )
  pruning_rate: float = _setting(
    0.5,
    "Share of neurons that each client votes to prune (p, mvp only); with"
    " hardly any or nearly all, votes tie and say nothing.",
    low=0.01,
    high=0.99,
    cleansing=True,
  )
  pruning_outlier: float = _setting(
    2.0,
    "Anomaly index above which a neuron is pruned (gain only): so many robust"
    " standard deviations above the median neuron.",
    low=0,
    high=1000,
    cleansing=True,
  )
  decide_by: str = _setting(
    "server",
    "Whose accuracies end pruning and adjusting, and choose the round of"
    " fine-tuning: those on the 'server's own images, or those that 'clients'"
    " report, as where the server has no images at all; fine-tuning then keeps"
    " its last round, or with --client_holdout the best. For a server that"
    " trains on images unlike its clients'.",
    choices=("server", "clients"),
    cleansing=True,
  )
  report_trim: float = _setting(
    0.2,
    "Share of the clients' reported accuracies left out on each side, when"
    " they decide.",
    low=0,
    high=0.49,
    cleansing=True,
  )
  pruning_drop: float = _setting(
    0.025,
    "Accuracy that pruning may cost, as a fraction (not with gain).",
    low=0,
    high=1,
    cleansing=True,
  )
  pruning_drop_of: str = _setting(
    "total",
    "What --pruning_drop bounds: the cost of all pruned neurons together"
    " (total), or that of the next one alone (neuron), however much those"
    " before have cost; with the baselines it is always all of them.",
    choices=tuple(selection.DROPS),
    cleansing=True,
  )
  fine_tune_rounds: int = _setting(
    10, "Most rounds of fine-tuning.", low=0, cleansing=True
  )
  fine_tune_patience: int = _setting(
    5,
    "Fine-tuning stops after so many rounds without better validation"
    " accuracy, or such as clients report where they decide; 0 runs all rounds."
    " Either way the best round's model is kept, or that from before if none is"
    " better; where clients decide without --client_holdout, all rounds are run"
    " and the last is kept.",
    low=0,
    cleansing=True,
  )
  fine_tune_drop: float = _setting(
    -1.0,
    "Fine-tuning ends as soon as the validation accuracy is at most this, a"
    " fraction, below the trained model's, before its first round already"
    " (threshold_tuning of Algorithm 1); -1 does not end it so.",
    low=-1,
    high=1,
    cleansing=True,
  )
  fine_tune_gamma: float = _setting(
    1.0,
    "Amplification γ that attackers keep up in fine-tuning.",
    low=1,
    cleansing=True,
  )
  fine_tune_stealth: float = _setting(
    0.0,
    "--attacker_stealth in fine-tuning alone; 0 is as in training.",
    low=0,
    high=1000,
    cleansing=True,
  )
  fine_tune_aggregation: str = _setting(
    "same",
    "How the updates of fine-tuning are aggregated; 'same' is as in training."
    " With trimmed_mean or median, one or two attackers of ten hardly teach"
    " the model again what adjusting removed before (aw,ft).",
    choices=_TUNING_RULES,
    cleansing=True,
  )
  fine_tune_learning_rate: float = _setting(
    0.0,
    "Local learning rate of fine-tuning; 0 keeps the one of training's last"
    " round.",
    low=0,
    cleansing=True,
  )
  adjusting_drop: float = _setting(
    0.0075,
    "Accuracy that adjusting extreme weights may cost, as a fraction.",
    low=0,
    high=1,
    cleansing=True,
  )
  delta_start: float = _setting(
    6.0,
    "First threshold Δ, in standard deviations.",
    above=0,
    high=1000,
    cleansing=True,
  )
  delta_step: float = _setting(
    0.25,
    "ε, by which Δ falls.",
    low=0.001,
    high=100,
    cleansing=True,
  )
  weight_statistics: str = _setting(
    "surviving",
    "Whether μ and σ are those of the surviving neurons' weights or of all"
    " weights of the layer, pruned zeros included.",
    choices=weights.STATISTICS,
    cleansing=True,
  )

  nc_learning_rate: float = _setting(
    0.1,
    "Neural Cleanse: learning rate of Adam in reversing triggers.",
    above=0,
    cleansing=True,
  )
  nc_steps: int = _setting(
    1000,
    "Neural Cleanse: most steps per class in reversing triggers.",
    low=1,
    cleansing=True,
  )
  server_learning_rate: float = _setting(
    0.1,
    "Learning rate of training on the server's images: Neural Cleanse's"
    " unlearning, Fine-Pruning's tuning, and fst, where it falls to 0"
    " along half a cosine.",
    above=0,
    cleansing=True,
  )
  server_epochs: int = _setting(
    10,
    "Passes over the server's images in Fine-Pruning's tuning and fst.",
    low=1,
    cleansing=True,
  )
  server_data: str = _setting(
    "",
    "Path of an .npz file of images and labels, or optdigits, 1,797 bundled"
    " digits by other writers than MNIST's: of these the server has"
    " --validation_size, at random, or all if they are fewer, instead of the"
    " training images held out for it, which are then nobody's. What a server"
    " has of its own is seldom of its clients' distribution.",
    cleansing=True,
  )
  server_holdout: float = _setting(
    0.2,
    "Share of the server's images that nc-unlearn, fine-pruning and fst, and"
    " defences of your own that need images, leave out of their training where"
    " fp, ft, aw or ffst comes after; those then decide by the accuracy on that"
    " share alone. 0: all train, and all decide what they were trained on.",
    low=0,
    high=0.9,
    cleansing=True,
  )
  fst_rounds: int = _setting(
    80,
    "Rounds of ffst; the best is kept, as in fine-tuning, or, if none is better"
    " than a last layer drawn at random, the model that came in. Its rule, rate"
    " and attackers are those of fine-tuning.",
    low=1,
    cleansing=True,
  )
  fst_weight: float = _setting(
    0.1,
    "Feature Shift Tuning (fst, ffst): how strongly the last layer is kept from"
    " what it was (α).",
    low=0,
    high=1000,
    cleansing=True,
  )

  # How it is computed; results agree to rounding.
  conv: str = _setting(
    "auto",
    "Form of convolutions; auto takes the backend's measured choice.",
    choices=("auto", *layers.CONV_FORMS),
  )
  pooling: str = _setting(
    "auto",
    "Form of poolings; auto takes the backend's measured choice.",
    choices=("auto", *layers.POOLING_FORMS),
  )
  population: str = _setting(
    "device",
    "Where clients' images are: all on the 'device', or on the 'host', from"
    " which each round's cohort is brought while the round before trains; for"
    " populations larger than device memory, with --clients_per_round.",
    choices=("device", "host"),
    identity=False,
  )
  precision: str = _setting(
    "default",
    "Precision of the products in training. 'default' is the backend's fastest"
    " with float32 arrays: factors are rounded to bfloat16 on TPU, to TF32 on"
    " newer GPUs. 'highest' is float32 everywhere. 'bfloat16', for"
    " accelerators, stores activations in that type too. Reports, searches and"
    " evaluations always take 'highest'.",
    choices=execution.PRECISIONS,
  )
  devices: int = _setting(
    0,
    "Devices that clients, and what the server computes by itself, are spread"
    " over; 0 takes all there are.",
    low=0,
    identity=False,
  )
  cpu_devices: int = _setting(
    0,
    "Devices that a CPU is divided into, which then share the clients; 0 takes"
    " one per core, as far as there are clients for them, unless"
    " JAX_NUM_CPU_DEVICES says otherwise.",
    low=0,
    identity=False,
  )
  coordinator: str = _setting(
    "",
    "With several processes: host:port of process 0. Not needed on Cloud TPU.",
    identity=False,
  )
  num_processes: int = _setting(
    1, "With --coordinator: how many processes.", low=1, identity=False
  )
  process_id: int = _setting(
    0,
    "With --coordinator: this process's number, from 0. Process 0 writes the"
    " workdir.",
    low=0,
    identity=False,
  )
  client_chunk: int = _setting(
    -1,
    "Clients trained at once: 0 all, 1 one by one, -1 the backend's measured"
    " choice. Memory grows with it.",
    low=-1,
  )

  def __post_init__(self) -> None:
    if isinstance(self.extensions, str):
      # First, as other settings name what they register.
      extensions.load(self.extensions)
    for field in dataclasses.fields(self):
      _check_range(field, getattr(self, field.name))
    self._check_clients()
    self._check_attack()
    self._check_phases()
    self._check_images()
    self._check_fine_tuning()
    self._check_search()
    self._check_parts()
    self._check_machines()
    for name in ("workdir", "compilation_cache"):
      if not getattr(self, name):
        raise errors.ConfigError(f"--{name} must not be empty.")
    for name in PATHS:
      require_home(f"--{name}", getattr(self, name))

  def _check_clients(self) -> None:
    if self.num_attackers > self.num_clients:
      raise errors.ConfigError(
        f"--num_attackers={self.num_attackers} is more than"
        f" --num_clients={self.num_clients}."
      )
    if self.clients_per_round > self.num_clients:
      raise errors.ConfigError(
        f"--clients_per_round={self.clients_per_round} is more than"
        f" --num_clients={self.num_clients}."
      )
    if self.population == "host" and not self.clients_per_round:
      raise errors.ConfigError(
        "--population=host needs --clients_per_round: without it, every"
        " client is on the device in every round."
      )

  def _check_attack(self) -> None:
    if self.victim_label == self.target_label and self.num_attackers:
      raise errors.ConfigError(
        f"--victim_label and --target_label are both {self.victim_label}:"
        " a backdoor needs two different labels."
      )
    if not self.attack_names:
      raise errors.ConfigError(
        "--attack must name what attackers do; with --num_attackers=0 there"
        " are none."
      )
    for name in self.attack_names:
      errors.require_choice("--attack", name, attacks.ATTACKS)
      if self.attack_names.count(name) > 1:
        raise errors.ConfigError(f"--attack={self.attack} has {name} twice.")
      for key in extensions.reads(name):
        if key not in type(self).__dataclass_fields__:
          raise errors.ConfigError(
            f"the attack {name!r} reads {key!r}, which is no setting."
          )
    largest = (self.clients_per_round or self.num_clients) / self.server_rate
    # Without this, γ = 1 would be out of range under a large server rate.
    largest = max(largest, 1.0)
    for name in ("gamma", "fine_tune_gamma"):
      if self.num_attackers and getattr(self, name) > largest:
        raise errors.ConfigError(
          f"--{name}={getattr(self, name):g} is out of range: γ goes from 1"
          f" to {largest:g}, clients per round over server rate."
        )
    if 0 < self.attacker_gain < 1:
      # The median falls with every step.
      raise errors.ConfigError(
        f"--attacker_gain={self.attacker_gain:g} is out of range: it must be 0"
        " or at least 1."
      )
    try:
      avoided = self.avoided_neurons
    except ValueError:
      raise errors.ConfigError(
        f"--attacker_avoids={self.attacker_avoids} must be numbers of neurons,"
        " separated by commas."
      ) from None
    if any(neuron < 0 for neuron in avoided):
      raise errors.ConfigError(
        f"--attacker_avoids={self.attacker_avoids} is out of range: neurons"
        " are numbered from 0."
      )

  def _check_phases(self) -> None:
    known = (*pipeline.PHASES, *alone())
    unknown = [phase for phase in self.phases if phase not in known]
    again = [
      phase
      for index, phase in enumerate(self.phases)
      if phase in self.phases[:index]
      and (phase not in RETURNING or phase == self.phases[index - 1])
    ]
    if unknown or again:
      raise errors.ConfigError(
        f"--cleanse={self.cleanse} must name some of {', '.join(known)},"
        f" separated by commas; only {' and '.join(RETURNING)} may come again,"
        " after another phase."
      )
    oracle = "nc-oracle"
    if oracle in self.phases and not self.num_attackers:
      raise errors.ConfigError(
        f"--cleanse={self.cleanse}: {oracle} chooses by the attack's success,"
        " and --num_attackers is 0."
      )

  def _check_images(self) -> None:
    """Who decides, and who trains, needs images to do it with."""
    needing = [phase for phase in self.phases if phase in needing_images()]
    if needing and not self.validation_size:
      raise errors.ConfigError(
        f"--cleanse={self.cleanse}: {needing[0]} needs the server's own"
        " images, and --validation_size is 0."
      )
    if self.server_data and not self.validation_size:
      raise errors.ConfigError(
        f"--server_data={self.server_data} needs --validation_size: how many"
        " of its images the server has."
      )
    if self.holds_out and self.validation_size < 2:
      raise errors.ConfigError(
        f"--cleanse={self.cleanse}: of one image none can be left out of the"
        " server's training (--server_holdout): raise --validation_size."
      )

  def _check_fine_tuning(self) -> None:
    if -1 < self.fine_tune_drop < 0:
      raise errors.ConfigError(
        f"--fine_tune_drop={self.fine_tune_drop:g} is out of range: it must be"
        " -1, or from 0 to 1."
      )
    if self.fine_tune_drop >= 0 and not self.chooses_round:
      why = "--validation_size is 0"
      if self.validation_size:
        why = f"--decide_by={self.decide_by} goes by the clients'"
      raise errors.ConfigError(
        f"--fine_tune_drop={self.fine_tune_drop:g} needs the server's own"
        f" images, and {why}; or images that clients do not train on, by"
        " --client_holdout."
      )

  def _check_search(self) -> None:
    steps = self.delta_start / self.delta_step
    if steps > _MOST_STEPS:
      raise errors.ConfigError(
        f"--delta_step={self.delta_step:g} makes {steps:.0f} steps from"
        f" --delta_start={self.delta_start:g}; there may be {_MOST_STEPS}."
      )

  def _check_parts(self) -> None:
    extensions.check_parameters(self.parameters)
    if self.model in networks.BUILDERS:
      for name in ("initialisation", "conv", "pooling"):
        default = type(self).__dataclass_fields__[name].default
        if getattr(self, name) != default:
          raise errors.ConfigError(
            f"--{name}={getattr(self, name)} is for fljax's own networks, not"
            f" for --model={self.model}."
          )

  def _check_machines(self) -> None:
    if self.process_id >= self.num_processes:
      raise errors.ConfigError(
        f"--process_id={self.process_id} is out of range: there are"
        f" --num_processes={self.num_processes}, numbered from 0."
      )
    host, _, port = self.coordinator.rpartition(":")
    if self.coordinator and not (host and port.isdecimal()):
      raise errors.ConfigError(
        f"--coordinator={self.coordinator} is not of the form host:port."
      )
    if self.num_processes > 1 and not self.coordinator:
      raise errors.ConfigError(
        f"--num_processes={self.num_processes} needs --coordinator."
      )

  @property
  def attack_names(self) -> tuple[str, ...]:
    """What attackers do, by name, in order."""
    return _parts(self.attack)

  @property
  def avoided_neurons(self) -> tuple[int, ...]:
    """The neurons of `attacker_avoids`."""
    return tuple(int(text) for text in self.attacker_avoids.split(",") if text)

  @property
  def steps_per_round(self) -> int:
    """The local steps of a client with `samples_per_client` images."""
    kept = round(self.client_holdout * self.samples_per_client)
    samples = max(self.samples_per_client - kept, 1)
    size = min(self.batch_size, samples)
    steps = self.local_epochs * -(-samples // size)
    return min(steps, self.local_steps or steps)

  @property
  def last_learning_rate(self) -> float:
    """The local learning rate that training ends with."""
    return self.final_learning_rate or self.learning_rate

  @property
  def tuning(self) -> dict[str, Any]:
    """In what a round of fine-tuning differs from one of training.

    Empty if in nothing that would take another program.
    """
    differs: dict[str, Any] = {}
    rule = self.fine_tune_aggregation
    if rule not in ("same", self.aggregation):
      differs["aggregation"] = rule
      if given := self.parameters_of("aggregator", rule):
        differs["parameters"] = tuple(sorted(given.items()))
    hidden = self.fine_tune_stealth
    if hidden and hidden != self.attacker_stealth and self.num_attackers:
      differs["stealth"] = hidden
    return differs

  @property
  def phases(self) -> tuple[str, ...]:
    """The phases of cleansing, in order."""
    return _parts(self.cleanse)

  @property
  def server_decides(self) -> bool:
    """Whether accuracies on the server's images decide in cleansing."""
    return self.validation_size > 0 and self.decide_by == "server"

  @property
  def chooses_round(self) -> bool:
    """Whether fine-tuning keeps its best round, not its last.

    It does where those who decide have images that nobody trains on.
    """
    return self.server_decides or self.client_holdout > 0

  @property
  def holds_out(self) -> bool:
    """Whether the server's own training leaves images for phases after it."""
    trains = [phase in training_alone() for phase in self.phases]
    if not (self.server_decides and self.server_holdout and any(trains)):
      return False
    return bool({*self.phases[trains.index(True) :]} & {*pipeline.PHASES})

  @property
  def _used(self) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Kinds and names of parts: in training, and in cleansing alone."""
    training = (
      ("network", self.model),
      ("trigger", self.trigger),
      ("aggregator", self.aggregation),
      *(("attack", name) for name in self.attack_names),
    )
    cleansing = (
      ("aggregator", self.fine_tune_aggregation),
      *(("defence", name) for name in self.phases),
    )
    return training, cleansing

  def parameters_of(self, kind: str, name: str) -> dict[str, Any]:
    """What a part is given beside what every part of its kind is.

    Args:
      kind: see `extensions.parameters`.
      name: what it is called.

    Returns:
      Values of `--parameters`, by the names of keyword arguments.
    """
    return extensions.values(self.parameters, kind, name)

  @property
  def training_parameters(self) -> str:
    """Those of `parameters` that matter in training."""
    training, _ = self._used
    return extensions.of_parts(self.parameters, training)

  @property
  def code(self) -> dict[str, dict[str, str | None]]:
    """What parts of a user's own are made of, see `extensions.code_of`.

    With the values that `parameters` gives them.
    """
    found = []
    for parts in self._used:
      own: dict[str, str | None] = {}
      for part in parts:
        for key, digest in extensions.code_of(part).items():
          given = self.parameters_of(*part)
          values = [f"{name}={given[name]}" for name in sorted(given)]
          own[key] = " ".join([str(digest), *values]) if values else digest
      found.append(own)
    return dict(zip((TRAINING_CODE, CLEANSING_CODE), found, strict=True))

  def identity(self) -> dict[str, Any]:
    """What makes this experiment what it is: settings, and parts' code."""
    settings = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.metadata["identity"]
    }
    return {**settings, **self.code}

  @staticmethod
  def defaults() -> dict[str, Any]:
    """What `identity` says of settings that nobody touched.

    A new setting's default means what was done before it existed, so that a
    folder made then is still known.
    """
    settings = {
      field.name: field.default
      for field in dataclasses.fields(Config)
      if field.metadata["identity"]
    }
    return {**settings, TRAINING_CODE: {}, CLEANSING_CODE: {}}

  def training(self) -> dict[str, Any]:
    """What makes the trained model what it is, see `identity`."""
    found: dict[str, Any] = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.metadata["identity"] and not field.metadata["cleansing"]
    }
    # What they are to training is in its parts' code.
    del found["parameters"]
    own = [
      name for name in self.attack_names if extensions.is_own("attack", name)
    ]
    if self.aggregation in aggregators.WITHOUT_TRIM and not own:
      # It is fine-tuning's alone then.
      del found["aggregation_trim"]
    for name in own:
      found |= {key: getattr(self, key) for key in extensions.reads(name)}
    return {**found, TRAINING_CODE: self.code[TRAINING_CODE]}

  def structure(self) -> dict[str, Any]:
    """The settings that decide on its programs, and where they run.

    But for what fine-tuning has of its own (`tuning`). An attack of a user's
    own is given all settings, and may make what it likes of them.
    """
    found = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.metadata["structure"]
    }
    found["parameters"] = self.training_parameters
    if any(extensions.is_own("attack", name) for name in self.attack_names):
      found["seen_by_attacks"] = repr(self.identity())
    return found


def alone() -> tuple[str, ...]:
  """Phases that are applied to the trained model if only such are named."""
  return (*baselines.BASELINES, *baselines.DEFENCES)


def needing_images() -> tuple[str, ...]:
  """Phases for which the server must have images."""
  theirs = (name for name in baselines.BASELINES if name != "nc-oracle")
  return (*theirs, *_own_with_images())


def training_alone() -> tuple[str, ...]:
  """Phases in which the server trains on its images, or may do so."""
  return (*baselines.TRAINING_BASELINES, *_own_with_images())


def _own_with_images() -> tuple[str, ...]:
  return tuple(
    name for name, one in baselines.DEFENCES.items() if one.needs_images
  )


def _parts(text: str) -> tuple[str, ...]:
  return tuple(part.strip() for part in text.split(",") if part.strip())


def require_home(flag: str, path: str) -> None:
  """Refuses a path in the home of a user that there is not (~name/...).

  Raises:
    errors.ConfigError: naming the flag.
  """
  try:
    Path(path).expanduser()
  except RuntimeError as error:
    raise errors.ConfigError(
      f"{flag}={path} is in the home of a user that there is not."
    ) from error


def value_of(name: str, text: str) -> Any:
  """A setting's value from how it is written.

  Args:
    name: of the setting.
    text: as after its flag; true or false for a switch.

  Raises:
    ValueError: it is none of the setting's type. Its range is `Config`'s
      concern.
  """
  kind = type(getattr(Config, name))
  if kind is bool:
    written = {"true": True, "false": False}
    if text.lower() not in written:
      raise ValueError(f"{text!r} is neither true nor false.")
    return written[text.lower()]
  return kind(text)


def _check_range(field: dataclasses.Field, value: Any) -> None:
  kind = type(field.default)
  accepts = (int, float) if kind is float else kind
  if not isinstance(value, accepts) or (
    isinstance(value, bool) and kind is not bool
  ):
    raise errors.ConfigError(
      f"--{field.name}={value!r} must be of type {kind.__name__}."
    )
  # Counts and labels live on the device as 32-bit integers.
  if isinstance(value, int) and abs(value) > _LARGEST:
    raise errors.ConfigError(
      f"--{field.name}={value} is out of range: it must be at most {_LARGEST}."
    )
  choices = field.metadata["choices"]
  if choices is not None and value not in choices:
    raise errors.ConfigError(
      f"unknown --{field.name}={value}: choose one of {', '.join(choices)}."
    )
  low, high, above = (field.metadata[k] for k in ("low", "high", "above"))
  if (
    (isinstance(value, float) and not math.isfinite(value))
    or (low is not None and value < low)
    or (high is not None and value > high)
    or (above is not None and value <= above)
  ):
    raise errors.ConfigError(
      f"--{field.name}={value} is out of range: it must be"
      f" {_range_text(field)}."
    )


def _range_text(field: dataclasses.Field) -> str:
  low, high, above = (field.metadata[k] for k in ("low", "high", "above"))
  parts = []
  if low is not None:
    parts.append(f"at least {low:g}")
  if above is not None:
    parts.append(f"above {above:g}")
  if high is not None:
    parts.append(f"at most {high:g}")
  return " and ".join(parts) or "finite"


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines one flag per setting, and --sweep, which makes many of one."""
  flags.DEFINE_string(
    "sweep",
    "",
    "Settings with several values each, as in"
    " 'seed=0,1,2;pairs=9:0,9:1;aggregation=mean,median': every combination is"
    " run, in a folder of its own in --workdir. 'pairs' are victim and target"
    " labels; what has commas of its own takes a plus for them, as in"
    " 'cleanse=fp+ft+aw,aw'.",
    flag_values=values,
  )
  for field in dataclasses.fields(Config):
    text = field.metadata["help"]
    if field.metadata["choices"] is not None:
      text += f" One of: {', '.join(field.metadata['choices'])}."
    elif any(field.metadata[k] is not None for k in ("low", "high", "above")):
      text += f" Range: {_range_text(field)}."
    define = {
      bool: flags.DEFINE_boolean,
      int: flags.DEFINE_integer,
      float: flags.DEFINE_float,
      str: flags.DEFINE_string,
    }[type(field.default)]
    define(field.name, field.default, text, flag_values=values)


def from_flags(values: flags.FlagValues = flags.FLAGS) -> Config:
  """The configuration that the parsed flags describe.

  Raises:
    errors.ConfigError: see `Config`.
  """
  return Config(
    **{
      field.name: getattr(values, field.name)
      for field in dataclasses.fields(Config)
    }
  )
