import dataclasses

from absl import flags
from conftest import ROOT
import pytest

from fljax import config
from fljax import errors
from fljax.reproduction import catalogue

FIELDS = dataclasses.fields(config.Config)
DEEPER = ("--adjusting_drop=0.2",)
NO_IMAGES = ("--client_holdout=0.1", "--decide_by=clients")
LONGER = (
  "--fst_rounds=240",
  "--fine_tune_learning_rate=0.1",
  "--fine_tune_aggregation=multi_krum",
)
# Of launch/cleanse: in which table beyond the paper each is, and with which
# further flags.
WAYS = (
  ("gain", 1, "gain", ()),
  ("gain", 2, "gain", ()),
  ("robust", 1, "unpruned", ()),
  ("robust", 2, "unpruned", DEEPER),
  ("robust", 9, "unpruned", ("--decide_by=clients",)),
  ("robust", 10, "unpruned", NO_IMAGES),
  ("gain_robust", 1, "both", ()),
  ("gain_robust", 2, "both", DEEPER),
  ("fst", 4, "fst", ()),
  ("fst", 5, "fst", ()),
  ("fst", 6, "fst", ()),
  ("fst_few", 8, "trimmed", ("--validation_size=500",)),
  ("ffst", 12, "ffst/9 → 0", ()),
  ("ffst", 13, "ffst krum", LONGER),
)


@pytest.fixture(scope="module", autouse=True)
def flag_definitions():
  if "workdir" not in flags.FLAGS:
    config.define_flags()


def parse(*arguments):
  flags.FLAGS.unparse_flags()
  flags.FLAGS.flag_values_dict()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  flags.FLAGS(["main", *arguments])
  return config.from_flags()


def test_defaults_are_consistent_and_the_same_from_flags():
  assert parse() == config.Config()


def test_every_setting_is_a_flag_with_help():
  for field in FIELDS:
    flag = flags.FLAGS[field.name]
    assert len(flag.help) > 15
    assert flag.default == field.default


def test_flags_reach_the_config():
  parsed = parse("--rounds=7", "--gamma=2.5", "--nofigures", "--cleanse=aw")
  assert (parsed.rounds, parsed.gamma, parsed.figures) == (7, 2.5, False)
  assert parsed.phases == ("aw",)


@pytest.mark.parametrize(
  "name", sorted(path.name for path in (ROOT / "launch").glob("*.flags"))
)
def test_every_flagfile_is_valid(name):
  parsed = parse(f"--flagfile={ROOT / 'launch' / name}")
  assert parsed.workdir != config.Config().workdir


@pytest.mark.parametrize("name, number, variant, more", WAYS)
def test_ways_of_cleansing_are_what_the_tables_have(
  name, number, variant, more
):
  """What launch/cleanse makes of a flagfile is that table's experiment."""
  launch = ROOT / "launch"
  flagfiles = {
    data: f"--flagfile={launch / data}.flags"
    for data in ("mnist", "fashion_mnist", "cifar10_dba")
  }
  bases = {base.dataset: base for base in map(parse, flagfiles.values())}
  cell = catalogue.BEYOND[number](bases).rows[0].cells[variant]
  (base,) = (key for key in flagfiles if key.startswith(cell.config.dataset))
  found = parse(
    flagfiles[base],
    f"--flagfile={launch / 'cleanse' / name}.flags",
    f"--victim_label={cell.config.victim_label}",
    f"--target_label={cell.config.target_label}",
    *more,
  )
  assert found.identity() == cell.config.identity()


def test_every_way_of_cleansing_is_one_of_a_table():
  made = {path.stem for path in (ROOT / "launch" / "cleanse").iterdir()}
  assert made == {name for name, *_ in WAYS}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_range_is_checked(field):
  """Each setting with a range refuses what lies outside, and names itself."""
  data = field.metadata
  bad = []
  if data["choices"]:
    bad.append("no such choice")
  if data["low"] is not None:
    bad.append(type(field.default)(data["low"] - 1))
  if data["above"] is not None:
    bad.append(type(field.default)(data["above"]))
  if data["high"] is not None:
    bad.append(type(field.default)(data["high"] + 1))
  if isinstance(field.default, float):
    bad += [float("nan"), float("inf")]
  if isinstance(field.default, int) and not isinstance(field.default, bool):
    bad.append(2**31)
  bad.append(None)
  for value in bad:
    with pytest.raises(errors.ConfigError, match=f"--{field.name}="):
      dataclasses.replace(config.Config(), **{field.name: value})


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"victim_label": 3, "target_label": 3}, "two different labels"),
    ({"num_attackers": 11}, "more than --num_clients=10"),
    ({"clients_per_round": 11}, "more than --num_clients=10"),
    ({"gamma": 10.5}, "γ goes from 1 to 10"),
    ({"gamma": 5.5, "clients_per_round": 5}, "γ goes from 1 to 5"),
    ({"fine_tune_gamma": 20.5, "server_rate": 0.5}, "γ goes from 1 to 20"),
    ({"fine_tune_drop": 0.1, "validation_size": 0}, "server's own"),
    ({"fine_tune_drop": 0.1, "decide_by": "clients"}, "decide_by=clients goes"),
    ({"fine_tune_drop": 0.1, "validation_size": 0}, "by --client_holdout"),
    ({"fine_tune_drop": -0.01}, "-1, or from 0 to 1"),
    ({"cleanse": "fst,aw", "validation_size": 1}, "raise --validation_size"),
    ({"server_data": "x.npz", "validation_size": 0}, "needs --validation_size"),
    ({"cleanse": "fp,fp"}, "only ft and aw may come again"),
    ({"cleanse": "fp,ft,fp"}, "only ft and aw may come again"),
    ({"cleanse": "fp,aw,aw"}, "after another phase"),
    ({"cleanse": "nc-prune,ft,nc-prune"}, "only ft and aw may come again"),
    ({"cleanse": "fp,xx"}, "must name"),
    ({"cleanse": "fp,nc-prune", "validation_size": 0}, "server's own"),
    ({"cleanse": "nc-oracle", "num_attackers": 0}, "--num_attackers is 0"),
    ({"attacker_avoids": "1,x"}, "must be numbers of neurons"),
    ({"attacker_avoids": "1,-2"}, "numbered from 0"),
    ({"attacker_gain": 0.5}, "must be 0 or at least 1"),
    ({"workdir": ""}, "workdir must not be empty"),
    ({"compilation_cache": ""}, "compilation_cache must not be empty"),
    ({"coordinator": "host"}, "coordinator=host is not of the form host:port"),
    ({"coordinator": ":1234"}, "is not of the form host:port"),
    ({"coordinator": "host:port"}, "is not of the form host:port"),
    ({"delta_start": 1000.0, "delta_step": 0.001}, "makes 1000000 steps"),
    *(
      ({name: "~no-such-user/x.npz"}, f"--{name}=~no-such-user/x.npz is in the")
      for name in config.PATHS
    ),
  ],
)
def test_contradictions_are_refused(changes, message):
  with pytest.raises(errors.ConfigError, match=message):
    config.Config(**changes)


def test_gamma_may_reach_clients_over_server_rate():
  assert config.Config(gamma=20.0, server_rate=0.5).gamma == 20
  # Without an attacker the labels of the attack do not matter.
  config.Config(num_attackers=0, victim_label=0, target_label=0)


@pytest.mark.parametrize(
  "changes, steps",
  [
    ({"samples_per_client": 1500}, 75),
    ({"samples_per_client": 1501, "local_epochs": 2}, 152),
    ({"samples_per_client": 4800, "local_steps": 75}, 75),
    ({"samples_per_client": 100, "local_steps": 75}, 5),
    ({"samples_per_client": 7}, 1),
    ({"samples_per_client": 1500, "client_holdout": 0.1}, 68),
    ({"samples_per_client": 1, "client_holdout": 0.9}, 1),
  ],
)
def test_the_steps_of_a_round_are_counted(changes, steps):
  assert config.Config(**changes).steps_per_round == steps


def test_a_trained_model_serves_every_trim_that_it_was_not_trained_with():
  def trained(trim, **changes):
    return config.Config(aggregation_trim=trim, **changes).training()

  robust = {"fine_tune_aggregation": "trimmed_mean"}
  assert trained(0.2, **robust) == trained(0.3, **robust)
  robust = {"aggregation": "trimmed_mean"}
  assert trained(0.2, **robust) != trained(0.3, **robust)


def test_the_identity_leaves_out_where_and_what_is_shown():
  one = config.Config(workdir="a", figures=False, data_dir="x")
  two = config.Config(workdir="b")
  assert one.identity() == two.identity()
  assert one.identity() != config.Config(seed=1).identity()
