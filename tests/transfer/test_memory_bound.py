"""What transfers hold beside the tensors themselves stays within the budget, whatever its size and however many there
are at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.marks import marked
from nvflare_rdma.codecs.tensors import to_flat
from nvflare_rdma.errors import RdmaError
from nvflare_rdma.runtime import LinksByCell
from nvflare_rdma.transfer.content import TensorContent
from nvflare_rdma.transfer.peers import PeerLinks
from nvflare_rdma.transfer.pieces import PieceLayout
from nvflare_rdma.transfer.receiver import pull
from nvflare_rdma.transfer.service import Service
from tests.support.certificates import Authority
from tests.support.data_channels import Cells, clear, descriptors
from tests.support.direct_transfers import Direct, assert_equal, large, new
from tests.support.tcp_pair import DEADLINE, in_parallel
from tests.support.waiting import eventually

MIB = 1 << 20


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    from nvflare.fuel.f3.drivers.net_utils import get_ssl_context

    authority = Authority(tmp_path_factory.mktemp("pki"))
    files = {**authority.issue("server", "server"), **authority.issue("client", "site"), "secure": True}
    return lambda server_side: get_ssl_context(files, server_side)


def held_at_most(channels: PeerLinks) -> int:
    """Slots that were in use at once."""
    pool = channels._shared.context.pool
    return pool._busiest


def few_bits(n: int) -> torch.Tensor:
    return marked(torch.randn(n, generator=torch.Generator().manual_seed(2)), get_codec("normfloat4"))


@pytest.mark.parametrize("sealed", [False, True])
def test_a_tensor_larger_than_the_budget(sealed, cell, secure):
    """Raw ones land in place, but sealed ones and those of few bits go through slots."""
    sent = {"few bits": few_bits(8 * MIB), "raw": torch.arange(3 * MIB)}
    kinds = {"tls": secure if sealed else clear, "budget": MIB}
    it, site = Direct(cell, sent, **kinds), cell("site-1", **kinds)
    got = it.pull(site)
    assert_equal({"raw": got["raw"]}, {"raw": sent["raw"]})
    assert float((got["few bits"] - sent["few bits"]).abs().max()) < 1
    for side in (it.channels, site):
        assert 0 < held_at_most(side) <= MIB
        context = side._shared.context
        assert context.budget.peak <= context.budget.limit
    it.service.close()


def test_senders_share_the_budget_of_their_receiver(cell):
    server, count = cell("server", budget=2 * MIB), 12
    names = [f"site-{i}" for i in range(4)]
    services = []

    def send(name: str) -> None:
        site = cell(name, ports=None)
        service = Service(TensorContent({f"t{i}": few_bits(MIB // 2) for i in range(count)}), lambda: site)
        services.append(service)
        got = pull(server, name, lambda r: service.answer(r, "server"), new)
        assert len(got) == count

    in_parallel(*(lambda name=name: send(name) for name in names))
    assert held_at_most(server) <= 2 * MIB
    for service in services:
        service.close()


def test_receivers_share_the_memory_of_their_sender(cell):
    sent = {f"t{i}": few_bits(MIB // 2) for i in range(8)}
    it = Direct(cell, sent, budget=2 * MIB)
    sites = [cell(f"site-{i}") for i in range(6)]
    in_parallel(*(lambda site=site: it.pull(site) for site in sites))
    assert 0 < held_at_most(it.channels) <= 2 * MIB * 3 // 16 + 128 * 1024
    it.service.close()


@pytest.mark.parametrize("how", ["aborted", "ended", "failed"])
def test_whatever_ends_a_transfer_frees_everything(how, monkeypatch):
    """Descriptors, slots, the budget, and the tensors."""
    before, cell = descriptors(), Cells()
    it, site, stop = Direct(cell, {"few": few_bits(MIB), **large(200)}), cell("site-1"), threading.Event()

    def act() -> None:
        if how == "ended":
            it.service.close()
        elif how == "failed":
            raise MemoryError("it breaks here")
        stop.set()

    with pytest.raises((RdmaError, MemoryError)):
        it.pull(site, aborted=stop.is_set, progress=it.once_some_are_here(act))
    it.go_on.set()
    it.service.close()
    eventually(lambda: not it.senders, DEADLINE)
    for side in (it.channels, site):
        side.close()
    for side in (it.channels, site):
        context = side._shared.context
        eventually(lambda context=context: not context.budget.in_use and not context.pool.used_bytes, DEADLINE)
    eventually(lambda: descriptors() <= before, DEADLINE)


def test_two_jobs_of_one_process(cell):
    """Each has cells of its own; the end of one leaves the other's channels alone."""
    registry, made = LinksByCell(), {}

    class JobCell:
        def __init__(self, name: str) -> None:
            self.name = name

        def get_fqcn(self) -> str:
            return self.name

    def make(of: JobCell) -> PeerLinks:
        return made.setdefault(of.name, cell(of.name))

    registry.start(make)
    registry.start(make)
    servers = [JobCell("server.job-1"), JobCell("server.job-2")]
    sent = [{"x": np.full(MIB, i, np.float32)} for i in range(2)]
    services = [Service(TensorContent(t), lambda s=s: registry.of(s)) for t, s in zip(sent, servers, strict=True)]

    def job(i: int) -> None:
        own = cell(f"site-1.job-{i}")
        for _ in range(3):
            got = pull(own, servers[i].name, lambda r: services[i].answer(r, own.name), new)
            assert np.array_equal(to_flat(got["x"]), sent[i]["x"])

    in_parallel(lambda: job(0), lambda: job(1))
    assert registry.stop() is False
    job(1)
    assert registry.stop() is True
    assert registry.of(servers[1]) is None


def test_a_unit_fits_into_the_smallest_budget():
    """Chunks are at most a quarter of what may arrive; a codec's unit must not be more."""
    from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec

    fixed = [codec for name in CODEC_NAMES if isinstance(codec := get_codec(name), FixedSizeCodec)]
    assert max(PieceLayout.choose(codec, 1 << 30).unit for codec in fixed) <= MIB * 12 // 16
