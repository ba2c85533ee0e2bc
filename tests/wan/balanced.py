"""A server behind a load balancer, with mutual TLS: the sites know the balancer's address, and no route leads to the
server's own: `make test-sites`. The balancer is HAProxy, which passes on what comes to FLARE's port."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from nvflare_rdma.cli import driver_path
from tests.support.processes import WITHOUT_TORCH, environment
from tests.wan import sites_job
from tests.wan.federation import PORT, SERVER, Federation, Job
from tests.wan.wire import CENTRE, Link, Star

SITES = ["site-1", "site-2", "site-3"]
BALANCER = "balancer"
BUILDER = {"data_port": PORT, "upgrade_driver": True, "driver_path": driver_path()}
JOBS = 2
HAPROXY = shutil.which("haproxy", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))
CONFIGURATION = f"""\
defaults
  mode tcp
  timeout connect 10s
  timeout client 1h
  timeout server 1h
listen flare
  bind :{PORT}
  server only {CENTRE}:{PORT}
"""
PAYLOAD = sites_job.ROUNDS * sites_job.VALUES * 4


@pytest.mark.skipif(HAPROXY is None, reason="there is no haproxy (package haproxy)")
def test_jobs_move_their_models_through_a_load_balancer(tmp_path):
    job_for = [sys.executable, sites_job.__file__, str(tmp_path)]
    subprocess.run(job_for, env=environment(**WITHOUT_TORCH), check=True, timeout=120)
    star = Star(tmp_path / "star", SERVER)
    for name in (BALANCER, *SITES):
        star.join(name, Link(rate=1000, delay=1, loss=0))
    for name in SITES:
        subprocess.run(star.on(name, "ip", "route", "add", "blackhole", f"{CENTRE}/32"), check=True, timeout=60)
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(CONFIGURATION)
    # It ends with the namespaces that it is in.
    subprocess.Popen(star.on(BALANCER, str(HAPROXY), "-db", "-f", str(configuration)))
    federation = Federation(star, tmp_path / "federation", SITES, "tcp", builder=BUILDER, reached_at=BALANCER)
    federation.wait_for_sites()
    before = star.wires[BALANCER].count()

    jobs: list[Job] = []
    threads = [
        threading.Thread(target=lambda: jobs.append(federation.run(tmp_path / sites_job.NAME, 200.0)))
        for _ in range(JOBS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [job.status for job in jobs] == ["FINISHED:COMPLETED"] * JOBS
    mean = sum(int(name.rpartition("-")[2]) for name in SITES) / len(SITES)
    for job in jobs:
        (saved,) = job.results.rglob("*.npy")
        np.testing.assert_array_equal(np.load(saved), sites_job.first_model() + np.float32(sites_job.ROUNDS * mean))
        for name in SITES:
            log = federation.log(name, job).replace(job.id, "JOB")
            said = f"reaches server.JOB through the server at {BALANCER}:{PORT}: "
            print(next(line for line in log.splitlines() if said in line))  # for who reads the output
            assert "FLARE's own path" not in log
    moved = [(now - then).carried[1] for now, then in zip(star.wires[BALANCER].count(), before, strict=True)]
    models = 2 * JOBS * len(SITES) * PAYLOAD
    print(f"to the balancer {moved[0]} bytes, from it {moved[1]}, for {models} of models")  # for who reads the output
    assert all(models <= each < 1.3 * models for each in moved)
