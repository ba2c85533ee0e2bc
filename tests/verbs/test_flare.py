"""FLARE over rdma:// with nothing but verbs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyverbs.device", reason="pyverbs is not installed for this Python")

from tests.support.certificates import Authority
from tests.support.link_peer import DEADLINE
from tests.support.processes import background, free_port, run

HERE = Path(__file__).parent
PEER = HERE.parent / "driver" / "echo_peer.py"
MIB = 1 << 20


@pytest.mark.flare
def test_a_round_of_a_job_goes_over_the_device(devices, tmp_path):
    size = 8 * MIB
    arguments = str(tmp_path), str(size), str(DEADLINE)
    done = run(HERE / "array_job.py", *arguments, timeout=2 * DEADLINE, NVFLARE_RDMA_FABRICS="verbs")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    logs = {log.parent.name: log.read_text() for log in (tmp_path / "ws").rglob("log.txt")}
    assert (tmp_path / "sent.npy").exists(), done.stdout[-4000:] + "\n".join(text[-8000:] for text in logs.values())
    initial, received, sent = (np.load(tmp_path / f"{name}.npy") for name in ("initial", "received", "sent"))
    assert np.array_equal(received, initial)
    assert np.array_equal(np.load(next((tmp_path / "ws").rglob("server.npy"))), sent)
    for site in ("server", "site-1"):
        assert f"verbs: {devices[0]} port 1" in logs[site], logs[site]
        assert "data goes over verbs, 2 rails" in logs[site]


def test_cells_on_two_devices_with_mutual_tls(devices, tmp_path):
    sizes = [65537, 9 * MIB + 7]
    authority = Authority(tmp_path / "pki")
    server = {"credentials": authority.issue("server", "server")}
    client = {"credentials": authority.issue("client", "site-1")}
    url = f"srdma://127.0.0.1:{free_port()}"
    options = json.dumps({"sizes": sizes, "connect_deadline": DEADLINE, **client})
    env = {"NVFLARE_RDMA_FABRICS": "verbs"}
    server_log = tmp_path / "server.log"
    with background(PEER, "serve", url, json.dumps(server), log=server_log, NVFLARE_RDMA_DEVICE=devices[0], **env):
        done = run(PEER, "ask", url, options, timeout=2 * DEADLINE, NVFLARE_RDMA_DEVICE=devices[1], **env)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["echoes"] == [{"size": size, "equal": True} for size in sizes]
    assert f"verbs: {devices[1]} port 1" in done.stderr
    assert f"verbs: {devices[0]} port 1" in server_log.read_text()
