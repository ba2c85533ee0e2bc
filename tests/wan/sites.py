"""A provisioned federation whose server and sites are hosts of their own, joined by wires: `make test-sites`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.support.processes import WITHOUT_TORCH, environment
from tests.wan import sites_job
from tests.wan.federation import PORT, SERVER, Federation, Job
from tests.wan.wire import Link, Packet, Star

SITES = ["site-1", "site-2"]
LINK = Link(rate=100, delay=10, loss=0.1)
MODEL = sites_job.VALUES * 4
#: Of all models that a site gets or sends in a job.
PAYLOAD = MODEL * sites_job.ROUNDS
TCP, WAY_TO_SITE, WAY_TO_SERVER = 6, 0, 1


@dataclass
class Sites:
    star: Star
    federation: Federation
    job: Path
    seen: dict[str, int] = field(default_factory=dict)

    def run(self) -> tuple[Job, dict[str, list[Packet]]]:
        """Run the job; what went over each site's wire meanwhile."""
        job, went = self.federation.run(self.job, 120.0), {}
        for name, wire in self.star.wires.items():
            packets = list(wire.packets())
            went[name] = packets[self.seen.get(name, 0) :]
            self.seen[name] = len(packets)
        assert job.status == "FINISHED:COMPLETED"
        return job, went


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> Iterator[Sites]:
    folder = tmp_path_factory.mktemp("sites")
    star = Star(folder / "star", SERVER)
    for name in SITES:
        star.join(name, LINK, folder / f"{name}.trace")
    federation = Federation(star, folder / "federation", SITES, "grpc")
    script = Path(sites_job.__file__)
    subprocess.run([sys.executable, str(script), str(folder)], env=environment(**WITHOUT_TORCH), check=True, timeout=60)
    federation.wait_for_sites()
    return Sites(star, federation, folder / sites_job.NAME)


def payload(packets: list[Packet], way: int, flare: bool) -> int:
    """Bytes that TCP carried that way, over FLARE's port or over others."""
    carried = (p for p in packets if p.direction == way and p.fate == "carried" and p.protocol == TCP)
    return sum(p.payload for p in carried if (PORT in (p.source, p.target)) == flare)


def check_model(job: Job) -> None:
    (saved,) = job.results.rglob("*.npy")
    mean = sum(int(name.rpartition("-")[2]) for name in SITES) / len(SITES)
    np.testing.assert_array_equal(np.load(saved), sites_job.first_model() + np.float32(sites_job.ROUNDS * mean))


def test_models_go_directly_between_the_hosts(sites):
    job, went = sites.run()
    check_model(job)
    for name in SITES:
        for way in (WAY_TO_SITE, WAY_TO_SERVER):
            direct, flare = (payload(went[name], way, by) for by in (False, True))
            assert PAYLOAD <= direct < 1.1 * PAYLOAD, f"{name}, {way}: {direct}, and over FLARE's port {flare}"
            assert flare < 0.3 * PAYLOAD, f"{name}, {way}: {flare}"
        assert "data goes over tcp" in sites.federation.log(name, job)
