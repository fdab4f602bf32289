import json
import os
import shutil

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from fljax import errors
from fljax import workdir as workdirs

IDENTITY = {"seed": 0, "rounds": 3}
PHASE = {
  "name": "training",
  "test_accuracy": 0.5,
  "attack_success": None,
  "seconds": 1,
}
RESULTS = {"config": IDENTITY, "environment": {}, "seed": 0, "phases": [PHASE]}


def _state(value=1.0):
  return {
    "params": {"w": jnp.full((300, 4), value), "b": jnp.arange(3)},
    "mask": jnp.asarray([True, False]),
    "round": jnp.asarray(5, jnp.int32),
  }


def _open(path, identity=IDENTITY, data="0"):
  workdir = workdirs.Workdir(str(path), identity)
  try:
    workdir.claim({workdirs.DATA_SHA256: data})
  except BaseException:
    workdir.close()
    raise
  return workdir


def _save(workdir, value, phase="training", **changes):
  options = {
    "complete": False,
    "side": False,
    "phases": [],
    "seconds": 1.5,
    **changes,
  }
  return workdir.save(_state(value), phase=phase, **options)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
  with _open(tmp_path) as workdir:
    workdir.log(round=1)
    _save(workdir, 0.1, phases=[{"name": "x"}])
  with _open(tmp_path) as workdir:
    state, progress = workdir.restore(_state())
  chex.assert_trees_all_equal(state, _state(0.1))
  chex.assert_trees_all_equal_dtypes(state, _state(0.1))
  assert progress.phase == "training" and not progress.complete
  assert progress.phases == [{"name": "x"}] and progress.seconds == 1.5


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
  with _open(tmp_path / "new" / "folder") as workdir:
    assert workdir.restore(_state()) is None
    assert workdir.results() is None and workdir.metrics() == []


def test_metrics_are_rewound_to_the_checkpoint(tmp_path):
  with _open(tmp_path) as workdir:
    workdir.log(round=1)
    _save(workdir, 1.0)
    workdir.log(round=2)
  with (tmp_path / "metrics.jsonl").open("a") as stream:
    stream.write('{"rou')  # Killed in mid-line.
  with _open(tmp_path) as workdir:
    workdir.restore(_state())
    assert workdir.metrics() == [{"round": 1}]
    workdir.log(round=2)
    assert workdir.metrics() == [{"round": 1}, {"round": 2}]


def test_metrics_without_any_checkpoint_start_again(tmp_path):
  with _open(tmp_path) as workdir:
    workdir.log(round=1)
  with _open(tmp_path) as workdir:
    assert workdir.restore(_state()) is None
    assert workdir.metrics() == []


def test_only_the_last_checkpoints_within_a_phase_are_kept(tmp_path):
  with _open(tmp_path) as workdir:
    for value in range(5):
      _save(workdir, float(value))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["0004-training", "0005-training"]
    _save(workdir, 9.0, complete=True)
    _save(workdir, 10.0, phase="fp", complete=True)
  names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
  assert names == ["0006-training", "0007-fp"]


def test_a_run_does_not_go_on_from_a_side_result(tmp_path):
  with _open(tmp_path) as workdir:
    _save(workdir, 1.0, phase="fp", complete=True)
    _save(
      workdir,
      2.0,
      phase="fp+aw",
      complete=True,
      side=True,
      phases=[{"name": "fp"}, {"name": "fp+aw"}],
    )
    state, progress = workdir.restore(_state())
  chex.assert_trees_all_equal(state, _state(1.0))
  assert [phase["name"] for phase in progress.phases] == ["fp", "fp+aw"]


@pytest.mark.parametrize("phase", ["my_def2.x", "Half-2", "fp+my_def2.x"])
def test_a_phase_is_called_whatever_a_defence_may_be(tmp_path, phase):
  with _open(tmp_path) as workdir:
    _save(workdir, 1.0)
    _save(workdir, 2.0, phase=phase, complete=True)
  found = workdirs.read_state(tmp_path, _state(), phase)
  chex.assert_trees_all_equal(found, _state(2.0))
  with _open(tmp_path) as workdir:
    state, progress = workdir.restore(_state())
    assert progress.phase == phase
    chex.assert_trees_all_equal(state, _state(2.0))
    assert _save(workdir, 3.0).name.startswith("0003-")


def test_what_a_killed_run_left_half_written_is_ignored(tmp_path):
  with _open(tmp_path) as workdir:
    whole = _save(workdir, 1.0)
  half = whole.with_name(".0002-training.partial")
  shutil.copytree(whole, half)
  with _open(tmp_path) as workdir:
    state, _ = workdir.restore(_state())
    chex.assert_trees_all_equal(state, _state(1.0))
  assert not half.exists()


def _largest_file(path):
  return max(
    (file for file in path.rglob("*") if file.is_file()),
    key=lambda file: file.stat().st_size,
  )


def _flip(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 0xFF
  path.write_bytes(raw)


def _damage(path, other, how):
  """Does to a checkpoint what disks and people do."""
  record = path / "progress.json"
  if how == "flip":
    _flip(_largest_file(path / "state"))
  elif how == "cut":
    largest = _largest_file(path / "state")
    largest.write_bytes(largest.read_bytes()[:20])
  elif how == "gone":
    shutil.rmtree(path / "state")
  elif how == "record":
    changed = {**json.loads(record.read_text()), "seconds": 9}
    record.write_text(json.dumps(changed))
  elif how == "json":
    record.write_text("{")
  else:
    shutil.rmtree(path / "state")
    shutil.copytree(other / "state", path / "state")


def _files(path):
  return sorted((file, file.stat().st_size) for file in path.rglob("*"))


@pytest.mark.parametrize(
  "damage", ["flip", "cut", "gone", "json", "swapped", "record"]
)
def test_a_run_goes_on_from_the_last_whole_checkpoint(tmp_path, damage):
  with _open(tmp_path) as workdir:
    workdir.log(round=1)
    one = _save(workdir, np.float32(1.25).item(), phase="fp", complete=True)
    workdir.log(round=2)
    path = _save(workdir, 2.0, phase="all", complete=True)
  _damage(path, one, damage)
  before, told = _files(path), []
  with _open(tmp_path) as workdir:
    state, progress = workdir.restore(_state(), told.append)
    chex.assert_trees_all_equal(state, _state(1.25))
    assert progress.phase == "fp"
    assert len(told) == 1 and f"{path.name} is damaged" in told[0]
    assert workdir.metrics() == [{"round": 1}]
    # What is damaged stays, and what comes after it goes on from here.
    assert _files(path) == before
    workdir.log(round=2)
    _save(workdir, 3.0, phase="all", complete=True)
  with _open(tmp_path) as workdir:
    state, progress = workdir.restore(_state(), told.append)
  chex.assert_trees_all_equal(state, _state(3.0))
  assert progress.phase == "all" and len(told) == 1


@pytest.mark.parametrize(
  "damage", ["flip", "cut", "gone", "json", "swapped", "record"]
)
def test_where_no_checkpoint_is_whole_the_last_is_named(tmp_path, damage):
  with _open(tmp_path) as workdir:
    workdir.log(round=1)
    one = _save(workdir, 1.0, phase="fp", complete=True)
    path = _save(workdir, 2.0, phase="all", complete=True)
  _damage(path, one, damage)
  _damage(one, one, "json")
  before = _files(tmp_path)
  with (
    _open(tmp_path) as workdir,
    pytest.raises(errors.CheckpointError, match=f"{path.name} is damaged"),
  ):
    workdir.restore(_state())
  assert _files(tmp_path) == before


def test_a_side_result_of_a_damaged_checkpoint_is_left_out_too(tmp_path):
  with _open(tmp_path) as workdir:
    one = _save(workdir, 1.0, complete=True, phases=[{"name": "training"}])
    two = _save(workdir, 2.0, phase="fp", complete=True)
    _save(workdir, 3.0, phase="fp+aw", complete=True, side=True)
  _damage(two, one, "flip")
  with _open(tmp_path) as workdir:
    state, progress = workdir.restore(_state())
  chex.assert_trees_all_equal(state, _state(1.0))
  assert progress.phases == [{"name": "training"}]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
  with _open(tmp_path) as workdir:
    _save(workdir, 1.0)
    other = _state()
    other["params"]["w"] = jnp.zeros((2, 2))
    with pytest.raises(errors.CheckpointError, match="another model"):
      workdir.restore(other)


def test_a_folder_of_another_config_is_refused_with_the_differences(tmp_path):
  _open(tmp_path).close()
  with pytest.raises(errors.WorkdirError) as info:
    _open(tmp_path, {"seed": 1, "rounds": 3, "gamma": 2.0})
  message = str(info.value)
  assert "seed: 0 there, 1 here" in message
  assert "gamma: unset there, 2.0 here" in message
  assert "rounds" not in message
  there = json.loads((tmp_path / "config.json").read_text())
  assert there == {**IDENTITY, "data_sha256": "0"}
  _open(tmp_path).close()  # And is not left locked.


def test_a_run_on_other_data_is_refused(tmp_path):
  _open(tmp_path).close()
  with pytest.raises(errors.WorkdirError, match="data_sha256: 0 there, 1 here"):
    _open(tmp_path, data="1")


def test_a_folder_that_was_not_claimed_is_free_for_another_config(tmp_path):
  workdirs.Workdir(str(tmp_path), IDENTITY).close()
  _open(tmp_path, {"seed": 1}).close()


def test_a_folder_in_use_is_refused(tmp_path):
  with (
    _open(tmp_path),
    pytest.raises(errors.WorkdirError, match="in use by another run"),
  ):
    _open(tmp_path)


def test_a_folder_with_strange_results_is_refused(tmp_path):
  (tmp_path / "results.json").write_text("{}")
  with pytest.raises(errors.WorkdirError, match="nothing is overwritten"):
    _open(tmp_path)
  assert (tmp_path / "results.json").read_text() == "{}"


@pytest.mark.parametrize(
  "content",
  [
    "{",
    "[]",
    "{}",
    json.dumps({**RESULTS, "phases": []}),
    json.dumps({**RESULTS, "phases": [1]}),
    json.dumps({**RESULTS, "phases": [{**PHASE, "test_accuracy": None}]}),
    json.dumps({**RESULTS, "phases": [{**PHASE, "name": 1}]}),
    json.dumps({**RESULTS, "config": None}),
  ],
)
def test_results_that_no_run_wrote_are_named(tmp_path, content):
  with _open(tmp_path) as workdir:
    workdir.write_json("results.json", RESULTS)
    assert workdir.results() == RESULTS
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(errors.WorkdirError, match=r"results\.json is damaged"):
      workdir.results()


def test_a_damaged_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": ')
  with pytest.raises(errors.WorkdirError, match=r"config\.json is damaged"):
    _open(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"round": 2}\n', b"\xff\xfe\n"])
def test_lost_or_changed_metrics_are_noticed(tmp_path, content):
  with _open(tmp_path) as workdir:
    workdir.log(round=1)
    _save(workdir, 1.0)
  (tmp_path / "metrics.jsonl").write_bytes(content)
  with (
    _open(tmp_path) as workdir,
    pytest.raises(errors.WorkdirError, match=r"metrics\.jsonl is damaged"),
  ):
    workdir.restore(_state())


def test_a_path_that_is_a_file_cannot_be_a_workdir(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.WorkdirError, match="file cannot be written"):
    _open(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(errors.WorkdirError, match="cannot be written"):
    _open(tmp_path / "new")


def test_a_full_disk_is_told_and_leaves_no_half_file(tmp_path, monkeypatch):
  with _open(tmp_path) as workdir:
    workdir.write_json("results.json", RESULTS)
    _save(workdir, 1.0)

    def full(*_):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(errors.WorkdirError, match="No space left on device"):
      workdir.write_json("results.json", {"phases": [2]})
    with pytest.raises(errors.WorkdirError, match="No space left on device"):
      _save(workdir, 2.0)
    monkeypatch.undo()
    assert workdir.results() == RESULTS
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["0001-training"]
    assert not list(tmp_path.glob(".results*"))


def _search(value=1.0, size=3):
  return {"a": np.full(size, value, np.float32), "b": np.array(True)}


def test_what_was_kept_comes_back_until_it_is_forgotten(tmp_path):
  with _open(tmp_path / "run") as workdir:
    assert workdir.kept("it", _search()) is None
    workdir.keep("it", _search(2.0), 3.5)
    state, seconds = workdir.kept("it", _search())
    chex.assert_trees_all_equal(state, _search(2.0))
    assert seconds == 3.5
    # Of something else, or another shape, it is not.
    assert workdir.kept("other", _search()) is None
    assert workdir.kept("it", _search(size=4)) is None
    assert workdir.kept("it", {**_search(), "c": np.zeros(1)}) is None
    workdir.keep("other", _search(), 0.0)
    assert workdir.kept("it", _search()) is None
    workdir.forget()
    workdir.forget()
    assert not (tmp_path / "run" / workdirs.KEPT).exists()


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "text"])
def test_damage_to_what_was_kept_costs_time_alone(tmp_path, damage):
  with _open(tmp_path / "run") as workdir:
    workdir.keep("it", _search(), 1.0)
    path = tmp_path / "run" / workdirs.KEPT
    content = bytearray(path.read_bytes())
    place = content.index(np.float32(1.0).tobytes() * 3)
    content[place] ^= 1
    path.write_bytes(
      {
        "empty": b"",
        "half": path.read_bytes()[: len(content) // 2],
        "flipped": bytes(content),
        "text": b"in progress",
      }[damage]
    )
    assert workdir.kept("it", _search()) is None


def test_a_folder_from_before_a_setting_existed_is_known(tmp_path):
  _open(tmp_path).close()
  newer = {**IDENTITY, "new": 1}
  with pytest.raises(errors.WorkdirError, match="new: unset there, 1 here"):
    workdirs.Workdir(str(tmp_path), newer)
  workdirs.Workdir(str(tmp_path), newer, {"new": 1}).close()
  with pytest.raises(errors.WorkdirError, match="new: 0 there, 1 here"):
    workdirs.Workdir(str(tmp_path), newer, {"new": 0})
