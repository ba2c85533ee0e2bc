"""Direct links between the processes that hold and want tensors, beside FLARE's own connections.

The side that others can reach has a door; the other side dials it. Whoever dials, data flows either way, and a link
stays open for later transfers. A door is opened by a ticket only (one use, bound to the peer's name, expiring), which
travels in FLARE's messages, whose senders FLARE has authenticated. Where FLARE's connections are secure, so are these,
with the same certificates: a ticket opens a door, and a certificate says who comes. Before anything else, each side
checks that the certificate is that of the peer that it means.

What a peer may use counts for its site, however many cells, tickets and links it has.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import ssl
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

from nvflare_rdma.channel import (
    GREETING_TIMEOUT,
    ControlStream,
    Door,
    Link,
    LinkContext,
    Listener,
    Pending,
    Role,
)
from nvflare_rdma.errors import FabricError, FabricUnavailable, ProtocolError, RdmaError, TlsError
from nvflare_rdma.fabric import Fabric, MemoryBudget, TcpFabric
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.addresses import (
    MAX_ADDRESSES,
    SERVER,
    TICKET_BYTES,
    Invitation,
    Reach,
    is_loopback,
    listen,
    loopback,
    may_be_named,
    own_hosts,
    parse_invitation,
    reach_of_host,
    site_of,
)
from nvflare_rdma.transfer.dialling import (
    ADDRESS_SECONDS,
    DIAL_SECONDS,
    RAILS_THROUGH_PARENT,
    Dialler,
    Failures,
    Opened,
    Silent,
    receive_bytes,
    unexpected,
)
from nvflare_rdma.transfer.expected import ExpectedMessages
from nvflare_rdma.transfer.long_waits import LongWaits
from nvflare_rdma.transfer.meetings import Meetings, Place
from nvflare_rdma.transfer.records import Ledger
from nvflare_rdma.transfer.tickets import Tickets
from nvflare_rdma.transfer.waiting import SitePlaces

log = get_logger(__name__)

#: For all cells of a site. The oldest makes room, one that is idle first.
MAX_LINKS = 16
#: A peer from which nothing has come for so long is asked for a sign of life before its link is used again, and has so
#: long to give one.
_QUIET_SECONDS, _ANSWER_SECONDS = 5.0, 5.0
#: How often in a row a peer to which there was a link may not answer, and how long a broken link may take to end.
_TRUST, _END_SECONDS = 3, 10.0
_WELCOME = b"\x01"
_MAX_TENSOR_BYTES = 1 << 48
#: See `LinkContext`; tensors are large. A tensor's last chunk may be twice as long; that still fits into the memory for
#: sending, if it has to be staged (as from a GPU).
_SAME_HOST_FACTOR = 6

#: Called with a peer's cell name and the certificate that was shown, as `ssl.SSLSocket.getpeercert` gives it. Raises
#: TlsError unless the certificate is the peer's.
Identify: TypeAlias = Callable[[str, Mapping[str, Any]], None]


class SharedByLinks(Protocol):
    """What `PeerLinks` needs of its process: `nvflare_rdma.runtime.Runtime` has it."""

    @property
    def context(self) -> LinkContext:
        """The limits, memory and settings of links."""

    @property
    def ledger(self) -> Ledger:
        """Where the records of transfers go."""

    @property
    def long_waits(self) -> LongWaits:
        """Which tells people how far transfers are."""

    @property
    def waiting_places(self) -> SitePlaces:
        """For threads of FLARE's that wait for a site."""

    def tcp(self, dial: Callable[[], socket.socket] | None = None, most_rails: int | None = None) -> TcpFabric:
        """The tcp fabric of a door, or of a link that `dial` makes the rails of, at most so many."""

    def fabrics(self, tcp: TcpFabric, sock: socket.socket) -> dict[str, Fabric]:
        """The fabrics of a link whose control stream is on `sock`."""


class PeerLinks:
    """Opens and keeps one cell's links to its peers, and knows what is expected over them.

    Args:
        name: the cell's FQCN.
        shared: what all links of the process share.
        tls: makes the context for the listening side (True) or the dialling one; gives None where FLARE is not secure.
        identify: says whether a certificate is a peer's.
        server: where the federation's server is reached, a host and FLARE's port ("" and 0 if unknown); the host is
            tried before the addresses that the server names. Unless it is on a private network, peers are told no
            private address, and none that a peer names is dialled.
        ports: what the door may listen on, (0, 0) for any port; None for no door.
        trainers: without `ports`, whether there is a door on the loopback device for the cells below this one: the
            Client API's processes, and for those of other sites if the server is on this host.
        meet: has a parent, by its cell's name, make a route to this cell; None for no ways through parents.
    """

    def __init__(  # noqa: PLR0913 - each is a thing of its own
        self,
        name: str,
        shared: SharedByLinks,
        tls: Callable[[bool], ssl.SSLContext | None],
        identify: Identify,
        server: tuple[str, int],
        ports: tuple[int, int] | None,
        trainers: bool = False,
        meet: Callable[[str], Place] | None = None,
    ) -> None:
        self.name = name
        #: For how many seconds a peer is waited for that does not answer, and whether it is known to have ended.
        self.patience = 0.0
        self.has_ended: Callable[[str], bool] = lambda peer: False
        self._shared = shared
        self._tls = tls
        self._identify = identify
        self._server_host = server[0]
        self._ports = ports
        self._trainers = trainers
        limits = replace(shared.context.limits, max_message_bytes=_MAX_TENSOR_BYTES)
        self._context: LinkContext = replace(
            shared.context, limits=limits, same_host_factor=_SAME_HOST_FACTOR, labels_only=True
        )
        self._fabric = shared.tcp()
        self._lock = threading.Lock()
        self._opened = threading.Condition(self._lock)
        self._door: Door | None = None
        self._pending = Pending()
        self._meetings = Meetings(name, meet, self._serve_door, lambda: self._server_reach)
        self._dialler = Dialler(
            name,
            server,
            lambda: self._server_reach,
            lambda: self._secure(False),
            functools.partial(self._require, role=Role.ACTIVE, consequence="it was sent no ticket"),
            self._pending,
        )
        self._tickets = Tickets()
        #: Peer -> its links, the newest last. An older one lives on: a transfer may still use it.
        self._links: dict[str, list[Link]] = {}
        #: Peer -> how many of its tickets came whose link is not there yet.
        self._opening: Counter[str] = Counter()
        #: Peers that are being dialled.
        self._dialling: set[str] = set()
        self.expected = ExpectedMessages()
        """The messages that are to come over these links."""
        self._unreachable = Silent(_TRUST)
        self.was_linked = self._unreachable.trusts
        self._closed = False
        #: What opened each link.
        self._ticket_of: weakref.WeakKeyDictionary[Link, bytes] = weakref.WeakKeyDictionary()
        self._known_reach: Reach | None = None
        self._process = os.getpid()

    # -- doors ---------------------------------------------------------------------------------------------

    def invite(self, peer: str) -> dict[str, Any]:
        """Make an invitation for `peer`, which it gives to its `dial` (msgpack types). Opens the door if need be.

        Raises:
            FabricUnavailable: this side has no door.
        """
        ways, why_none = self._meetings.ways_for(peer)
        hosts: list[str] = []
        port = 0
        try:
            host, port = self._open_door(peer).address
            hosts = [host] if host not in ("", "0.0.0.0", "::") else self._hosts_for(peer)
        except FabricUnavailable as error:
            if not ways:
                raise FabricUnavailable(f"{error}{why_none and '; '}{why_none}") from error
        ticket = self._tickets.issue(peer, time.monotonic())
        return Invitation(hosts, port, ticket, ways).pack()

    def _hosts_for(self, peer: str) -> list[str]:
        if self._is_same_site(peer):
            return ["127.0.0.1", *own_hosts()][:MAX_ADDRESSES]
        server = self._server_reach
        return [host for host in own_hosts() if may_be_named(host, server)]

    def _is_same_site(self, peer: str) -> bool:
        return site_of(peer) == site_of(self.name)

    @property
    def _server_reach(self) -> Reach:
        if self._known_reach is None:
            try:
                self._known_reach = reach_of_host(self._server_host)
            except (OSError, ValueError):
                return Reach.WORLD  # for now: the name may be known later
        return self._known_reach

    def _open_door(self, peer: str) -> Door:
        self._leave_port_to_parent()
        if not self._may_come(peer):
            raise FabricUnavailable(f"{self.name} does not listen for data, as rdma_data_ports says there")
        with self._lock:
            if self._door is None or self._door.is_over:
                inside = self._ports is None or is_loopback(self._server_host)
                try:
                    listener = listen(loopback(self._server_host) if inside else "", self._ports or (0, 0))
                except OSError as error:
                    raise FabricUnavailable(f"{self.name} can't listen for data: {error}") from error
                self._door = self._serve_door(listener, f"{self.name}'s data port")
                log.info("%s listens for data on port %d", self.name, self._door.address[1])
            return self._door

    def _leave_port_to_parent(self) -> None:
        """All processes of a site have one `rdma_data_ports`. If it is one port and the parent's, it is not this one's:
        then peers come through the parent."""
        if self._ports is None or self._ports[0] != self._ports[1]:
            return
        with contextlib.suppress(FabricUnavailable):
            if (place := self._meetings.place_at(site_of(self.name))).port == self._ports[0]:
                self._ports, self._trainers = None, True
                log.info(
                    "%s has no data port: port %d is its parent's, and peers come through it", self.name, place.port
                )

    def _serve_door(self, listener: Listener, name: str) -> Door:
        if self._closed:
            raise FabricUnavailable(f"{self.name} is ending")
        through = "" if isinstance(listener, socket.socket) else name
        try:
            tls = None if self._secure(True) is None else self._door_tls
            door = Door(listener, tls, self._fabric, functools.partial(self._on_connection, through), name)
            threading.Thread(target=door.serve, name="rdma-data-door", daemon=True).start()
        except (FabricUnavailable, RuntimeError) as error:
            listener.close()
            raise FabricUnavailable(f"{self.name} can't listen for data: {error}") from error
        return door

    def _door_tls(self) -> ssl.SSLContext:
        """Made for each guest, since certificates may be renewed."""
        if (context := self._secure(True)) is None:
            raise FabricUnavailable(f"{self.name} has no certificates any more")
        return context

    def _on_connection(
        self, through: str, sock: socket.socket, stream: ControlStream, admitted: Callable[[], None]
    ) -> None:
        """Serve a peer that has dialled until it goes."""
        stream.through = through
        with self._pending.track(sock):
            ticket = receive_bytes(stream, TICKET_BYTES, GREETING_TIMEOUT)
        with self._lock:
            peer = self._tickets.peer_of(ticket)
            self._opening[peer] += 1
        try:
            link = self._admit(sock, stream, peer, ticket)
            admitted()
        finally:
            with self._opened:
                self._opening[peer] -= 1
                self._opened.notify_all()
        self._run(link, peer)

    def _admit(self, sock: socket.socket, stream: ControlStream, peer: str, ticket: bytes) -> Link:
        try:
            if peer:  # first: a ticket in the wrong hands stays good for who it was made for
                self._require(stream, peer, Role.PASSIVE, "it came with that one's ticket and gets nothing")
            self._tickets.use(ticket, time.monotonic())
        except RdmaError:
            stream.close()
            raise
        stream.ticket = ticket
        stream.send(stream.protect([_WELCOME]))
        return self._open(Role.PASSIVE, sock, stream, self._fabric, peer)

    def _require(self, stream: ControlStream, peer: str, role: Role, consequence: str) -> None:
        """Check that `peer` is at the other end of a stream, where there are certificates."""
        certificate = stream.peer_certificate()
        # With server-side TLS only, who dials has no certificate to show; else TLS itself has seen that there is one.
        if certificate is None or (role is Role.PASSIVE and not certificate):
            return
        try:
            self._identify(peer, certificate)
        except TlsError as error:
            raise TlsError(f"{error}: {consequence}") from None
        except Exception as error:  # FLARE's code, on what a peer has sent
            raise TlsError(f"the certificate shown for {peer!r} can't be read: {error!r}: {consequence}") from error

    def _secure(self, server_side: bool) -> ssl.SSLContext | None:
        try:
            return self._tls(server_side)
        except Exception as error:  # FLARE's code, which raises what it likes about a wrong file
            raise FabricUnavailable(f"{self.name} can't use its certificates: {error}") from error

    @property
    def budget(self) -> MemoryBudget:
        """The process's memory budget, which bounds what is received over these links."""
        return self._context.budget

    @property
    def closed(self) -> bool:
        """Whether no link is opened any more."""
        return self._closed

    @property
    def stall_timeout(self) -> float:
        """Seconds after which a transfer over these links in which nothing moves is given up."""
        return self._context.limits.stall_timeout

    @property
    def ledger(self) -> Ledger:
        """The process's, which the records of transfers over these links go to."""
        return self._shared.ledger

    @property
    def long_waits(self) -> LongWaits:
        """The process's, which tells people how far transfers are."""
        return self._shared.long_waits

    @property
    def waiting_places(self) -> SitePlaces:
        """The process's, for threads of FLARE's that wait for a site."""
        return self._shared.waiting_places

    def _may_come(self, peer: str) -> bool:
        if self._ports is not None:
            return True
        neighbour = is_loopback(self._server_host) and site_of(peer) not in (SERVER, site_of(self.name))
        return self._trainers and (neighbour or peer.startswith(f"{self.name}."))

    def has_door_for(self, peer: str) -> bool:
        """Whether this side listens, from now on at the latest, and `peer` may be invited. To who asks it for something
        it then sends an invitation, and takes none."""
        try:
            self._open_door(peer)
        except FabricUnavailable:
            return False
        return True

    # -- links ---------------------------------------------------------------------------------------------

    def find(self, peer: str) -> Link | None:
        """The link to `peer`, if there is one that is not about to end."""
        with self._lock:
            return self._find(peer)

    def _find(self, peer: str) -> Link | None:
        return next((link for link in reversed(self._links.get(peer, [])) if link.usable), None)

    def find_alive(self, peer: str) -> Link | None:
        """The link to `peer` that works, if there is one. A peer from which nothing has come for a while is asked for a
        sign of life: whatever is on the way to it may have forgotten an idle link, without a word. Links that bring
        none are given up. Blocks for `_ANSWER_SECONDS` at most."""
        with self._lock:
            links = [link for link in reversed(self._links.get(peer, [])) if link.usable]
        deadline = time.monotonic() + _ANSWER_SECONDS
        for link in links:
            link.ask(_QUIET_SECONDS)
        return next((link for link in links if link.is_alive(deadline)), None)

    def await_end(self, peer: str, link: Link) -> bool:
        """Whether a link writes nowhere any more. One that is not usable is given a moment to end."""
        with self._opened:
            return not link.usable and self._opened.wait_for(
                lambda: link not in self._links.get(peer, []), _END_SECONDS
            )

    def is_coming(self, peer: str) -> bool:
        """Whether there is a link to `peer`, or it has dialled and this side's end is being opened."""
        with self._lock:
            return self._find(peer) is not None or self._opening[peer] > 0

    def await_open(self, peer: str, patience: float = 0.0) -> Link | None:
        """Find the link to `peer`, and if `peer` has dialled, first wait until this side's end of it is open: an older
        link may be one that `peer` has given up. Waiting for it to dial takes up to `patience` seconds."""
        with self._opened:
            before = self._find(peer)
            self._opened.wait_for(lambda: self._find(peer) or self._closed, patience)
            self._opened.wait_for(
                lambda: not self._opening[peer] or self._find(peer) not in (before, None), GREETING_TIMEOUT
            )
            return self._find(peer)

    def await_other(self, peer: str, known: Link | None, patience: float) -> Link | None:
        """Wait up to `patience` seconds for a link to `peer` that is not `known`, and return it."""

        def other() -> Link | None:
            return found if (found := self._find(peer)) is not known else None

        with self._opened:
            self._opened.wait_for(lambda: other() or self._closed, patience)
            return other()

    def arriving(self, peer: str) -> int:
        """How many bytes are here of messages that `peer` has not finished. Where this number changes, data moves."""
        with self._lock:
            links = list(self._links.get(peer, []))
        return sum(landed for link in links for landed, _ in link.incoming().values())

    def dial(self, peer: str, invitation: Any) -> Link:
        """Open a new link to `peer`, which has sent the invitation. Who comes while the peer is being dialled waits for
        that link. For all of it there are `DIAL_SECONDS`.

        Raises:
            RdmaError: none of its addresses leads there; or that was so a short time ago, and none was tried.
            ProtocolError: `invitation` is malformed.
        """
        parsed = parse_invitation(invitation)
        ticket = parsed.ticket
        deadline = time.monotonic() + DIAL_SECONDS
        with self._opened:
            if (link := self._opened_by(peer, ticket)) is not None:
                return link
            if peer in self._dialling:
                before = self._find(peer)  # it is dialled because this one is of no use to it any more
                self._opened.wait_for(lambda: peer not in self._dialling, DIAL_SECONDS)
                if (link := self._opened_by(peer, ticket)) is not None:
                    return link
                if (link := self._find(peer)) is not None and link is not before:
                    return link
                if peer in self._dialling:
                    raise FabricUnavailable(f"{peer} is being dialled already")
            self._dialling.add(peer)
        try:
            return self._try_ways(peer, parsed, deadline)
        finally:
            with self._opened:
                self._dialling.discard(peer)
                self._opened.notify_all()

    def dial_or_invite(self, peer: str, invitation: Any) -> dict[str, Any] | None:
        """Open a new link to `peer`, which has sent the invitation. If it is better that the peer dials this side, an
        invitation for it is returned instead: of two sites, where one has a port, no third one need pass on anything.

        Raises:
            RdmaError: see `dial`.
        """
        theirs = parse_invitation(invitation)
        at_server_only = theirs.port == 0 and all(way.at_server for way in theirs.through)
        if at_server_only and SERVER not in (site_of(peer), site_of(self.name)):
            with contextlib.suppress(FabricUnavailable):
                if (own := self.invite(peer))["port"]:
                    return own
        self.dial(peer, invitation)
        return None

    def _opened_by(self, peer: str, ticket: bytes) -> Link | None:
        """The link that this ticket has opened: two who are invited at about the same time get the same ticket."""
        links = (link for link in self._links.get(peer, []) if link.usable)
        return next((link for link in links if self._ticket_of.get(link) == ticket), None)

    def _try_ways(self, peer: str, invitation: Invitation, deadline: float) -> Link:
        began = time.monotonic()
        self._unreachable.check(peer, began)
        failures = Failures()
        with contextlib.closing(self._dialler.open(peer, invitation, deadline, failures)) as ways:
            for opened in ways:
                try:
                    link = self._enter(opened, invitation.ticket, peer, deadline)
                except (OSError, RdmaError) as error:
                    failures.add(opened.attempt, error)
                    continue
                for impostor in failures.impostors:  # where no address leads there, the error has them
                    log.warning("%s reached %s elsewhere; %s", self.name, peer, impostor)
                if opened.attempt.through:
                    why = "; ".join(failures.texts) or "it names no other way"
                    log.info("%s reaches %s %s: %s", self.name, peer, opened.attempt, why)
                try:
                    threading.Thread(target=self._run, args=(link, peer), name="rdma-data", daemon=True).start()
                except RuntimeError as error:
                    link.close(0.0)
                    with self._lock:
                        self._links[peer].remove(link)
                    raise FabricUnavailable(f"{self.name} can't serve a link to {peer}: {error}") from error
                return link
        reason = (
            f"no direct way from {self.name} to {peer}: {'; '.join(failures.texts) or 'it names no address'} "
            f"(where {peer} listens is said there by rdma_data_ports: it has to be a port that is open to this side)"
        )
        if failures.silent_ways:
            self._unreachable.note(peer, began, reason)
        raise FabricError(reason)

    def _enter(self, opened: Opened, ticket: bytes, peer: str, deadline: float) -> Link:
        sock, stream = opened.sock, opened.stream
        try:
            deadline = min(deadline, time.monotonic() + ADDRESS_SECONDS)
            with self._pending.track(sock):
                stream.ticket = ticket
                stream.send(stream.protect([ticket]))
                if receive_bytes(stream, len(_WELCOME), deadline - time.monotonic()) != _WELCOME:
                    raise ProtocolError("it is no data port of nvflare-rdma")
            most = RAILS_THROUGH_PARENT if opened.attempt.through else None
            return self._open(Role.ACTIVE, sock, stream, self._shared.tcp(opened.way, most), peer)
        except (OSError, RdmaError):
            stream.close()
            raise

    def _open(self, role: Role, sock: socket.socket, stream: ControlStream, tcp: TcpFabric, peer: str) -> Link:
        place = functools.partial(self.expected.place, peer)
        fabrics, name = self._shared.fabrics(tcp, sock), f"data {self.name} - {peer}"
        stream.site = site_of(peer)
        link = Link(stream, role, fabrics, self._context, unexpected, name, place)
        with self._pending.track(sock):
            link.open()
        with self._lock:
            closed = self._closed
            site = site_of(peer)
            others = [
                old for whose, links in self._links.items() if site_of(whose) == site for old in links if old.usable
            ]
            if not closed:
                self._ticket_of[link] = stream.ticket
                self._links.setdefault(peer, []).append(link)
                self._unreachable.forget(peer)
                self._opened.notify_all()
        if closed:
            link.close(0.0)
            raise FabricError(f"{self.name} is ending")
        # Not under the lock: a link that looks for a sink has its own, and waits for this one.
        while len(others) >= MAX_LINKS:
            oldest = next((old for old in others if old.idle), others[0])
            log.warning("%s has %d links, which are the most for one site; the oldest is closed", site, len(others))
            others.remove(oldest)
            oldest.close(0.0)
        return link

    def _run(self, link: Link, peer: str) -> None:
        try:
            link.run()
        finally:
            with self._opened:
                self._links[peer].remove(link)
                if not self._links[peer]:
                    del self._links[peer]
                self._opened.notify_all()

    def close(self) -> None:
        """End all links at once, and close the door. Idempotent. In a forked process it does nothing: they are its
        parent's."""
        if self._process != os.getpid():
            return
        with self._lock:
            self._closed = True
            door, self._door = self._door, None
            links = [link for links in self._links.values() for link in links]
        self._pending.close()
        self._meetings.close()
        if door is not None:
            door.close()
        for link in links:
            link.close(0.0)
