"""A provisioned federation with the scheme tcp, of which only some have `rdma_upgrade`, behind a firewall that lets
FLARE's port through and no other: `make test-sites`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from nvflare_rdma.channel.protocol import VERSION
from nvflare_rdma.cli import driver_path
from nvflare_rdma.driver.upgrade import FLARES, OURS, alpn
from tests.support.processes import WITHOUT_TORCH, environment
from tests.support.waiting import eventually
from tests.wan import sites_job
from tests.wan.federation import PORT, SERVER, Federation, Job
from tests.wan.wire import Link, Star

UPGRADED, OLD, *_ = SITES = [f"site-{number + 1}" for number in range(sites_job.SITES)]
ALPN = alpn(VERSION)
CONFIGURED = {"comm_driver_path": driver_path(), "rdma_upgrade": True}


@dataclass
class Mixed:
    star: Star
    federation: Federation
    job: Path

    def run(self) -> Job:
        job = self.federation.run(self.job, 180.0)
        assert job.status == "FINISHED:COMPLETED"
        (saved,) = job.results.rglob("*.npy")
        mean = sum(int(name.rpartition("-")[2]) for name in SITES) / len(SITES)
        np.testing.assert_array_equal(np.load(saved), sites_job.first_model() + np.float32(sites_job.ROUNDS * mean))
        return job

    def spoken(self, name: str, host: str) -> list[str]:
        """What a participant's parent says that it speaks with a host."""
        lines = re.findall(rf": ([^:]+) is spoken with {re.escape(host)}:\d+, as (.*)", self.federation.console(name))
        return [f"{protocol} as {reason}" for protocol, reason in lines]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Iterator[Mixed]:
    folder = tmp_path_factory.mktemp("mixed")
    command = [sys.executable, sites_job.__file__, str(folder)]
    subprocess.run(command, env=environment(**WITHOUT_TORCH), check=True, timeout=120)
    star = Star(folder / "star", SERVER)
    for name in SITES:
        star.join(name, Link(rate=1000, delay=1, loss=0)).set(open=[PORT])
    configured = dict.fromkeys((SERVER, UPGRADED), CONFIGURED)
    federation = Federation(star, folder / "federation", SITES, "tcp", {SERVER: ""}, configured)
    federation.wait_for_sites()
    return Mixed(star, federation, folder / sites_job.NAME)


def test_an_upgraded_server_has_upgraded_sites_and_old_ones(mixed):
    assert mixed.spoken(SERVER, mixed.star.address(UPGRADED)) == [f"{OURS} as it offers {ALPN} in TLS"]
    assert mixed.spoken(SERVER, mixed.star.address(OLD)) == [f"{FLARES} as it does not offer {ALPN} in TLS"]
    assert mixed.spoken(UPGRADED, mixed.star.address(SERVER)) == [f"{OURS} as it takes {ALPN} in TLS"]
    assert "nvflare_rdma" not in mixed.federation.console(OLD)
    job = mixed.run()
    assert "server joins the direct links of all its jobs at FLARE's own port" in mixed.federation.console(SERVER)
    # The job's process and its parent are on one host.
    assert "data goes over shm" in mixed.federation.log(UPGRADED, job)
    for name in SITES:  # whatever FLARE's frames travel over
        log = mixed.federation.log(name, job).replace(job.id, "JOB")
        said = f"reaches server.JOB through the server at server:{PORT}: "
        print(next(line for line in log.splitlines() if said in line))
        assert "FLARE's own path" not in log
    assert "is spoken with" not in mixed.federation.log(OLD, job)
    console = mixed.federation.console(SERVER)
    assert f"{FLARES} is spoken with {mixed.star.address(SERVER)}:" in console, "the admin's session"


def test_an_upgraded_site_finds_an_old_server_and_an_upgraded_one_again(mixed):
    """The server is taken back to FLARE's own driver, and upgraded again; sites go on without a restart."""
    server = mixed.star.address(SERVER)
    mixed.federation.restart(SERVER, {})
    eventually(lambda: mixed.spoken(UPGRADED, server)[-1] == f"{FLARES} as it does not take {ALPN} in TLS", 120.0)
    mixed.federation.wait_for_sites()
    assert "come on FLARE's own path" in mixed.federation.log(UPGRADED, mixed.run())
    mixed.federation.restart(SERVER, CONFIGURED)
    eventually(lambda: mixed.spoken(UPGRADED, server)[-1] == f"{OURS} as it takes {ALPN} in TLS", 120.0)
    assert f"{SERVER}:{PORT}" in mixed.federation.console(UPGRADED)
