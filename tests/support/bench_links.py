"""Benches, and links to what listens for them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

from nvflare_rdma.channel import Pending, dial
from nvflare_rdma.cli.bench_link import BenchExchange, bounds_of
from nvflare_rdma.cli.bench_listen import BenchListening
from nvflare_rdma.cli.peer_link import context_for
from nvflare_rdma.fabric import connect_tcp
from tests.support.commands import told
from tests.support.waiting import PATIENCE

DEADLINE = 60.0 * PATIENCE
RUN = "0123456789abcdef"


def measured(capsys, *options) -> tuple[int, dict]:
    """What `bench` says to a program."""
    return told(capsys, "bench", *options)


@contextlib.contextmanager
def link_to(listening: BenchListening, side) -> Iterator[BenchExchange]:
    sock, stream = dial(("127.0.0.1", listening.port), side.tls(False), Pending())
    tcp = side.runtime.tcp(functools.partial(connect_tcp, sock.getpeername()[:2], DEADLINE))
    context = context_for(side.runtime.context, ("tcp",))
    made = BenchExchange(stream, side.runtime.fabrics(tcp, sock), context, "asks", bounds=bounds_of(side.settings))
    made.link.open()
    runner = threading.Thread(target=made.link.run, daemon=True)
    runner.start()
    try:
        yield made
    finally:
        made.link.close(0.0)
        runner.join(DEADLINE)
