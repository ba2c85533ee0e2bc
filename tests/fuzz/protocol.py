"""Fuzz targets: what comes on the control stream."""

from __future__ import annotations

import random
import struct
from collections import deque
from types import SimpleNamespace

import msgpack

from nvflare_rdma.channel.protocol import ChannelLimits, Phase, Role, events, wire
from nvflare_rdma.errors import ProtocolError, TransferError
from nvflare_rdma.fabric import RemoteSlice
from tests.fuzz.inputs import INTEGERS, change_one, damage, packable
from tests.fuzz.target import Show, target
from tests.support.core_pair import Side

_HELLO = {
    "version": wire.VERSION,
    "fabrics": {"tcp": ""},
    "max_message_bytes": 1 << 20,
    "inline_bytes": 100,
    "max_writes": 4,
    "seal_key": b"",
    "host": "",
    "integrity": "auto",
}
#: So small that all of them bite.
_LIMITS = ChannelLimits(max_message_bytes=1 << 20, inline_bytes=100, peer_chunk_bytes=1, max_incoming=5, max_writes=4)


def _message(rng: random.Random) -> wire.Message:
    """Any message, mostly such as could be meant."""
    word = (1 << 64) - 1

    def number() -> int:
        return rng.choice((0, 1, 1, 2, 2, 3, rng.choice(INTEGERS) & word))

    def length() -> int:
        return rng.choice((0, 1, 100, 101, 1000, 3000, 5000, 65536, 1 << 20))

    def small() -> int:
        return rng.choice((0, 1, 1, 2, 3, 5, rng.choice(INTEGERS) & 0xFFFFFFFF))

    granted = length()
    slice_length = rng.choice((granted, granted, granted, length()))
    return rng.choice(
        (
            lambda: wire.Hello(
                {"tcp": ""}, length(), length(), rng.choice((1, 3, 1 << 40)), rng.choice((b"", bytes(32)))
            ),
            lambda: wire.Open(rng.choice(("tcp", "", "shm", "x")), {"tickets": [bytes(32)]}, rng.random() < 0.5),
            lambda: wire.Rails(rng.choice((0, 1, 2, 64, 65, 1 << 40)), "x"),
            lambda: wire.RailDown(small(), "x"),
            lambda: wire.RailUp(small()),
            lambda: wire.MoreRails(small()),
            lambda: wire.Reopen("x"),
            lambda: wire.Inline(bytes(rng.choice((0, 1, 100, 101)))),
            lambda: wire.Offer(number(), length(), rng.choice((0, 0, 7))),
            lambda: wire.Offer(number(), length(), 0),
            lambda: wire.Grant(
                number(),
                rng.choice((0, 0, 1000, number())),
                granted,
                RemoteSlice(1, 0, slice_length),
                small(),
                rng.choice((0, 0, 1, 2, 255)),
            ),
            lambda: wire.Data(small(), 0, bytes(rng.choice((0, 1, 1000)))),
            lambda: wire.Done(number()),
            lambda: wire.Refuse(number(), "x"),
            lambda: wire.Withdraw(number(), "x"),
            lambda: wire.Bye(rng.choice(("", "x"))),
        )
    )()


@target(ProtocolError)
def parser(rng: random.Random, show: Show) -> None:
    """Bytes of the control stream, in any pieces."""
    data = b"".join(wire.encode(_message(rng)) for _ in range(rng.randrange(1, 5)))
    if rng.random() < 0.3:
        body = msgpack.packb(packable(change_one(rng, _HELLO)))
        data = struct.pack("!IB", len(body) + 1, rng.choice((1, 2, 3))) + body
    if rng.random() < 0.8:
        data = damage(rng, data)
    step = rng.choice((1, 3, 1000))
    show(data, step)
    made = wire.Parser(100, 1000)
    for start in range(0, len(data), step):
        for message in made.feed(data[start : start + step]):
            repr(message)
        assert len(made._buffer) <= wire.MAX_HELLO_BYTES + 5, "more is kept than the longest message has"


@target(ProtocolError, TransferError)
def connection(rng: random.Random, show: Show) -> None:
    """A peer that says anything at any time, to a connection whose link does as links do."""
    side = Side(rng.choice((Role.ACTIVE, Role.PASSIVE)), _LIMITS)
    side.peer = SimpleNamespace(wire=deque())  # type: ignore[assignment]
    core = side.core
    try:
        side.settle()
        for message in _greetings(rng, side):
            show("it says", message)
            core.receive(wire.encode(message), side.now)
            side.settle()
        for _ in range(rng.randrange(40)):
            if core.state is Phase.CLOSED:
                break
            _step(rng, side, show)
            side.settle()
            assert core._incoming._in_flight >= 0
            assert all(load.nbytes >= 0 for load in core._incoming._loads._rails.values())
        assert all(not message.strip(b"\1") for message in side.received), "a message was whole before it was here"
    finally:
        core.close("the case is over")
        side.settle()
        assert not core._incoming._transfers, "it still receives"
        assert not core._outgoing._transfers, "it still sends"


def _greetings(rng: random.Random, side: Side) -> list[wire.Message]:
    """What a peer says to open a connection; sometimes not all of it."""
    hello = wire.Hello({"tcp": ""}, 1 << 20, 100, 4)
    if side.core.role is Role.ACTIVE:
        said: list[wire.Message] = [hello, wire.Open(rng.choice(("tcp", "tcp", "")), {})]
    else:
        said = [hello, wire.Rails(rng.choice((1, 2)))]
    return said if rng.random() < 0.9 else said[: rng.randrange(2)]


def _step(rng: random.Random, side: Side, show: Show) -> None:
    core = side.core
    match rng.randrange(21):
        case 0 | 1 | 2 | 3:
            message = _message(rng)
            if isinstance(message, wire.Bye | wire.Hello | wire.Rails | wire.Open) and rng.random() < 0.8:
                return
            show("it says", message)
            core.receive(wire.encode(message), side.now)
        case 4 | 17 if side.offered:
            show("memory for", side.offered[0])
            side.take_memory()
        case 13 | 14 if core._outgoing._transfers:
            message = _grant(rng, side)
            show("it says", message)
            core.receive(wire.encode(message), side.now)
        case 15 if core._outgoing._transfers:
            transfer = rng.choice(list(core._outgoing._transfers))
            message = rng.choice((wire.Done(transfer), wire.Refuse(transfer, "x")))
            show("it says", message)
            core.receive(wire.encode(message), side.now)
        case 5 | 16 if core.state is Phase.OPEN:
            length = rng.choice((50, 101, 5000))
            show("sending", length)
            side.send(bytes(length))
        case 6 | 7 | 18 | 19 if side.exposed:
            _land(rng, side, show)
        case 8 if side.writes:
            write, _ = side.writes[rng.randrange(len(side.writes))]
            side.writes = deque(entry for entry in side.writes if entry[0] is not write)
            show("written", write)
            core.written(write.notification, side.now)
        case 9:
            rail = rng.randrange(3)
            show("broken", rail)
            if rail < len(side.cables):
                side.break_rail(rail)
        case 10 if side.to_dial:
            show("dialled")
            side.to_dial.popleft()
            core.dialled(rng.choice((0, 1, 2)), side.now)
        case 11:
            seconds = rng.choice((0.0, 0.1, 1.0, 40.0))
            show("later", seconds)
            side.tick(seconds)
        case 20 if side.sources:
            show("withdrawn")
            core.withdraw(rng.choice(list(side.sources)), "x")
        case 12 if side.memory:
            show("refused")
            core.refuse(rng.choice(list(side.memory)), "x")


def _grant(rng: random.Random, side: Side) -> wire.Grant:
    """What a receiver would grant next of a message that it is sent, more or less."""
    outgoing = side.core._outgoing
    transfer, message = rng.choice(list(outgoing._transfers.items()))
    left = message.length - message.granted
    length = rng.choice((left, left, min(left, 1000), 1000))
    offset = rng.choice((message.granted, message.granted, message.granted, 0, 1000))
    notification = (outgoing._last_notification + rng.choice((1, 1, 1, 1, 0, 1 << 31))) & 0xFFFFFFFF
    return wire.Grant(transfer, offset, length, RemoteSlice(1, 0, length), notification, rng.choice((0, 0, 1)))


def _land(rng: random.Random, side: Side, show: Show) -> None:
    chunk = side.exposed[rng.choice(list(side.exposed))]
    length = rng.choice((chunk.length, chunk.length, chunk.length, 0, 1))
    show("landed", chunk, length)
    remote = RemoteSlice(1, chunk.offset, chunk.length)
    write = events.WriteChunk(chunk.transfer, chunk.offset, length, remote, chunk.notification, chunk.rail)
    side.place(write, b"\1" * length, damaged=rng.random() < 0.2)
