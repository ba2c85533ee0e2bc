"""Kits as `RdmaBuilder` in `project.yml` makes them, on three hosts, with mutual TLS: a firewall lets FLARE's port
through and no other, and one of the two sites does not have this package: `make test-sites`."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from nvflare_rdma.cli import driver_path
from tests.support.processes import WITHOUT_TORCH, environment
from tests.wan import sites_job
from tests.wan.federation import PORT, SERVER, Federation
from tests.wan.wire import Link, Star

OURS, OTHER = SITES = ["site-1", "site-2"]
BUILDER = {"data_port": PORT, "upgrade_driver": True, "driver_path": driver_path(), "sites": [SERVER, OURS]}
MODEL = sites_job.VALUES * 4


def test_one_port_is_enough_for_a_federation_in_which_one_site_is_without_this_package(tmp_path):
    job_for = [sys.executable, sites_job.__file__, str(tmp_path), "--sites", str(len(SITES)), "--clients", OURS]
    subprocess.run(job_for, env=environment(**WITHOUT_TORCH), check=True, timeout=120)
    star = Star(tmp_path / "star", SERVER)
    for name in SITES:
        star.join(name, Link(rate=100, delay=10, loss=0), tmp_path / f"{name}.trace").set(open=[PORT])
    federation = Federation(star, tmp_path / "federation", SITES, "tcp", builder=BUILDER, without=[OTHER])
    kit = federation.kits / OTHER
    found = subprocess.run(
        ["python3", "-c", "import nvflare_rdma"], env=federation.environment(OTHER), cwd=kit, check=False
    )
    assert found.returncode == 1
    assert "nvflare_rdma" not in (kit / "local/resources.json.default").read_text()
    assert not (kit / "local/comm_config.json").exists()
    assert "rdma_data_ports" not in json.loads((federation.kits / SERVER / "local/comm_config.json").read_text())
    federation.wait_for_sites()
    job = federation.run(tmp_path / sites_job.NAME, 300.0)
    assert job.status == "FINISHED:COMPLETED"
    (saved,) = job.results.rglob("*.npy")
    np.testing.assert_array_equal(np.load(saved), sites_job.first_model() + np.float32(sites_job.ROUNDS * 1.5))
    assert "server joins the direct links of all its jobs at FLARE's own port" in federation.console(SERVER)
    log = federation.log(OURS, job).replace(job.id, "JOB")
    assert f"reaches server.JOB through the server at server:{PORT}: " in log
    assert "FLARE's own path" not in log
    assert "nvflare_rdma" not in federation.log(OTHER, job)
    payload = sites_job.ROUNDS * MODEL
    for name, wire in star.wires.items():
        carried = [packet for packet in wire.packets() if packet.fate == "carried" and packet.payload]
        assert all(PORT in (packet.source, packet.target) for packet in carried), name
        for way, where in enumerate(("to the site", "to the server")):
            moved = sum(packet.payload for packet in carried if packet.direction == way)
            print(f"{name}, {where}: {moved} bytes for {payload} of models")  # for who reads the output
            assert payload <= moved < 2 * payload, f"{name}, {where}"
