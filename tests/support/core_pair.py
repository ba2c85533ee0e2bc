"""Two channel cores joined by lists: no sockets, threads or clocks. The test decides what happens when."""

from __future__ import annotations

from collections import deque

from nvflare_rdma.channel import events, wire
from nvflare_rdma.channel.core import Channel, ChannelLimits
from nvflare_rdma.channel.state import Phase, Role
from nvflare_rdma.fabric.base import RemoteSlice

LIMITS = ChannelLimits(max_message_bytes=1 << 20, chunk_bytes=1000, depth=3, inline_bytes=100, peer_chunk_bytes=1)


class Side:
    """A core with the memory, and the scripted fabric, that a link would give it."""

    def __init__(self, role: Role, limits: ChannelLimits = LIMITS) -> None:
        hello = wire.Hello({"tcp": ""}, limits.max_message_bytes, limits.inline_bytes)
        self.core = Channel(role, limits, hello, now=0.0)
        self.limits = limits
        self.peer: Side
        self.wire: deque[bytes] = deque()  # what the peer has sent on the control stream
        self.writes: deque[tuple[events.WriteChunk, bytes]] = deque()  # posted by this side, not landed yet
        self.memory: dict[int, bytearray] = {}
        self.exposed: dict[int, tuple[int, events.ExposeChunk]] = {}
        self.sources: dict[int, bytes] = {}
        self.received: list[bytes] = []
        self.inline: list[bytes] = []
        self.sent: list[int] = []
        self.failed: list[str] = []
        self.offered: deque[events.MessageOffered] = deque()
        self.peak_granted = 0

    def send(self, data: bytes) -> None:
        if self.core.fits_inline(len(data)):
            self.core.send_inline(data)
        else:
            self.sources[self.core.submit(len(data), now=0.0)] = data
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
                self.core.choose("tcp", {})
            case events.OpenRails():
                self.core.dialled(1)
            case events.MessageOffered():
                self.offered.append(event)
            case events.ExposeChunk():
                self.exposed[event.notification] = (event.transfer, event)
                self.core.exposed(event, RemoteSlice(1, event.offset, event.length))
                in_flight = sum(chunk.length for _, chunk in self.exposed.values())
                self.peak_granted = max(self.peak_granted, in_flight)
            case events.WriteChunk():
                data = self.sources[event.transfer][event.offset : event.offset + event.length]
                self.writes.append((event, data))
            case events.InlineReceived(payload):
                self.inline.append(payload)
            case events.MessageReceived(transfer):
                self.received.append(bytes(self.memory.pop(transfer)))
            case events.MessageSent(transfer):
                self.sent.append(transfer)
            case events.SendFailed(_, reason) | events.ReceiveFailed(_, reason):
                self.failed.append(reason)

    # -- single steps a test may take in any order ---------------------------------------------------------

    def take_memory(self) -> None:
        """Grant the oldest offer its memory."""
        offer = self.offered.popleft()
        self.memory[offer.transfer] = bytearray(offer.length)
        self.core.accept(offer.transfer, now=0.0)
        self.settle()

    def read_wire(self, size: int) -> None:
        """Receive ``size`` bytes of the control stream, wherever message borders are."""
        data = b"".join(self.wire)
        self.wire.clear()
        if data[size:]:
            self.wire.append(data[size:])
        self.core.receive(data[:size], now=0.0)
        self.settle()

    def land(self, index: int) -> None:
        """Any one of the posted writes reaches the peer: rails keep no order between them."""
        self.writes.rotate(-index)
        write, data = self.writes.popleft()
        self.writes.rotate(index)
        self.peer.place(write, data)
        self.core.written(write.notification, now=0.0)
        self.settle()

    def place(self, write: events.WriteChunk, data: bytes) -> None:
        transfer, _ = self.exposed.pop(write.notification)
        self.memory[transfer][write.remote.address : write.remote.address + len(data)] = data
        self.core.landed(write.notification, len(data), now=0.0)
        self.settle()


def make_pair(limits: ChannelLimits = LIMITS) -> tuple[Side, Side]:
    active, passive = Side(Role.ACTIVE, limits), Side(Role.PASSIVE, limits)
    active.peer, passive.peer = passive, active
    return active, passive


def open_pair(limits: ChannelLimits = LIMITS) -> tuple[Side, Side]:
    active, passive = make_pair(limits)
    active.settle()
    for side in (passive, active, passive):
        side.read_wire(1 << 20)
    assert active.core.state is passive.core.state is Phase.OPEN
    return active, passive


def run_to_end(*sides: Side) -> None:
    """Deliver everything that is under way, in order."""
    while True:
        if not any(side.wire or side.writes or side.offered for side in sides):
            return
        for side in sides:
            while side.wire:
                side.read_wire(1 << 20)
            while side.offered:
                side.take_memory()
            while side.writes:
                side.land(0)
