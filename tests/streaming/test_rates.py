"""How fast a link is, as transfers tell, and what peers say of it."""

from __future__ import annotations

import pytest
import torch

from nvflare_rdma.streaming.rates import LinkRates
from tests.support.data_channels import shared
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually

LARGE = {"w": torch.ones(500_000)}


@pytest.fixture
def rates():
    made = LinkRates(shared.ledger, "server")
    yield made
    made.stop()


def sent(records):
    return eventually(lambda: [each for each in records if each.direction == "sent"], DEADLINE)


def test_a_transfer_tells(direct, cell, rates, records):
    direct(LARGE).pull(cell("site-1"))
    (record,) = sent(records)
    assert rates.to("site-1") == pytest.approx(record.wire_bytes / record.seconds, rel=1e-3)
    assert rates.to("site-2") is None


def test_who_says_that_all_of_it_has_come_tells_nothing(direct, cell, rates, records):
    """It has taken nothing, so that no rate follows, whatever else it says."""
    it, site = direct(LARGE), cell("site-1")
    claims = {"rate": 1e12, "seconds": 1e-9, "wire_bytes": 1 << 40}
    for request in ("describe", "done"):
        it.ask(site.name)({"do": request, **claims})
    (record,) = sent(records)
    assert (record.outcome, record.wire_bytes) == ("done", 0)
    assert rates.to("site-1") is None
