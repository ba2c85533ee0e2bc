"""How a peer is dialled: straight to its door, and through a parent's port where that does not lead there.

Each kind of ways has a short start; then the next one is tried at the same time, and the first that leads to the peer
wins.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from nvflare_rdma.channel import GREETING_TIMEOUT, ControlStream, Pending, dial
from nvflare_rdma.errors import FabricUnavailable, ProtocolError, RdmaError, TlsError, UnreachableError
from nvflare_rdma.fabric import connect_tcp, join_address
from nvflare_rdma.transfer.addresses import (
    MAX_ADDRESSES,
    SERVER,
    Invitation,
    Reach,
    WayThrough,
    may_be_named,
    reach_of,
    resolve,
    site_of,
)
from nvflare_rdma.transfer.routes import dialling

#: The time for all addresses of a peer together. One of them may take `ADDRESS_SECONDS` for the greeting, and as long
#: again for the ticket; when the ticket is taken, the link has the handshake's deadline besides.
DIAL_SECONDS = 20.0
ADDRESS_SECONDS = 5.0
#: Each kind of ways, straight and through parents, is tried so much later than the one before; and if a host has
#: answered by then, its process gets so much longer to greet: it may be at work.
_HEAD_START_SECONDS, _GREETING_SECONDS = 0.3, 2.0
#: Each rail through a parent takes two of the descriptors that it has for all sites.
RAILS_THROUGH_PARENT = 4
#: A peer that does not answer, as behind a firewall that drops packets, is not dialled again for so long; twice as long
#: the next time, and so on.
_AVOID_SECONDS, _AVOID_DOUBLINGS = 60.0, 6


class Silent:
    """Who did not answer: each is left alone for a while, which grows; who has answered once, only after not doing so
    `trust` times in a row."""

    def __init__(self, trust: int = 0) -> None:
        self._lock = threading.Lock()
        self._trust = trust
        #: Who has answered -> how often it may still not do so.
        self._trusted: dict[str, int] = {}
        #: How often in a row, when that was last, and what was tried.
        self._known: dict[str, tuple[int, float, str]] = {}

    def note(self, peer: str, began: float, reason: str) -> None:
        """It did not answer an attempt that began then. Several threads that dial at once find out the same; that
        counts once."""
        with self._lock:
            if left := self._trusted.get(peer, 0):
                self._trusted[peer] = left - 1
                return
            count, since, _ = self._known.get(peer, (0, 0.0, ""))
            self._known[peer] = count + (since <= began), time.monotonic(), reason

    def forget(self, peer: str) -> None:
        """It answers."""
        with self._lock:
            self._known.pop(peer, None)
            self._trusted[peer] = self._trust

    def trusts(self, peer: str) -> bool:
        """Whether it has answered, and not failed to do so too often since."""
        with self._lock:
            return self._trusted.get(peer, 0) > 0

    def check(self, peer: str, now: float) -> None:
        """Raise FabricUnavailable, with the reason, if it is to be left alone."""
        with self._lock:
            count, since, reason = self._known.get(peer, (0, 0.0, ""))
        left = since + _AVOID_SECONDS * 2 ** min(count - 1, _AVOID_DOUBLINGS) - now
        if count and left > 0:
            raise FabricUnavailable(f"{reason} (tried {now - since:.0f} s ago, and again in {left:.0f} s)")


@dataclass
class Failures:
    """What was tried in vain."""

    texts: list[str] = field(default_factory=list)
    #: The kinds of ways of which something did not answer, and whether a host did: its process then said nothing.
    silent_ways: dict[str, bool] = field(default_factory=dict)
    #: Of the texts, those about somebody else who was there.
    impostors: list[str] = field(default_factory=list)

    def add(self, attempt: Attempt, error: Exception) -> None:
        """An attempt has failed."""
        self.texts.append(f"{attempt}: {error}")
        if isinstance(error, UnreachableError | TimeoutError):
            answered = not isinstance(error, UnreachableError)
            self.silent_ways[attempt.kind] = answered or self.silent_ways.get(attempt.kind, False)
        if isinstance(error, TlsError):
            self.impostors.append(self.texts[-1])


@dataclass(frozen=True)
class Attempt:
    """An address that may lead to a peer. `through` says whose port it is if it is not the peer's own."""

    host: str
    address: str
    port: int
    preamble: bytes = b""
    through: str = ""

    @property
    def kind(self) -> str:
        """What all ways of its kind are called."""
        return f"through {self.through}" if self.through else "straight"

    def __str__(self) -> str:
        where = join_address(self.host, self.port)
        return f"{self.kind} at {where}" if self.through else where


@dataclass(frozen=True)
class Opened:
    """A control stream to a peer, which has shown that it is the peer, and gets a ticket now."""

    attempt: Attempt
    sock: socket.socket
    stream: ControlStream

    @property
    def way(self) -> Callable[[], socket.socket]:
        """Connects to where the control stream came through: a name may have several addresses, and hosts."""
        return functools.partial(_connect, self.sock.getpeername()[:2], self.attempt.preamble)


#: What opens streams as it goes on.
Opening: TypeAlias = Generator[Opened, None, None]


class Dialler:
    """Dials the peers of the cell `name`. `tls` gives the context of the dialling side, and `require` raises TlsError
    unless the peer is at the other end of a stream. `reach` says how far the server can be reached, which is at
    `server`, a host and a port ("" and 0 if unknown)."""

    def __init__(
        self,
        name: str,
        server: tuple[str, int],
        reach: Callable[[], Reach],
        tls: Callable[[], ssl.SSLContext | None],
        require: Callable[[ControlStream, str], None],
        pending: Pending,
    ) -> None:
        self._name, self._server, self._reach = name, server, reach
        self._tls, self._require, self._pending = tls, require, pending
        self._silent = Silent()

    def open(self, peer: str, invitation: Invitation, deadline: float, failures: Failures) -> Opening:
        """The streams to `peer`, each as soon as it is there. Whoever can use one takes no other, and closes the
        iterator."""
        began = time.monotonic()
        ways: dict[str, Iterator[Attempt]] = {}
        if invitation.port:
            ways["straight"] = self._straight_ways(peer, invitation, failures)
        for through in invitation.through:
            whose = "the server" if through.at_server else f"the parent of {site_of(peer)}"
            ways[f"through {whose}"] = self._ways_through(through, whose, failures)
        if len(ways) > 1:
            for kind in list(ways)[:-1]:  # the last one has to do
                try:
                    self._silent.check(f"{kind} to {peer}", began)
                except FabricUnavailable as error:
                    failures.texts.append(str(error))
                    del ways[kind]
            race = _Race(functools.partial(self._each, peer, deadline, failures), ways)
            with contextlib.closing(race.run()) as found:
                for kind, opened in found:
                    self._silent.forget(f"{kind} to {peer}")
                    silent = {other: failures.silent_ways[other] for other in failures.silent_ways.keys() & ways.keys()}
                    greeting = race.greeting()
                    silent |= {other: other in greeting for other in race.going()}
                    for other in silent.keys() - {kind}:
                        what = "its host answered, and its process did not" if silent[other] else "nothing answered"
                        text = f"{other}, {what} in {time.monotonic() - began:.1f} s"
                        failures.texts.append(text)
                        self._silent.note(f"{other} to {peer}", began, text)
                    yield opened
        yield from self._each(peer, deadline, failures, itertools.chain(*ways.values()), lambda _: None)

    def _each(
        self,
        peer: str,
        deadline: float,
        failures: Failures,
        attempts: Iterable[Attempt],
        greets: Callable[[bool], object],
    ) -> Iterator[Opened]:
        """`greets` is told when a host has answered, and when the greeting with it is over."""
        for attempt in attempts:
            if time.monotonic() >= deadline:
                failures.texts.append(f"the others were not tried: {DIAL_SECONDS:g} s are over")
                return
            try:
                opened = self._dial(peer, attempt, deadline, lambda: greets(True))
            except (OSError, RdmaError) as error:
                failures.add(attempt, error)
                continue
            finally:
                greets(False)
            yield opened

    def _dial(self, peer: str, attempt: Attempt, deadline: float, connected: Callable[[], object]) -> Opened:
        left = min(deadline - time.monotonic(), ADDRESS_SECONDS)
        address = attempt.address, attempt.port
        sock, stream = dial(address, self._tls(), self._pending, left, attempt.preamble, connected)
        stream.through = attempt.through
        try:
            self._require(stream, peer)
        except RdmaError:
            stream.close()
            raise
        return Opened(attempt, sock, stream)

    def _straight_ways(self, peer: str, invitation: Invitation, failures: Failures) -> Iterator[Attempt]:
        hosts = list(invitation.hosts)
        if self._server[0] and site_of(peer) == SERVER:
            hosts = [self._server[0], *(host for host in hosts if host != self._server[0])]
        for host, address in self._addresses(hosts, site_of(peer) == site_of(self._name), failures):
            yield Attempt(host, address, invitation.port)

    def _ways_through(self, way: WayThrough, whose: str, failures: Failures) -> Iterator[Attempt]:
        if way.at_server:
            hosts, port = [self._server[0]], way.port or self._server[1]
        else:
            hosts, port = list(way.hosts), way.port
        if not port or "" in hosts:
            failures.texts.append(f"through {whose}: it is unknown here where that is")
            return
        for host, address in self._addresses(hosts, False, failures, named_port=way.port != 0):
            yield Attempt(host, address, port, dialling(way.token), whose)

    def _addresses(
        self, hosts: list[str], ours: bool, failures: Failures, named_port: bool = False
    ) -> Iterator[tuple[str, str]]:
        """The addresses that may be dialled, with the host of each. `failures` gets why others may not. A port that a
        peer has named is not dialled on the server's loopback device, unless all of the federation is there."""
        server = self._reach()
        for host in hosts[:MAX_ADDRESSES]:
            try:
                found = resolve(host)[:MAX_ADDRESSES]
                known = ours or (host == self._server[0] and not named_port)
                allowed = [address for address in found if known or may_be_named(address, server)]
            except (OSError, ValueError) as error:
                failures.texts.append(f"{host}: {error}")
                continue
            for address in found:
                if address not in allowed:
                    kind = reach_of(address).value
                    failures.texts.append(f"{host} is not dialled: it is a {kind} address, but the server's is not")
            yield from ((host, address) for address in allowed)


class _Race:
    """Opens streams by several kinds of ways. Each kind has a start before the next one. Each is tried until one of its
    attempts has succeeded."""

    def __init__(
        self,
        each: Callable[[Iterable[Attempt], Callable[[bool], object]], Iterator[Opened]],
        ways: Mapping[str, Iterator[Attempt]],
    ) -> None:
        self._each, self._ways = each, ways
        self._lock = threading.Lock()
        self._found: queue.SimpleQueue[tuple[str, Opened | None]] = queue.SimpleQueue()
        self._over = False
        self._going: set[str] = set()
        self._greeting: set[str] = set()

    def going(self) -> set[str]:
        """The kinds that are being tried."""
        with self._lock:
            return set(self._going)

    def greeting(self) -> set[str]:
        """Those of them whose host has answered, while its process has not yet."""
        with self._lock:
            return set(self._greeting)

    def run(self) -> Generator[tuple[str, Opened], None, None]:
        """The streams that were opened, at most one of each kind."""
        waiting, later, started = 0, list(self._ways), ""
        try:
            while waiting or later:
                if later:
                    self._start(started := later.pop(0))
                    waiting += 1
                with contextlib.suppress(queue.Empty):
                    kind, opened = self._next(started) if later else self._found.get()
                    waiting -= 1
                    if opened is not None:
                        yield kind, opened
        finally:
            with self._lock:
                self._over = True
            while not self._found.empty():
                if (late := self._found.get()[1]) is not None:
                    late.stream.close()

    def _next(self, started: str) -> tuple[str, Opened | None]:
        """What has come of a kind. Raises queue.Empty when the one after `started` is to be started."""
        try:
            return self._found.get(timeout=_HEAD_START_SECONDS)
        except queue.Empty:
            if started not in self.greeting():
                raise
        return self._found.get(timeout=_GREETING_SECONDS)

    def _greets(self, kind: str, begins: bool) -> None:
        with self._lock:
            (self._greeting.add if begins else self._greeting.discard)(kind)

    def _start(self, kind: str) -> None:
        with self._lock:
            self._going.add(kind)
        try:
            threading.Thread(target=self._try, args=(kind,), name="rdma-way", daemon=True).start()
        except RuntimeError:  # no more threads
            self._try(kind)

    def _try(self, kind: str) -> None:
        opened = None
        try:
            opened = next(self._each(self._ways[kind], functools.partial(self._greets, kind)), None)
        finally:
            with self._lock:
                self._going.discard(kind)
                if not self._over:
                    self._found.put((kind, opened))
                    opened = None
            if opened is not None:
                opened.stream.close()


def _connect(address: tuple[str, int], preamble: bytes) -> socket.socket:
    sock = connect_tcp(address, GREETING_TIMEOUT)
    try:
        if preamble:
            sock.sendall(preamble)
    except OSError:
        sock.close()
        raise
    return sock


def receive_bytes(stream: ControlStream, size: int, timeout: float) -> bytes:
    """Receive exactly `size` bytes. The peer sends no more before it has an answer."""
    deadline, data = time.monotonic() + timeout, b""
    while len(data) < size:
        part = stream.receive(max(deadline - time.monotonic(), 0.0))
        if not part:
            raise ConnectionError("it closed the connection" if part == b"" else "it said nothing in time")
        data += part
    if len(data) > size:
        raise ProtocolError("it sent more than it was asked for")
    return data


def unexpected(message: object) -> None:
    """Refuse a message without a label."""
    raise ProtocolError("a message without a label came over a link")
