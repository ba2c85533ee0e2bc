"""benchmarks/gpu.sh where there is nothing for it to run on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.support.processes import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(python: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_card_one_line_says_what_is_missing():
    done = run(sys.executable)
    assert done.returncode == 3
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu.sh: nothing was run: torch ")


def test_without_an_interpreter_too(tmp_path):
    done = run(str(tmp_path / "python"))
    assert done.returncode == 3
    assert done.stderr == f"gpu.sh: nothing was run: {tmp_path / 'python'} can't be run\n"
