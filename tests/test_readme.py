"""What the README says must be true."""

import re

from absl import flags
from conftest import ROOT
import pytest

from fljax import config
from fljax.reproduction import catalogue

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = "launch/results/README.md"


def test_the_examples_run(capsys):
  blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  assert len(blocks) == 2
  names = {"__name__": "readme"}
  for code in blocks:  # One goes on from the other.
    exec(compile(code, "README.md", "exec"), names)
  pruned, _, zeroed, kept, success = capsys.readouterr().out.split()
  assert int(pruned) >= 0 and int(zeroed) >= 0
  assert 0 <= int(kept) <= 1 and 0 <= float(success) <= 1


@pytest.mark.parametrize("document", ["README.md", RESULTS])
def test_every_flag_that_is_named_exists(document):
  if "workdir" not in flags.FLAGS:
    config.define_flags()
  text = (ROOT / document).read_text(encoding="utf-8")
  named = set(re.findall(r"--([a-z_0-9]+)", text))
  assert len(named) > 15
  # These scripts' flags share names with those of runs.
  own = {"flagfile", "helpfull", *catalogue.KINDS}
  for name in ("reproduce.py", "calibrate.py", "benchmark.py"):
    script = (ROOT / "launch" / name).read_text(encoding="utf-8")
    own |= set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', script))
  script = (ROOT / "launch" / "summarise.py").read_text(encoding="utf-8")
  own |= set(re.findall(r'add_argument\(\s*"--(\w+)"', script))
  assert {"seeds", "variant", "csv"} <= own
  assert named <= {*flags.FLAGS, *own}


@pytest.mark.parametrize(
  "document",
  ["README.md", RESULTS, "launch/CLOUD_TPU.md", "fljax/mnist/LICENCE.md"],
)
def test_every_file_that_is_named_exists(document):
  path = ROOT / document
  text = path.read_text(encoding="utf-8")
  links = [
    link.split("#")[0]
    for link in re.findall(r"\]\(([^)]+)\)", text)
    if "://" not in link
  ]
  for link in links:
    assert (path.parent / link).exists(), link
  named = re.findall(r"(?:`|=| )(launch/[\w./-]+|\.ci/[a-z]+)", text)
  for name in named:
    assert (ROOT / name.rstrip(".")).exists(), name


def test_every_result_is_listed():
  text = (ROOT / RESULTS).read_text(encoding="utf-8")
  made = {path.name for path in (ROOT / RESULTS).parent.glob("*.md")}
  made |= {path.name for path in (ROOT / RESULTS).parent.glob("*.png")}
  assert len(made) > 20
  assert made - {"README.md"} <= set(re.findall(r"\]\(([^)]+)\)", text))
