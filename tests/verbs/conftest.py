from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import rdma_devices
from tests.support.waiting import PATIENCE

DEADLINE = 30.0 * PATIENCE


@pytest.fixture(scope="session")
def devices() -> tuple[str, str]:
    """An RDMA device for each end of a connection; the test is skipped where there is none."""
    return rdma_devices.pair()


@pytest.fixture(scope="session")
def iwarp_devices() -> tuple[str, str]:
    """The same of iWARP devices."""
    return rdma_devices.iwarp_pair()


@pytest.fixture(scope="session")
def network() -> Path:
    """The script that sets up the guest's wires and devices; the test is skipped outside of the guest."""
    if not Path("/run/guest/command").exists():
        pytest.skip("not in the guest of 'make test-verbs', whose wires this test needs")
    return Path(__file__).parents[1] / "guest" / "network.sh"


@pytest.fixture
def wires(network):
    """Puts back whatever a test takes away."""

    def up():
        subprocess.run(["sh", network, "up"], check=True, timeout=DEADLINE)

    up()
    yield up
    up()
