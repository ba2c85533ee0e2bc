"""torch takes large tensors' memory in huge pages in a process that has loaded the driver before its first one."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvflare_rdma.cli import driver_path
from nvflare_rdma.streaming import RdmaTransfer
from tests.support.processes import run

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAVE_SOME = SWITCH.exists() and "[never]" not in SWITCH.read_text()
LOADED = f"""
import sys
sys.path.insert(0, {driver_path()!r})
import rdma_driver
"""
LOOK = """
import torch
def huge():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
before = huge()
tensor = torch.ones(16 << 20)
print("KiB", huge() - before)
"""


def kib(script: str, **environment: str) -> int:
    done = run(["-c", script], timeout=100, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout.split("KiB ")[1])


@pytest.mark.skipif(not HAVE_SOME, reason="this kernel gives no huge pages where they are asked for")
def test_torchs_large_tensors_are_in_huge_pages(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert kib(LOADED + LOOK) > 0
    assert kib(LOADED + LOOK, THP_MEM_ALLOC_ENABLE="0") == 0, "what a site says counts"


def test_the_component_says_it_to_the_processes_that_its_own_starts(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    RdmaTransfer()
    assert "KiB" in run(["-c", "import os; print('KiB', os.environ['THP_MEM_ALLOC_ENABLE'])"], timeout=100).stdout
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    RdmaTransfer()
    assert kib("import os; print('KiB', os.environ['THP_MEM_ALLOC_ENABLE'])") == 0
