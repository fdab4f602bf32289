"""What the README says must be true."""

import re

from absl import flags
from conftest import ROOT

from fljax import config

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
  # launch/reproduce.py's flags share names with those of runs.
  script = (ROOT / "launch" / "reproduce.py").read_text(encoding="utf-8")
  reproduce = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', script)
  assert "discussion" in reproduce
  assert named <= {*flags.FLAGS, *reproduce, "flagfile", "helpfull"}


def test_every_file_that_is_named_exists():
  for name in re.findall(
    r"[`(](launch/[a-z_0-9.]+|\.ci/run|BUILD_NOTES\.md)[`)]", README
  ):
    assert (ROOT / name).exists(), name
