"""Parts of one's own, of each kind: examples to copy from.

    E=launch/extension_example.py
    python launch/main.py --flagfile=launch/mnist.flags --extensions=$E \
      --model=plain --trigger=cross --attack=backdoor,unobtrusive \
      --aggregation=bounded --cleanse=clp,ft

What each function is given and returns is in `fljax.extensions`, and there is
more to see in the docstrings of `attacks.Attack`, `aggregators.Aggregator` and
`phases.Subject`. A part may change without touching what others made: of a file
only what is no other part's counts as its code.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fljax import aggregators
from fljax import attacks
from fljax import extensions
from fljax import models
from fljax import triggers
from fljax.baselines import phases
from fljax.cleanse import reports

# --- a network, in three parts: before, at and after the layer to prune ------


class Stem(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.max_pool(nn.relu(nn.Conv(16, (3, 3))(x)), (2, 2), (2, 2))


class Target(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Conv(32, (3, 3))(x))


class Head(nn.Module):
  classes: int

  @nn.compact
  def __call__(self, x):
    x = nn.max_pool(x, (2, 2), (2, 2))
    return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


@extensions.network("plain")
def plain(*, image_shape, num_classes, mean, std):
  """Two convolutions and one fully connected layer."""
  return models.from_flax(
    stem=Stem(),
    target=Target(),
    head=Head(num_classes),
    image_shape=image_shape,
    num_classes=num_classes,
    mean=mean,
    std=std,
  )


# --- a trigger ---------------------------------------------------------------


@extensions.trigger("cross")
def cross(image_shape):
  """Five pixels in the form of an x, in the lower right corner."""
  pixels = [(-1, -1), (-1, -3), (-2, -2), (-3, -1), (-3, -3)]
  return [triggers.from_pixels(pixels, image_shape)]


@extensions.trigger("stripes")
def stripes(image_shape, *, opacity=0.1):
  """Vertical stripes over the whole image, a tenth of what is seen."""
  pattern = np.zeros(image_shape)
  pattern[:, ::4] = 1
  return [triggers.blended(pattern, opacity)]


# --- rules of the server's ---------------------------------------------------


@extensions.aggregator("bounded")
def bounded(trim, *, norm=1.0, noise=0.0):
  """The mean of updates no longer than a bound, with noise.

  Can You Really Backdoor Federated Learning? (Sun et al., 2019): the bound is
  the server's to choose, and so is the noise's standard deviation.
  """
  del trim

  def update(updates, weights, state):
    rows = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(updates)]
    norms = jnp.sqrt(sum(jnp.square(row).sum(axis=1) for row in rows))
    shares = jnp.minimum(1, norm / norms) / len(norms)
    combined = aggregators.weighted_sum(updates, shares)
    # A rule is given no random key: it carries one in its state.
    key, own = jax.random.split(state)
    draws = jax.random.split(own, len(rows))
    leaves, form = jax.tree.flatten(combined)
    noisy = [
      leaf + noise * jax.random.normal(draw, leaf.shape)
      for leaf, draw in zip(leaves, draws, strict=True)
    ]
    return jax.tree.unflatten(form, noisy), key

  return aggregators.Aggregator(
    init=lambda params: jax.random.PRNGKey(0), update=update
  )


@extensions.aggregator("momentum")
def momentum(trim, *, beta=0.9):
  """The mean with momentum on the server, FedAvgM (Hsu et al., 2019).

  Its state is carried from round to round: a pytree of arrays that keeps its
  form. Fine-tuning by another rule than training begins with `init`.
  """
  del trim
  mean = aggregators.mean()

  def update(updates, weights, state):
    combined, _ = mean.update(updates, weights, ())
    state = jax.tree.map(lambda old, new: beta * old + new, state, combined)
    return state, state

  return aggregators.Aggregator(
    init=lambda params: jax.tree.map(jnp.zeros_like, params), update=update
  )


# --- attacks -----------------------------------------------------------------


@extensions.attack("unobtrusive")
def unobtrusive(model, config):
  """Attackers make their update no longer than the benign ones' median.

  Before `--gamma` amplifies it.
  """
  del model, config

  def updates(updates, cohort, active):
    del cohort
    squares = [
      jnp.square(leaf).reshape(len(leaf), -1).sum(axis=1)
      for leaf in jax.tree.leaves(updates)
    ]
    norms = jnp.sqrt(sum(squares))
    most = jnp.nanmedian(jnp.where(active, jnp.nan, norms))
    shrink = jnp.minimum(1, most / jnp.maximum(norms, 1e-12))
    scale = jnp.where(active & jnp.isfinite(most), shrink, 1)
    return jax.tree.map(
      lambda leaf: leaf * scale.reshape((-1,) + (1,) * (leaf.ndim - 1)), updates
    )

  # An attacker sees the whole round's updates, not each by itself.
  return attacks.Attack(updates=updates, rowwise=False)


@extensions.attack("near")
def near(model, config, *, radius=1.0):
  """Attackers stay within a ball around the global model, after each step.

  Keyword arguments are parameters: `--parameters=near.radius=2`.

  Attack of the Tails (Wang et al., NeurIPS 2020), projected gradient descent.
  """
  del model, config

  def local(params, start):
    away = jax.tree.map(jnp.subtract, params, start)
    squares = [jnp.square(leaf).sum() for leaf in jax.tree.leaves(away)]
    norm = jnp.sqrt(sum(squares))
    scale = jnp.minimum(1, radius / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda old, leaf: old + scale * leaf, start, away)

  return attacks.Attack(local=local)


@extensions.attack("flip")
def flip(model, config):
  """Attackers' images of the victim label are given the target's, unstamped."""
  del model

  def data(federation, key):
    del key
    victims = federation.attacker[:, None] & (
      federation.labels == config.victim_label
    )
    labels = jnp.where(victims, config.target_label, federation.labels)
    return federation.replace(labels=labels)

  return attacks.Attack(data=data)


# --- defences ----------------------------------------------------------------


@extensions.defence("clp", needs_images=False)
def clp(subject, *, deviations=3.0):
  """Prunes the channels of the last convolution that can amplify most.

  Data-free Backdoor Removal based on Channel Lipschitzness (Zheng et al., ECCV
  2022), on that layer: those whose kernel, as a matrix, has a spectral norm of
  more than the mean and so many standard deviations.
  """
  kernel = models.target_kernel(subject.model, subject.params)
  matrices = kernel.reshape(-1, *kernel.shape[-2:]).transpose(2, 1, 0)
  norms = jnp.linalg.norm(matrices, ord=2, axis=(1, 2))
  alive = subject.neuron_mask
  mean, std = norms[alive].mean(), norms[alive].std()
  stays = alive & (norms <= mean + deviations * std)
  return phases.Mitigated(
    params=models.mask_neurons(subject.model, subject.params, stays),
    neuron_mask=stays,
    # Beside how many are pruned, which is told of every defence.
    facts={"largest": (norms[alive].max() - mean) / std},
  )


@extensions.defence("quiet", needs_images=False)
def quiet(subject):
  """Prunes the tenth of neurons that the median client has least active."""
  told = subject.ask(
    lambda clients: reports.client_activations(
      subject.model, subject.params, clients
    ),
    "activations",
  )
  middle = jnp.nanmedian(told, axis=0)
  order = jnp.argsort(jnp.where(subject.neuron_mask, middle, jnp.inf))
  stays = subject.neuron_mask.at[order[: len(order) // 10]].set(False)
  return phases.Mitigated(
    params=models.mask_neurons(subject.model, subject.params, stays),
    neuron_mask=stays,
    facts={},
  )
