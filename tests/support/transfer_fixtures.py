"""Fixtures of the tests that move tensors and files between cells of one process."""

from __future__ import annotations

import threading

import pytest

from nvflare_rdma.transfer import content, manifest
from tests.support.data_channels import cells, shared
from tests.support.direct_transfers import Direct
from tests.support.file_transfers import Files
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually


@pytest.fixture
def cell():
    """cell("site-1", ports=..., tls=...) -> PeerLinks"""
    with cells() as make:
        yield make


@pytest.fixture
def direct(cell, monkeypatch):
    """direct(tensors, ...) -> Direct. Each tensor goes over a link, as a message of its own."""
    monkeypatch.setattr(content, "SMALL_TOTAL", 0)
    monkeypatch.setattr(manifest, "BUNDLED_BYTES", 0)
    made = []

    def make(tensors, **kinds):
        made.append(Direct(cell, tensors, **kinds))
        return made[-1]

    yield make
    for it in made:
        it.service.close()
        eventually(lambda it=it: not it.senders, DEADLINE)


@pytest.fixture
def files(cell, tmp_path):
    """files(content, ...) -> Files"""
    made = []

    def make(content: bytes, **kinds) -> Files:
        made.append(Files(cell, tmp_path, content, **kinds))
        return made[-1]

    yield make
    for it in made:
        it.service.close()
    eventually(lambda: not any(thread.name == "rdma-offers" for thread in threading.enumerate()), DEADLINE)


@pytest.fixture
def records():
    """The records of all transfers, as they end."""
    found = []
    unsubscribe = shared.ledger.subscribe(found.append)
    yield found
    unsubscribe()
