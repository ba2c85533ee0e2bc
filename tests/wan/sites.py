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

SITES = ["site-1", "site-2", "site-3"]
#: No packet is lost: whose first one is lost has no answer for a second, and rightly takes another way meanwhile.
LINK = Link(rate=100, delay=10, loss=0)
MODEL = sites_job.VALUES * 4
#: Of all models that a site gets or sends in a job.
PAYLOAD = MODEL * sites_job.ROUNDS
TCP, WAY_TO_SITE, WAY_TO_SERVER = 6, 0, 1
#: The port of the server's parent, which is the first of those that its job processes may have, too.
DOOR = 8102
#: The ports of the sites: the first is the parent's.
SITE_DOORS = range(20000, 20009)


@dataclass
class Sites:
    star: Star
    federation: Federation
    jobs: Path
    seen: dict[str, int] = field(default_factory=dict)

    def run(self, name: str, ports: list[int]) -> tuple[Job, dict[str, list[Packet]]]:
        """Run a job behind a firewall that lets these ports through, or all; what went over each site's wire."""
        for wire in self.star.wires.values():
            wire.set(open=ports)
        job, went = self.federation.run(self.jobs / name, 300.0), {}
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
    ports = {SERVER: f"{DOOR}-{DOOR + 8}", **dict.fromkeys(SITES, f"{SITE_DOORS[0]}-{SITE_DOORS[-1]}")}
    federation = Federation(star, folder / "federation", SITES, "grpc", ports)
    script = Path(sites_job.__file__)
    subprocess.run([sys.executable, str(script), str(folder)], env=environment(**WITHOUT_TORCH), check=True, timeout=60)
    federation.wait_for_sites()
    return Sites(star, federation, folder)


def payload(packets: list[Packet], way: int) -> dict[str, int]:
    """Bytes that TCP carried that way: over FLARE's port, over the one of the server's parent, and over others; and of
    these, those over ports of sites."""
    found = {"flare": 0, "parent": 0, "straight": 0, "sites": 0}
    for p in packets:
        if p.direction == way and p.fate == "carried" and p.protocol == TCP:
            ports = (p.source, p.target)
            found["flare" if PORT in ports else "parent" if DOOR in ports else "straight"] += p.payload
            found["sites"] += p.payload if {*ports} & {*SITE_DOORS} else 0
    return found


def check_model(job: Job) -> None:
    (saved,) = job.results.rglob("*.npy")
    mean = sum(int(name.rpartition("-")[2]) for name in SITES) / len(SITES)
    np.testing.assert_array_equal(np.load(saved), sites_job.first_model() + np.float32(sites_job.ROUNDS * mean))


@pytest.mark.parametrize(
    ("path", "ports", "said"),
    [
        ("straight", [], "data goes over tcp"),
        ("parent", [PORT, DOOR], f"reaches server.JOB through the server at server:{DOOR}: straight, nothing answered"),
        ("flare", [PORT], "come on FLARE's own path: no direct way"),
    ],
)
def test_models_take_the_best_way_that_the_firewall_leaves(path, ports, said, sites):
    job, went = sites.run(sites_job.NAME, ports)
    check_model(job)
    for name in SITES:
        for way in (WAY_TO_SITE, WAY_TO_SERVER):
            carried = payload(went[name], way)
            assert carried.pop("sites") < 0.01 * PAYLOAD, f"{name}, {way}: between sites"
            print(f"{path}: {name}, {['to the site', 'to the server'][way]}: {carried}")  # for who reads the output
            assert PAYLOAD <= carried.pop(path) < 1.3 * PAYLOAD, f"{name}, {way}"
            assert carried.pop("flare", 0) < 0.3 * PAYLOAD, f"{name}, {way}"
            assert sum(carried.values()) < 0.01 * PAYLOAD, f"{name}, {way}: {carried}"
        log = sites.federation.log(name, job).replace(job.id, "JOB")
        assert said in log
        print(next(line for line in log.splitlines() if said in line))
    assert f"server joins the direct links of all its jobs at port {DOOR}" in sites.federation.console(SERVER)


@pytest.mark.parametrize(
    ("path", "ports", "said"),
    [
        ("sites", [], "directly: "),
        ("parent", [PORT, DOOR], "through the server"),
    ],
)
def test_models_of_a_swarm_go_from_site_to_site(path, ports, said, sites):
    job, went = sites.run(sites_job.SWARM, ports)
    total = {"flare": 0, "parent": 0, "sites": 0}
    for name in SITES:
        for way in (WAY_TO_SITE, WAY_TO_SERVER):
            carried = payload(went[name], way)
            print(f"swarm, {path}: {name}, {['to the site', 'to the server'][way]}: {carried}")
            total = {kind: count + carried[kind] for kind, count in total.items()}
    # In each round two sites get the model of the first, which gets theirs; in the end they get the last one. Each goes
    # over two wires.
    models = 2 * MODEL * (len(SITES) - 1) * (2 * sites_job.ROUNDS + 1)
    print(f"swarm, {path}: {total}, the models are {models}")
    assert models <= total[path] < 1.1 * models
    assert total["flare"] < 0.02 * models
    assert total["sites" if path == "parent" else "parent"] < 0.01 * models
    logs = [sites.federation.log(name, job) for name in SITES]
    assert any(said in log for log in logs)
    assert not any("FLARE's own path" in log for log in logs)
