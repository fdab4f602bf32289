import chex
from conftest import make_federation
from conftest import make_images
from conftest import make_round
from conftest import make_state
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import attacks
from fljax import evaluate
from fljax import models
from fljax import rounds
from fljax.cleanse import pipeline
from fljax.cleanse import pruning
from fljax.cleanse import reports
from fljax.cleanse import selection
from fljax.cleanse import weights


@pytest.fixture(scope="module")
def trained(model):
  """A backdoored model, its federation and validation images."""
  federation, attack = make_federation(samples=40, gamma=2.0)
  block = rounds.make_block(model, make_round(model, attack))
  state, _ = block(make_state(model), federation, jax.random.key(11), 20)
  validation = evaluate.batched(*make_images(60, seed=9))
  return state.params, federation, validation


def _accuracy(model, params, validation):
  return float(evaluate.accuracy(model, params, validation))


@pytest.mark.parametrize("method", ["rap", "mvp"])
@pytest.mark.parametrize("max_drop", [0.0, 0.02, 0.3])
def test_pruning_goes_as_far_as_the_floor_allows(
  model, trained, method, max_drop
):
  params, federation, validation = trained
  means = reports.client_activations(model, params, federation)
  pruned = pipeline.prune(
    model,
    params,
    means,
    pipeline.validation_curves(model, validation).pruning,
    method=method,
    max_drop=max_drop,
  )
  floor = _accuracy(model, params, validation) - max_drop
  assert _accuracy(model, pruned.params, validation) >= floor - 1e-6
  assert int((~pruned.neuron_mask).sum()) == pruned.num_pruned
  assert pruned.accuracies[pruned.num_pruned + 1] < floor
  chex.assert_trees_all_equal(
    models.mask_neurons(model, pruned.params, pruned.neuron_mask),
    pruned.params,
  )


@given(
  gone=st.sets(st.integers(0, 5), max_size=6),
  method=st.sampled_from(["rap", "mvp"]),
  rate=st.sampled_from([0.2, 0.5, 0.8]),
)
def test_what_is_pruned_already_is_neither_ranked_nor_voted_on(
  model, trained, gone, method, rate
):
  params, federation, validation = trained
  alive = jnp.asarray([n not in gone for n in range(model.neurons)])
  masked = models.mask_neurons(model, params, alive)
  means = reports.client_activations(model, masked, federation)
  pruned = pipeline.prune(
    model,
    masked,
    means,
    pipeline.validation_curves(model, validation).pruning,
    neuron_mask=alive,
    method=method,
    rate=rate,
    max_drop=0.3,
  )
  left = [n for n in range(model.neurons) if n not in gone]
  among = pruning.SCORES[method](means[:, np.asarray(left, int)], rate)
  expected = [left[n] for n in np.argsort(-np.asarray(among), kind="stable")]
  assert list(pruned.order) == [*expected, *sorted(gone)]
  went = set(np.flatnonzero(np.asarray(alive & ~pruned.neuron_mask)))
  assert went == set(expected[: pruned.num_pruned])
  assert not gone & set(np.flatnonzero(np.asarray(pruned.neuron_mask)))


def test_of_a_neuron_whose_gain_stands_out_nothing_is_left(model, trained):
  params, _, validation = trained
  kernel = models.target_kernel(model, params)
  far = 30 * float(kernel.std())
  # A trigger's weight, and the brake that is not to go alone.
  kernel = kernel.at[0, 0, 0, 3].set(far).at[1, 1, 0, 3].set(-1.1 * far)
  params = models.with_target_kernel(model, params, kernel)

  def pruned(threshold):
    return pipeline.prune_outliers(
      model,
      params,
      pipeline.validation_curves(model, validation).pruning,
      threshold=threshold,
    )

  index = np.asarray(selection.anomaly_index(weights.gains(kernel)))
  others = np.delete(index, 3).max()
  only = pruned((others + index[3]) / 2)
  assert only.num_pruned == 1 and only.order[0] == 3
  assert only.anomaly == pytest.approx(float(index[3]))
  assert sorted(only.order) == list(range(model.neurons))
  assert not only.neuron_mask[3]
  left = np.asarray(models.target_kernel(model, only.params))
  assert not np.any(left[..., 3])
  assert np.all(np.any(np.delete(left, 3, axis=-1) != 0, axis=(0, 1, 2)))
  unmeasured = pipeline.prune_outliers(
    model, params, threshold=(others + index[3]) / 2
  )
  assert unmeasured.accuracies.shape == (0,)
  chex.assert_trees_all_equal(unmeasured.params, only.params)
  # Those of small gain stay, however far below the others they are.
  assert pruned(0.0).num_pruned == model.neurons // 2
  assert pruned(index[3]).num_pruned == 0


def test_what_is_pruned_already_counts_for_no_gain(model, trained):
  params, _, _ = trained
  neurons = model.neurons
  gains = weights.gains(models.target_kernel(model, params))
  # Nearly all are dead: over all neurons, whoever lives would stand out.
  alive = jnp.arange(neurons) < 2
  masked = models.mask_neurons(model, params, alive)
  pruned = pipeline.prune_outliers(
    model, masked, neuron_mask=alive, threshold=1.0
  )
  assert pruned.num_pruned == 0
  among_alive = selection.anomaly_index(gains[:2])
  assert pruned.anomaly == pytest.approx(float(among_alive.max()))
  np.testing.assert_array_equal(pruned.neuron_mask, alive)
  assert list(pruned.order[:2]) == list(np.argsort(-np.asarray(gains[:2])))
  chex.assert_trees_all_equal(pruned.params, masked)


def test_where_most_neurons_are_alike_none_stands_out(model, trained):
  params, _, _ = trained
  kernel = models.target_kernel(model, params)
  same = jnp.broadcast_to(kernel[..., :1], kernel.shape)
  same = same.at[..., 0].multiply(50)
  params = models.with_target_kernel(model, params, same)
  pruned = pipeline.prune_outliers(model, params)
  assert pruned.num_pruned == 0 and not np.isfinite(pruned.anomaly)
  assert pruned.neuron_mask.all()


@pytest.mark.parametrize("statistics_over", ["surviving", "all"])
def test_adjusting_goes_as_far_as_the_floor_allows(
  model, trained, statistics_over
):
  params, _, validation = trained
  mask = jnp.asarray([True] * 5 + [False])
  params = models.mask_neurons(model, params, mask)
  adjusted = pipeline.adjust(
    model,
    params,
    mask,
    pipeline.validation_curves(model, validation).delta,
    start=5.0,
    step=0.25,
    max_drop=0.02,
    statistics_over=statistics_over,
  )
  floor = _accuracy(model, params, validation) - 0.02
  assert adjusted.accuracies[-1] < floor <= adjusted.accuracies[-2]
  assert adjusted.delta == adjusted.deltas[-2]
  assert _accuracy(model, adjusted.params, validation) >= floor - 1e-6
  before = models.target_kernel(model, params)
  after = models.target_kernel(model, adjusted.params)
  gone = (before != 0) & (after == 0)
  assert adjusted.zeroed == int(gone.sum()) > 0
  distance = np.abs(np.asarray(before) - adjusted.mean) / adjusted.std
  assert distance[np.asarray(gone)].min() > adjusted.delta - 1e-4


def test_a_first_step_that_is_too_much_changes_nothing(model, trained):
  params, _, validation = trained
  adjusted = pipeline.adjust(
    model,
    params,
    jnp.ones(model.neurons, bool),
    pipeline.validation_curves(model, validation).delta,
    start=0.01,
    step=0.01,
  )
  assert adjusted.delta == np.inf and adjusted.zeroed == 0
  chex.assert_trees_all_equal(adjusted.params, params)


def test_pruning_stops_at_the_sum_or_at_one_neuron(model, trained):
  params, federation, _ = trained
  means = reports.client_activations(model, params, federation)
  # Each neuron costs a little, the last one much.
  curve = 0.9 - 0.006 * np.arange(model.neurons + 1.0)
  curve[-1] = 0.1

  def pruned(**how):
    return pipeline.prune(model, params, means, lambda *_: curve, **how)

  assert pruned(max_drop=0.01).num_pruned == 1
  assert pruned(max_drop=0.01, drop_of="neuron").num_pruned == (
    model.neurons - 1
  )


def test_the_search_takes_no_more_steps_than_it_needs(model, trained):
  params, _, _ = trained
  taken = []

  def accuracies(params, mean, std, deltas):
    for delta in deltas:
      taken.append(delta)
      yield 0.9 if delta > 4 else 0.5

  adjusted = pipeline.adjust(
    model,
    params,
    jnp.ones(model.neurons, bool),
    accuracies,
    start=5.0,
    step=0.5,
  )
  assert taken == [np.inf, 5.0, 4.5, 4.0]
  assert adjusted.delta == 4.5


def _reported(model, trained, name, trim):
  _, federation, _ = trained
  report = attacks.REPORTS[name].report
  return pipeline.reported_curves(
    model,
    federation,
    trim=trim,
    report=lambda values: report(values, federation, kind="accuracies"),
  )


@pytest.mark.parametrize("lie", ["stop_pruning", "ruin_model"])
def test_liars_about_accuracy_are_outweighed(model, trained, lie):
  """One of four lies; trimming leaves a result near that of honest reports."""
  params, federation, _ = trained
  means = reports.client_activations(model, params, federation)

  def pruned(name, trim):
    curves = _reported(model, trained, name, trim)
    return pipeline.prune(model, params, means, curves.pruning, max_drop=0.05)

  honest = pruned("honest", 0.25).num_pruned
  assert abs(pruned(lie, 0.25).num_pruned - honest) <= 1
  # Without trimming, a lie moves the choice: that is what trimming is for.
  curve = pruned(lie, 0.0).accuracies
  truth = pruned("honest", 0.0).accuracies
  assert np.abs(curve - truth).max() > 0.05


def test_weights_can_be_adjusted_without_validation_images(model, trained):
  params, _, _ = trained
  adjusted = pipeline.adjust(
    model,
    params,
    jnp.ones(model.neurons, bool),
    _reported(model, trained, "honest", 0.0).delta,
    start=5.0,
    step=0.5,
    max_drop=0.3,
  )
  kept = selection.last_above(adjusted.accuracies, adjusted.accuracies[0] - 0.3)
  assert adjusted.deltas[kept] == adjusted.delta
  assert adjusted.zeroed > 0


@pytest.mark.parametrize("enough", [None, 0.65, 0.7, 0.95])
@pytest.mark.parametrize("patience", [0, 1, 2, 5])
@pytest.mark.parametrize(
  "measured", [[0.5, 0.7, 0.6, 0.7, 0.4, 0.8], [0.5], [0.9, 0.1, 0.2], []]
)
@pytest.mark.parametrize("before", [0.3, 0.66, 0.9])
@pytest.mark.parametrize("by", ["server", "clients"])
def test_fine_tuning_keeps_the_best_round_of_those_it_runs(
  model, by, before, measured, patience, enough
):
  accuracies = iter([before, *measured])

  def reported(params, done):
    assert int(asked[0].round) == int(state.round) + done
    chex.assert_trees_all_equal(params, asked[0].params)
    return float(next(accuracies))

  asked = []

  def block(state, federation, key, length, examples):
    del federation, key
    after = jax.tree.map(jnp.copy, state.replace(round=state.round + length))
    jax.tree.map(lambda x: x.delete(), state)  # Blocks donate it.
    asked[:] = [after]
    # Where clients are asked, what the server has does not decide.
    on_server = next(accuracies) if by == "server" else 1 / (1 + after.round)
    metrics = rounds.RoundMetrics(
      loss=jnp.zeros(()),
      bad_round=jnp.zeros((), jnp.int32),
      accuracies={name: jnp.float32(on_server) for name in examples},
    )
    return after, metrics

  # Brute force: who waits for `patience` rounds after the last better one, or
  # has what was wanted; round 0 is the model that came in.
  along = [before, *measured]
  ran = len(measured)
  for done in range(len(along)):
    best = int(np.argmax(along[: done + 1]))
    tired = patience and done - best >= patience
    if tired or (enough is not None and along[done] >= enough):
      ran = done
      break
  state = make_state(model)
  tuned = pipeline.fine_tune(
    block,
    state,
    None,
    None,
    rounds=len(measured),
    patience=patience,
    enough=enough,
    reported=reported if by == "clients" else None,
    examples={"validation": None},
  )
  assert tuned.rounds == ran and not tuned.bad_round
  assert tuned.kept == int(np.argmax(along[: ran + 1]))
  assert int(tuned.state.round) == int(state.round) + tuned.kept


@pytest.mark.parametrize("lie", ["honest", "stop_pruning", "ruin_model"])
def test_rounds_are_reported_as_searches_are(model, trained, lie):
  """An attacker's lie is outweighed by three clients' truth."""
  params, federation, _ = trained
  told = []

  def report(values):
    told.append(np.asarray(values))
    return attacks.REPORTS[lie].report(values, federation, kind="accuracies")

  accuracy = pipeline.reported_rounds(
    model, federation, rounds=2, trim=0.25, report=report
  )
  worse = jax.tree.map(jnp.zeros_like, params)
  for done, model_then in enumerate((params, worse)):
    truth = reports.client_accuracies(model, model_then, federation)
    heard = accuracy(model_then, done)
    assert truth[1:].min() <= heard <= truth[1:].max() or lie == "honest"
    np.testing.assert_array_equal(told[done][:, done], truth)
    assert np.isnan(told[done][:, done + 1 :]).all()
  honest = np.sort(truth)[1:-1].mean()
  assert lie != "honest" or heard == pytest.approx(float(honest))


def test_clients_have_the_accuracies_of_unpruned_curves(model, trained):
  params, federation, _ = trained
  federation = federation.replace(mask=federation.mask.at[1, 7:].set(False))
  curves = pruning.client_curves(
    model, params, jnp.arange(model.neurons), federation
  )
  accuracies = reports.client_accuracies(model, params, federation)
  np.testing.assert_allclose(accuracies, curves[:, 0], atol=1e-6)


def test_fine_tuning_without_validation_images_keeps_the_last_round(
  model, trained
):
  params, federation, _ = trained
  block = rounds.make_block(model, make_round(model))
  state = make_state(model).replace(params=params)
  tuned = pipeline.fine_tune(
    block, state, federation, jax.random.key(0), rounds=2, patience=1
  )
  assert (tuned.rounds, tuned.kept) == (2, 2)
  assert int(tuned.state.round) == int(state.round) + 2
