"""A site is killed in the middle of its result: nothing of it is added, and the server holds nothing of it."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys

import pytest
import torch

from nvflare_rdma.errors import TransferError
from nvflare_rdma.runtime import Shared
from nvflare_rdma.streaming.results import Results
from nvflare_rdma.transfer import pull
from tests.support.calls import call
from tests.support.processes import SMALL, environment
from tests.support.transfer_peer import in_torch
from tests.support.waiting import eventually

BUDGET = 20 << 20  # some of it is in memory, and the rest of 120 MB on disk


@pytest.fixture
def site(tmp_path):
    """A site that sends its result, in a process of its own."""
    command = [sys.executable, str(SMALL / "transfer_peer.py"), "send", str(tmp_path / "site"), str(tmp_path / "here")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=SMALL, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_result_whose_site_is_killed_leaves_nothing(cell, site, tmp_path):
    links, shared = cell("server"), Shared()
    shared.holdings.start(BUDGET)
    results, landed = Results(shared, "site-1"), []

    def ask(request):
        try:
            return call(tmp_path / "site", "ask", "", request, "server")
        except OSError as error:
            raise TransferError("site-1 can't be asked") from error

    def kill_in_the_middle(done):
        landed.append((shared.tensor_memory.used_bytes, shared.holdings.disk.taken))
        if shared.holdings.disk.taken:
            site.send_signal(signal.SIGKILL)

    with pytest.raises(TransferError):  # so an aggregator is never called: it gets whole results only
        pull(links, "site-1", ask, results.land, progress=kill_in_the_middle)
    in_memory, on_disk = landed[-1]
    assert 0 < in_memory <= BUDGET
    assert on_disk > 0
    del results
    landed.clear()

    def gone():
        gc.collect()
        return not shared.tensor_memory.used_bytes and not shared.holdings.disk.taken and not shared.holdings.on_disk

    eventually(gone)


def test_the_same_result_is_there_if_its_site_lives_on(cell, tmp_path):
    from nvflare_rdma.transfer import Service, TensorContent

    links, sender, shared = cell("server"), cell("site-1"), Shared()
    shared.holdings.start(BUDGET)
    wanted = in_torch()
    service = Service(TensorContent(wanted), lambda: sender, lambda *moved: None)
    tensors = pull(links, "site-1", lambda request: service.answer(request, "server"), Results(shared, "site-1").land)
    assert shared.holdings.on_disk > 0
    assert all(torch.equal(tensors[name].clone(), value) for name, value in wanted.items())
    service.close()
