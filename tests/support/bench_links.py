"""Benches, and links to what listens for them and for doctors."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from nvflare_rdma.channel import Pending, Source, dial
from nvflare_rdma.cli.bench_link import BenchExchange, bounds_of
from nvflare_rdma.cli.bench_listen import BenchListening
from nvflare_rdma.cli.peer_link import Exchange, context_for
from nvflare_rdma.cli.peer_listen import Listening
from nvflare_rdma.fabric import connect_tcp
from tests.support.commands import told
from tests.support.waiting import PATIENCE

DEADLINE = 60.0 * PATIENCE
RUN = "0123456789abcdef"
E = TypeVar("E", bound=Exchange)


class Held(Source):
    """A message that is not sent until it may be."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.begun, self.go_on = threading.Event(), threading.Event()

    def read(self, offset, length, take):
        self.begun.set()
        assert self.go_on.wait(DEADLINE)
        return memoryview(bytes(length))


def measured(capsys, *options) -> tuple[int, dict]:
    """What `bench` says to a program."""
    return told(capsys, "bench", *options)


@contextlib.contextmanager
def exchange_with(listening: Listening, side, kind: Callable[..., E] = Exchange, **more: Any) -> Iterator[E]:
    """A link to a listener of this process, on which questions can be asked."""
    sock, stream = dial(("127.0.0.1", listening.port), side.tls(False), Pending())
    tcp = side.runtime.tcp(functools.partial(connect_tcp, sock.getpeername()[:2], DEADLINE))
    made = kind(stream, side.runtime.fabrics(tcp, sock), context_for(side.runtime.context, ("tcp",)), "asks", **more)
    made.link.open()
    runner = threading.Thread(target=made.receive, daemon=True)
    runner.start()
    try:
        yield made
    finally:
        made.link.close(0.0)
        runner.join(DEADLINE)


def link_to(listening: BenchListening, side) -> contextlib.AbstractContextManager[BenchExchange]:
    """The same to a bench's."""
    return exchange_with(listening, side, BenchExchange, bounds=bounds_of(side.settings))
