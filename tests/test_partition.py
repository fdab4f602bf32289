from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from fljax import errors
from fljax import partition

LABELS = np.random.default_rng(0).integers(0, 10, 3000).astype(np.int32)


def _split(seed, size=300):
  rng = np.random.default_rng(seed)
  held_out, pool = partition.hold_out(len(LABELS), size, rng)
  return held_out, pool, rng


def _given_out(result):
  return result.indices[result.mask]


@given(
  seed=st.integers(0, 1000),
  clients=st.integers(1, 12),
  per_client=st.integers(1, 10),
  samples=st.integers(10, 60),
  attackers=st.integers(0, 3),
  needed=st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=2),
)
def test_by_labels_keeps_its_promises(
  seed, clients, per_client, samples, attackers, needed
):
  held_out, pool, rng = _split(seed)
  needed = needed[:per_client]
  required = {client: needed for client in range(min(attackers, clients))}
  result = partition.by_labels(
    LABELS,
    pool,
    num_clients=clients,
    samples_per_client=samples,
    labels_per_client=per_client,
    num_classes=10,
    required=required,
    rng=rng,
  )
  assert result.indices.shape == (clients, samples) and result.mask.all()
  assert len(np.unique(result.indices)) == result.indices.size
  assert not np.intersect1d(result.indices, held_out).size
  for client, own in enumerate(LABELS[result.indices]):
    names, counts = np.unique(own, return_counts=True)
    assert len(names) == per_client
    assert counts.max() - counts.min() <= 1
    if client in required:
      assert set(needed) <= set(names)


@given(
  seed=st.integers(0, 1000),
  clients=st.integers(1, 30),
  per_client=st.integers(1, 10),
  attackers=st.integers(0, 30),
)
def test_labels_are_covered_as_evenly_as_attackers_allow(
  seed, clients, per_client, attackers
):
  required = {client: [4] for client in range(min(attackers, clients))}
  held = partition.deal_labels(
    num_clients=clients,
    labels_per_client=per_client,
    num_classes=10,
    required=required,
    rng=np.random.default_rng(seed),
  )
  uses = np.bincount([label for own in held for label in own], minlength=10)
  others = np.delete(uses, 4)
  assert all(len(set(own)) == per_client for own in held)
  assert others.max() - others.min() <= 1
  # Ten clients of three labels leave no label out.
  if (clients - len(required)) * per_client >= 10:
    assert uses.min() >= 1


@given(seed=st.integers(0, 1000), clients=st.integers(1, 20))
def test_iid_is_equal_and_disjoint(seed, clients):
  held_out, pool, rng = _split(seed)
  result = partition.iid(
    pool, num_clients=clients, samples_per_client=50, rng=rng
  )
  assert result.indices.shape == (clients, 50) and result.mask.all()
  assert len(np.unique(result.indices)) == clients * 50
  assert not np.intersect1d(result.indices, held_out).size


@given(
  seed=st.integers(0, 1000),
  clients=st.integers(1, 12),
  alpha=st.sampled_from([0.3, 0.5, 5.0]),
)
def test_dirichlet_gives_out_everything_once(seed, clients, alpha):
  held_out, pool, rng = _split(seed)
  result = partition.dirichlet(
    LABELS,
    pool,
    num_clients=clients,
    samples_per_client=100,
    alpha=alpha,
    num_classes=10,
    required={0: [9, 2]},
    rng=rng,
  )
  out = _given_out(result)
  assert len(out) == len(np.unique(out)) == clients * 100
  assert not np.intersect1d(out, held_out).size
  assert result.mask.any(axis=1).all()
  assert result.mask.any(axis=0).all()
  assert {9, 2} <= set(LABELS[result.indices[0][result.mask[0]]])


def test_dirichlet_concentration_decides_how_skewed_clients_are():
  def largest_share(alpha):
    _, pool, rng = _split(3)
    result = partition.dirichlet(
      LABELS,
      pool,
      num_clients=10,
      samples_per_client=200,
      alpha=alpha,
      num_classes=10,
      required={},
      rng=rng,
    )
    return np.mean(
      [
        np.bincount(LABELS[i[m]]).max() / m.sum()
        for i, m in zip(result.indices, result.mask, strict=True)
      ]
    )

  assert largest_share(0.1) > 0.4 > 0.2 > largest_share(1000.0)


@given(seed=st.integers(0, 1000), size=st.integers(0, 2999))
def test_hold_out_splits_everything(seed, size):
  held_out, pool, _ = _split(seed, size)
  assert len(held_out) == size
  np.testing.assert_array_equal(
    np.sort(np.concatenate([held_out, pool])), np.arange(3000)
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"samples_per_client": 2000}, "more than exist: label . has run out"),
    ({"samples_per_client": 2}, "cannot cover 3 labels"),
    ({"labels_per_client": 11}, "labels_per_client=11"),
    ({"labels_per_client": 1, "required": {3: [1, 2]}}, "for the 2 labels"),
    ({"required": {3: [77]}}, "must hold label 77; there are 0 to"),
  ],
)
def test_by_labels_refuses_the_impossible(changes, message):
  _, pool, rng = _split(0)
  options = {
    "num_clients": 10,
    "samples_per_client": 50,
    "labels_per_client": 3,
    "num_classes": 10,
    "required": {},
    "rng": rng,
  }
  with pytest.raises(errors.ConfigError, match=message):
    partition.by_labels(LABELS, pool, **{**options, **changes})


def test_too_many_samples_are_refused_by_every_partition():
  _, pool, rng = _split(0)
  sizes = {"num_clients": 10, "samples_per_client": 271, "rng": rng}
  with pytest.raises(errors.ConfigError, match="need 2710 images and 2700"):
    partition.iid(pool, **sizes)
  with pytest.raises(errors.ConfigError, match="need 2710 images and 2700"):
    partition.dirichlet(
      LABELS, pool, alpha=1.0, num_classes=10, required={}, **sizes
    )
  with pytest.raises(errors.ConfigError, match="validation_size"):
    partition.hold_out(100, 100, rng)


def test_an_impossible_dirichlet_draw_is_refused():
  _, pool, rng = _split(0)
  with pytest.raises(errors.ConfigError, match="1,000 draws"):
    partition.dirichlet(
      LABELS,
      pool,
      num_clients=10,
      samples_per_client=5,
      alpha=0.5,
      num_classes=11,
      required={0: [10]},
      rng=rng,
    )


@given(
  seed=st.integers(0, 1000),
  share=st.floats(0, 0.9),
  sizes=st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any),
)
def test_what_clients_keep_back_is_a_fair_share_of_their_own(
  seed, share, sizes
):
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(LABELS))
  mask = np.arange(max(sizes)) < np.array(sizes)[:, np.newaxis]
  indices = np.zeros(mask.shape, np.int32)
  indices[mask] = order[: sum(sizes)]
  dealt = partition.Partition(indices, mask)
  trained, kept = partition.keep_back(dealt, LABELS, share, rng)
  for client, size in enumerate(sizes):
    own, mine, held = (
      one.indices[client][one.mask[client]] for one in (dealt, trained, kept)
    )
    assert sorted([*mine, *held]) == sorted(own)
    assert len(held) == min(round(share * size), max(size - 1, 0))
    if size:
      had = np.bincount(LABELS[own], minlength=10)
      fair = had * len(held) / size
      assert np.abs(np.bincount(LABELS[held], minlength=10) - fair).max() <= 1
