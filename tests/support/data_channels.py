"""Data channels of several cells in one process, each with settings of its own."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from nvflare_rdma.fabric.registry import factories, probe
from nvflare_rdma.runtime import Runtime, Shared, make_context, make_memory
from nvflare_rdma.settings import Settings
from nvflare_rdma.transfer.meetings import Place
from nvflare_rdma.transfer.peers import PeerLinks
from tests.support.link_process import resources
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually

ANY_PORT = (0, 0)
#: What all of them share.
shared = Shared()
_base: dict[tuple[str, ...], Runtime] = {}


def runtime(fabrics: tuple[str, ...] = ("tcp",), budget: int = 16 << 20, stall: float | None = None) -> Runtime:
    """With a budget of its own."""
    settings = Settings(rdma_fabrics=fabrics, rdma_chunk_bytes=64 * 1024, rdma_memory_budget_bytes=budget)
    if fabrics not in _base:
        available = probe(settings.fabric_options)
        made = factories(settings.fabric_options, available)
        _base[fabrics] = Runtime(settings, make_context(settings, available), made, shared)
    base = _base[fabrics]
    limits = base.context.limits if stall is None else replace(base.context.limits, stall_timeout=stall)
    return replace(base, settings=settings, context=replace(base.context, limits=limits, **make_memory(budget)))


def clear(server_side: bool) -> ssl.SSLContext | None:
    return None


def anybody(peer: str, certificate: Mapping[str, Any]) -> None:
    """For what is not about whose a certificate is."""


class Cells:
    """Makes the data channels of cells, and closes them."""

    def __init__(self) -> None:
        self.made: list[PeerLinks] = []

    def __call__(
        self,
        name: str,
        ports: tuple[int, int] | None = ANY_PORT,
        tls: Callable[[bool], ssl.SSLContext | None] = clear,
        host: str = "127.0.0.1",
        fabrics: tuple[str, ...] = ("tcp",),
        budget: int = 16 << 20,
        trainers: bool = False,
        stall: float | None = None,
        meet: Callable[[str], Place] | None = None,
        port: int = 0,
    ) -> PeerLinks:
        made = PeerLinks(name, runtime(fabrics, budget, stall), tls, anybody, (host, port), ports, trainers, meet)
        self.made.append(made)
        return made


@contextlib.contextmanager
def cells() -> Iterator[Cells]:
    """Afterwards nothing of them is left."""
    before = set(threading.enumerate())
    make = Cells()
    try:
        yield make
    finally:
        for channels in make.made:
            channels.close()
        eventually(lambda: not _left(before), DEADLINE)
        for channels in make.made:
            assert channels._shared.context.budget.in_use == 0
            assert not channels._links
            assert not channels.expected


def _left(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("rdma")]


def descriptors() -> int:
    return resources()["descriptors"]
