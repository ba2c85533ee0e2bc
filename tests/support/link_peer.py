"""A link of this process to a peer in another one (see `link_process`)."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nvflare_rdma.channel.bodies import Sink
from nvflare_rdma.channel.control import ControlStream
from nvflare_rdma.channel.link import Link
from nvflare_rdma.channel.protocol.state import Role
from nvflare_rdma.channel.protocol.wire import CONTROL_MAGIC
from tests.support.link_process import DEADLINE, digest, make_context, make_fabrics, pattern, tls_context
from tests.support.processes import ROOT


class LinkPeer:
    """``link`` is ours (active), ``process`` runs the peer's; ``address`` is where the peer listens."""

    def __init__(self, options: dict, wrap: Callable[[tuple], tuple], log: Path, prefix: list[str]) -> None:
        self.options = options
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        with open(log, "wb") as err:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, str(Path(__file__).with_name("link_process.py")), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                env=environment,
            )
        self.log = log
        self.messages: queue.Queue[memoryview] = queue.Queue()
        #: Label -> where the message that comes under it goes.
        self.sinks: dict[int, Sink] = {}
        self.answers: queue.Queue[dict] = queue.Queue()
        try:
            self._open(wrap)
        except BaseException:
            self.process.kill()
            self.process.wait(DEADLINE)
            raise

    def _open(self, wrap: Callable[[tuple], tuple]) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.address = ("127.0.0.1", int(line))
        rails_to = wrap(self.address)
        self.context = make_context(self.options)
        sock = socket.create_connection(self.address, DEADLINE)
        sock.sendall(CONTROL_MAGIC)
        stream = ControlStream(sock, tls_context(self.options.get("tls"), False))
        stream.handshake(DEADLINE)
        self.fabrics = make_fabrics(self.options, lambda: socket.create_connection(rails_to, DEADLINE))
        self.link = Link(stream, Role.ACTIVE, self.fabrics, self.context, self._receive, "this", self._place)
        self.link.open()
        self.runner = threading.Thread(target=self.link.run, daemon=True)
        self.runner.start()

    def _receive(self, message: bytes | memoryview) -> None:
        if isinstance(message, bytes) and message[:1] == b"{":
            self.answers.put(json.loads(message))
        else:
            self.messages.put(memoryview(message))

    def tell(self, do: str, **fields) -> None:
        self.link.send(json.dumps({"do": do, **fields}).encode(), DEADLINE)

    def _place(self, label: int, ready: Callable[[], None]) -> Sink | None:
        return self.sinks.get(label)

    def answer(self) -> dict:
        return self.answers.get(timeout=DEADLINE)

    def ask(self) -> dict:
        """The peer's state."""
        self.tell("tell")
        return self.answer()

    def there(self, size: int, seed: int = 0) -> None:
        """Send a message and have it compared."""
        self.link.send(pattern(size, seed), DEADLINE)
        assert self.answer() == {"received": size, "digest": digest(pattern(size, seed))}

    def back(self, size: int, seed: int = 0) -> None:
        """Have the peer send a message."""
        self.tell("send", size=size, seed=seed)
        message = self.messages.get(timeout=DEADLINE)
        assert (len(message), digest(message)) == (size, digest(pattern(size, seed)))

    def close(self) -> None:
        self.link.close(1.0)
        self.runner.join(DEADLINE)
        assert not self.runner.is_alive(), "the link did not end"
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(DEADLINE)
        finally:
            self.process.kill()
            self.process.wait(DEADLINE)
            assert self.process.stdout is not None
            self.process.stdout.close()


@contextmanager
def link_peer(
    log: Path, wrap: Callable[[tuple], tuple] = lambda address: address, prefix: tuple[str, ...] = (), **options
) -> Iterator[LinkPeer]:
    """``options`` as `link_process` takes them. ``wrap`` puts something between: it gets the address that rails are
    to be dialled to, and gives another. ``prefix`` precedes the peer's command line."""
    peer = LinkPeer(options, wrap, log, list(prefix))
    try:
        yield peer
    finally:
        peer.close()
