"""The RDMA devices that tests may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

SYSFS = Path("/sys/class/infiniband")
RNIC = "4:"  # how sysfs begins the type of an iWARP device


def pair() -> tuple[str, str]:
    """A device for each end of a connection; both are the same where there is only one. Skips where there is none.

    ``RDMA_TEST_DEVICES=first,second`` names others than the first of this machine's that is up.
    """
    if named := os.environ.get("RDMA_TEST_DEVICES"):
        first, _, second = named.partition(",")
        return first, second or first
    for device in sorted(SYSFS.glob("*")):
        up = any("ACTIVE" in state.read_text() for state in device.glob("ports/*/state"))
        if up and not (device / "node_type").read_text().startswith(RNIC):
            return device.name, device.name
    return _skip("no RDMA device is up here: 'make test-verbs' runs this test in a guest that has some")


def iwarp_pair() -> tuple[str, str]:
    """The same of iWARP devices, which have to be named: ``RDMA_TEST_IWARP_DEVICES=first,second``."""
    if named := os.environ.get("RDMA_TEST_IWARP_DEVICES"):
        first, _, second = named.partition(",")
        return first, second or first
    return _skip("no iWARP (siw) device: 'make test-verbs' runs this test in a guest that has some")


def _skip(reason: str) -> NoReturn:
    import pytest  # takes seconds on an emulated CPU, in processes that are no tests

    pytest.skip(reason)
