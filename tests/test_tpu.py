"""What runs on Cloud TPU compiles for it, and fits, without a TPU."""

import importlib.util
import json
import subprocess
import sys

from conftest import ROOT
import pytest

SCRIPT = ROOT / "launch" / "tpu_report.py"


def report(*arguments):
  """In a process of its own: the TPU's library prints and locks as it likes."""
  return subprocess.run(
    [sys.executable, str(SCRIPT), *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU's compiler is not installed: pip install '.[tpu]'",
)


@needs_compiler
@pytest.mark.parametrize("flagfile", ["mnist.flags", "cifar10_dba.flags"])
def test_training_and_cleansing_compile_for_tpu_and_fit(flagfile, tmp_path):
  """On four chips of 16 GB, from the settings that are shipped."""
  process = report(
    "--quick",
    f"--experiments={ROOT / 'launch' / flagfile}",
    "--programs=block,activations,pruning curve,stem,Δ step",
    f"--json={tmp_path / 'report.json'}",
  )
  assert process.returncode == 0, process.stderr
  told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
  (one,) = told["experiments"]
  assert one["experiment"] == flagfile and not one["failures"]
  block, *deciding = one["programs"]
  assert len(deciding) == 4
  for program in (block, *deciding):
    assert program["flops"] > 0
    assert 0 < program["total"] < 16e9
    assert program["program"] in process.stdout
  # On TPU the default is bfloat16, too coarse to rank or to compare by.
  assert block["products"] == ["default", "highest"]
  assert all(program["products"] == ["highest"] for program in deciding)


@needs_compiler
def test_a_program_that_does_not_fit_is_named():
  process = report(
    "--quick",
    f"--experiments={ROOT / 'launch' / 'mnist.flags'}",
    "--programs=stem",
    "--hbm_gb=0.001",
  )
  assert process.returncode == 1
  assert "mnist.flags: stem needs" in process.stderr


def test_without_the_compiler_it_says_what_to_install():
  if importlib.util.find_spec("libtpu") is not None:
    pytest.skip("the TPU's compiler is installed")
  process = report()
  assert process.returncode == 2
  assert "pip install '.[tpu]'" in process.stderr
