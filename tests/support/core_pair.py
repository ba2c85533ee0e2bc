"""Two channel cores joined by lists: no sockets, threads or clocks. The test decides what happens when."""

from __future__ import annotations

from collections import deque

from nvflare_rdma.channel.controllers import make_controller
from nvflare_rdma.channel.protocol import events, wire
from nvflare_rdma.channel.protocol.connection import Connection
from nvflare_rdma.channel.protocol.limits import ChannelLimits
from nvflare_rdma.channel.protocol.state import Phase, RailState, Role
from nvflare_rdma.fabric.base import RemoteSlice

CHUNK, DEPTH = 1000, 3
MOST_RAILS = 5  # that are opened when more are wanted
LIMITS = ChannelLimits(max_message_bytes=1 << 20, inline_bytes=100, peer_chunk_bytes=1)


def hello(limits: ChannelLimits = LIMITS, **fields) -> wire.Hello:
    return wire.Hello({"tcp": ""}, limits.max_message_bytes, limits.inline_bytes, limits.max_writes, **fields)


def message(size: int, seed: int = 0) -> bytes:
    return bytes((i * 7 + seed) & 0xFF for i in range(size))


class Cable:
    """What joins a rail's two ends."""

    alive = True


class Side:
    """A core with the memory, and the scripted fabric, that a link would give it."""

    def __init__(self, role: Role, limits: ChannelLimits = LIMITS, rails: int = 2, **fields) -> None:
        controller = make_controller("fixed", CHUNK, DEPTH, 1 << 30)
        self.core = Connection(role, limits, hello(limits, **fields), controller, now=0.0)
        self.rails = rails
        self.unit = 1  # of the chunks that it grants
        self.now = 0.0
        self.peer: Side
        self.wire: deque[bytes] = deque()  # what the peer has sent on the control stream
        self.writes: deque[tuple[events.WriteChunk, bytes]] = deque()  # posted by this side, not landed yet
        self.cables: list[Cable] = []
        self.memory: dict[int, bytearray] = {}
        self.exposed: dict[int, events.ExposeChunk] = {}
        self.revoked: set[int] = set()  # of those exposed: they are answered, but not to be written
        self.sources: dict[int, bytes] = {}
        self.landed: dict[tuple[int, int], int] = {}  # (transfer, offset) -> how often
        self.received: list[bytes] = []
        self.inline: list[bytes] = []
        self.sent: list[int] = []
        self.failed: list[str] = []
        self.offered: deque[events.MessageOffered] = deque()
        self.to_dial: deque[events.OpenRails] = deque()
        self.to_join: deque[int] = deque()  # rails that are being dialled beside those that are open
        self.dialled = 0
        self.to_break: deque[int] = deque()  # rails that the peer's or this side's fabric will report as broken
        self.down: set[int] = set()
        self.peak_granted = self.longest_granted = 0

    def send(self, data: bytes) -> None:
        if self.core.fits_inline(len(data)):
            self.core.send_inline(data)
        else:
            self.sources[self.core.submit(len(data), self.now)] = data
        self.settle()

    def settle(self) -> None:
        """Handle events until there are none, and put control messages on the wire."""
        while happened := self.core.next_events():
            for event in happened:
                self.handle(event)
        self.peer.wire.extend(self.core.data_to_send())

    def handle(self, event: events.Event) -> None:
        match event:
            case events.ChooseFabric():
                self._reset_rails()
                self.cables = [Cable() for _ in range(MOST_RAILS if self.rails else 1)]
                self.core.choose("tcp" if self.rails else "", {}, False, False)
            case events.OpenRails():
                self.to_dial.append(event)
            case events.RailAdded(rail):
                if rail in self.down:  # it broke before the core knew of it: it is told again
                    self.down.discard(rail)
                    self.to_break.append(rail)
            case events.GrowRails(count):
                self.to_join.extend(range(self.dialled, min(count, MOST_RAILS)))
                self.dialled = max(self.dialled, min(count, MOST_RAILS))
            case events.RailsLost():
                self._reset_rails()
            case events.DropRail(rail):
                self.to_break.append(rail)
            case events.MessageOffered():
                self.offered.append(event)
            case events.ExposeChunk():
                assert event.rail not in self.down, "granted over a rail that is known to be broken"
                assert event.offset % self.unit == 0, "granted from within a unit"
                self.exposed[event.notification] = event
                self.core.exposed(event, RemoteSlice(1, event.offset, event.length))
                in_flight = sum(chunk.length for chunk in self.exposed.values())
                self.peak_granted = max(self.peak_granted, in_flight)
                self.longest_granted = max(self.longest_granted, event.length)
            case events.RevokeChunk(notification, answered):
                if answered:
                    self.revoked.add(notification)
                else:
                    del self.exposed[notification]
                    self.revoked.discard(notification)
            case events.WriteChunk():
                data = self.sources[event.transfer][event.offset : event.offset + event.length]
                if event.rail in self.down:
                    self.core.written(event.notification, self.now)
                else:
                    self.writes.append((event, data))
            case events.InlineReceived(payload):
                self.inline.append(payload)
            case events.MessageReceived(transfer):
                self.received.append(bytes(self.memory.pop(transfer)))
            case events.MessageSent(transfer):
                assert all(write.transfer != transfer for write, _ in self.writes), "its source is in use"
                self.sent.append(transfer)
            case events.ReceiveFailed(transfer, reason):
                self.memory.pop(transfer, None)
                self.failed.append(reason)
            case events.SendFailed(transfer, reason):
                self.sources[transfer] = b""  # what is written from now on answers the grant with nothing
                self.writes = deque((w, b"" if w.transfer == transfer else data) for w, data in self.writes)
                self.failed.append(reason)

    def _reset_rails(self) -> None:
        for cable in self.cables:  # the endpoint is closed
            cable.alive = False
        self.cables = []
        self.exposed.clear()
        self.revoked.clear()
        self.writes.clear()
        self.down.clear()
        self.to_break.clear()
        self.to_join.clear()

    # -- single steps a test may take in any order ---------------------------------------------------------

    def take_memory(self) -> None:
        """Grant the oldest offer its memory."""
        offer = self.offered.popleft()
        self.memory[offer.transfer] = bytearray(offer.length)
        self.core.accept(offer.transfer, self.now, self.unit)
        if (offer.transfer not in self.core.progress()) and offer.transfer in self.memory:
            del self.memory[offer.transfer]  # it was withdrawn
        self.settle()

    def dial(self, rails: int | None = None) -> None:
        self.to_dial.popleft()
        self._reset_rails()
        self.cables = self.peer.cables
        self.to_break.extend(rail for rail, cable in enumerate(self.cables) if not cable.alive)
        self.dialled = self.rails if rails is None else rails
        self.core.dialled(self.dialled, self.now)
        self.settle()

    def join(self, index: int = 0) -> None:
        """One of the rails that are being dialled is open, or has failed; they come in any order."""
        self.to_join.rotate(-index)
        rail = self.to_join.popleft()
        self.to_join.rotate(index)
        if self.cables[rail].alive:
            self.core.rail_up(rail, self.now)
            self.settle()

    def want(self, rails: int) -> None:
        """This side finds that more rails would do."""
        self.core.want_rails(rails)
        self.settle()

    def read_wire(self, size: int) -> None:
        """Receive ``size`` bytes of the control stream, wherever message borders are."""
        data = b"".join(self.wire)
        self.wire.clear()
        if data[size:]:
            self.wire.append(data[size:])
        self.core.receive(data[:size], self.now)
        self.settle()

    def land(self, index: int, damaged: bool = False) -> None:
        """Any one of the posted writes reaches the peer: rails keep no order between them."""
        self.writes.rotate(-index)
        write, data = self.writes.popleft()
        self.writes.rotate(index)
        if self.cables[write.rail].alive:
            self.peer.place(write, data, damaged)
        self.core.written(write.notification, self.now)
        self.settle()

    def place(self, write: events.WriteChunk, data: bytes, damaged: bool = False) -> None:
        chunk = self.exposed.pop(write.notification)
        if write.notification in self.revoked:
            self.revoked.discard(write.notification)
        elif damaged and data:
            self.core.damaged(write.notification, self.now)
            self.settle()
            return
        elif data:
            place = (chunk.transfer, chunk.offset)
            self.landed[place] = self.landed.get(place, 0) + 1
            self.memory[chunk.transfer][write.remote.address : write.remote.address + len(data)] = data
        self.core.landed(write.notification, len(data), self.now)
        self.settle()

    def cut(self, rail: int) -> None:
        """The cable of a rail breaks; each side's fabric reports it some time later (see `to_break`)."""
        if rail < len(self.cables) and self.cables[rail].alive:
            self.cables[rail].alive = False
            for side in (self, self.peer):
                if side.cables is self.cables:
                    side.to_break.append(rail)

    @property
    def can_break(self) -> bool:
        """There is a broken rail to report, and it is known which rails there are."""
        return bool(self.to_break) and self.core.rail_state is RailState.UP

    def break_rail(self, rail: int) -> None:
        """This side's fabric reports a broken rail: what was posted on it is lost."""
        if rail in self.down or self.core.rail_state is not RailState.UP:
            return
        self.cables[rail].alive = False
        self.down.add(rail)
        lost = [write for write, _ in self.writes if write.rail == rail]
        self.writes = deque((write, data) for write, data in self.writes if write.rail != rail)
        for write in lost:
            self.core.written(write.notification, self.now)
        self.core.rail_down(rail, "broken by the test", self.now)
        self.settle()

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.core.check(self.now)
        self.settle()


def make_pair(limits: ChannelLimits = LIMITS, rails: int = 2, **fields) -> tuple[Side, Side]:
    """``fields``: of the HELLO of both."""
    active, passive = Side(Role.ACTIVE, limits, rails, **fields), Side(Role.PASSIVE, limits, rails, **fields)
    active.peer, passive.peer = passive, active
    return active, passive


def open_pair(limits: ChannelLimits = LIMITS, rails: int = 2, **fields) -> tuple[Side, Side]:
    active, passive = make_pair(limits, rails, **fields)
    active.settle()
    passive.read_wire(1 << 20)
    active.read_wire(1 << 20)
    active.dial()
    passive.read_wire(1 << 20)
    assert active.core.state is passive.core.state is Phase.OPEN
    return active, passive


def run_to_end(*sides: Side) -> None:
    """Deliver everything that is under way, in order, until nothing moves any more."""
    for _ in range(10_000):
        if not any(take_step(side) for side in sides):
            if all(side.core.timeout(side.now) is None for side in sides):
                return
            for side in sides:
                side.tick(1.0)
    raise AssertionError("the conversation does not end")


def take_step(side: Side) -> bool:
    if side.wire:
        side.read_wire(1 << 20)
    elif side.to_dial:
        side.dial()
    elif side.to_join:
        side.join()
    elif side.offered:
        side.take_memory()
    elif side.writes:
        side.land(0)
    elif side.can_break:
        side.break_rail(side.to_break.popleft())
    else:
        return False
    return True
