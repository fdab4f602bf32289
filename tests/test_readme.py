"""What the README says must be true."""

import re

from absl import flags
from conftest import ROOT

from fljax import config
from fljax.reproduction import catalogue

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
  (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
  pruned, _, zeroed = capsys.readouterr().out.split()
  assert int(pruned) >= 0 and int(zeroed) >= 0


def test_every_flag_that_is_named_exists():
  if "workdir" not in flags.FLAGS:
    config.define_flags()
  named = set(re.findall(r"--([a-z_0-9]+)", README))
  assert len(named) > 15
  # These scripts' flags share names with those of runs.
  own = {"flagfile", "helpfull", *catalogue.KINDS}
  for name in ("reproduce.py", "calibrate.py"):
    script = (ROOT / "launch" / name).read_text(encoding="utf-8")
    own |= set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', script))
  assert {"seeds", "variant"} <= own
  assert named <= {*flags.FLAGS, *own}


def test_every_file_that_is_named_exists():
  for name in re.findall(
    r"[`(](launch/[a-z_0-9.]+|\.ci/run|BUILD_NOTES\.md)[`)]", README
  ):
    assert (ROOT / name).exists(), name
