"""What a rail's queue holds: the bytes of a chunk are made when its turn comes, or not at all."""

from __future__ import annotations

import threading
import time
import weakref

import pytest

from nvflare_rdma.channel import sealing
from nvflare_rdma.channel.bodies import BufferSource, Source
from nvflare_rdma.channel.outbox import Outbox
from nvflare_rdma.channel.protocol.events import WriteChunk
from nvflare_rdma.channel.rails import RailSet
from nvflare_rdma.errors import TransferError
from nvflare_rdma.fabric import RailPlaces, RemoteSlice

MESSAGE = b"message" * 1000
CHUNK = WriteChunk(1, 100, 1000, RemoteSlice(1, 0, 1000), 7, 0)
NOTHING = (memoryview(b""), 0)


class Case:
    """An outbox with one message that is being sent over some rails."""

    def __init__(self, source: Source | None = None) -> None:
        self.lock = threading.Lock()
        self.withdrawn: list[tuple[int, str]] = []
        take = lambda nbytes: memoryview(bytearray(nbytes))  # noqa: E731
        room = threading.Condition(self.lock)
        self.outbox = Outbox(self.lock, room, 1 << 20, take, lambda *given_up: self.withdrawn.append(given_up), "link")
        self.sending = self.outbox.add(1, source or BufferSource(memoryview(MESSAGE)))
        self.rails = RailSet(None, RailPlaces(), "")
        self.make = self.make_chunk()

    def make_chunk(self):
        with self.lock:
            return self.outbox.make_chunk(self.rails, CHUNK)


def test_a_chunk_in_a_queue_is_no_read_and_one_that_is_made_is_until_it_is_written():
    it = Case()
    assert it.sending.reads == 0
    assert it.make() == (memoryview(MESSAGE)[100:1100], 0)
    assert it.sending.reads == 1
    with it.lock:
        it.outbox.read_ended(it.rails, CHUNK.notification)
    assert it.sending.reads == 0


def test_a_write_is_under_way_from_when_its_chunk_is_made():
    it = Case()
    with it.lock:
        assert it.outbox.slow_rails(time.monotonic(), 0.0) == set()
    began = time.monotonic()
    it.make()
    with it.lock:
        assert it.outbox.slow_rails(began, 1.0) == set()
        assert it.outbox.slow_rails(time.monotonic(), 0.0) == {(it.rails, CHUNK.rail)}
        it.outbox.read_ended(it.rails, CHUNK.notification)
        assert it.outbox.slow_rails(time.monotonic(), 0.0) == set()


def test_no_read_stays_counted_when_rails_are_closed():
    it = Case()
    it.make()
    it.make_chunk()  # queued, and never made
    with it.lock:
        it.outbox.finish(1, "gone")
        assert not it.sending.ended
        it.outbox.rails_closed(it.rails)
    assert it.sending.ended
    with pytest.raises(TransferError, match="gone"):
        it.sending.wait(0)


def test_a_message_that_is_given_up_is_not_read_any_more():
    it = Case()
    with it.lock:
        it.outbox.finish(1, "changed its mind")
    for make in (it.make, it.make_chunk()):
        assert make() == NOTHING
    assert it.sending.ended


def test_a_queued_chunk_keeps_no_message_alive_that_is_over():
    source = BufferSource(memoryview(MESSAGE))
    it, alive = Case(source), weakref.ref(source)
    del source
    make = it.make_chunk()
    with it.lock:
        it.outbox.finish(1, "given up")
    assert alive() is None
    assert make() == NOTHING


def test_nothing_is_made_for_rails_that_are_replaced():
    it = Case()
    it.rails.void = True
    assert it.make() == NOTHING
    assert it.sending.reads == 0


def test_a_chunk_is_protected_as_its_rails_were_agreed():
    """Those that follow may go without: nothing that is queued may go out in clear over these."""
    it, key = Case(), sealing.new_key()
    with it.lock:
        it.outbox.set_protection(sealing.Sealer(key), False)
    make = it.make_chunk()
    with it.lock:
        it.outbox.set_protection(None, False)
    sealed, _ = make()
    plain = memoryview(bytearray(CHUNK.length))
    sealing.Sealer(key).open_into(CHUNK.transfer, CHUNK.offset, CHUNK.notification, sealed, plain)
    assert plain == MESSAGE[100:1100]


def test_a_message_that_can_not_be_read_is_withdrawn_and_its_read_ends_with_its_write():
    class Broken(Source):
        nbytes = len(MESSAGE)

        def read(self, offset, length, take):
            raise OSError("the disk is gone")

    it = Case(Broken())
    assert it.make() == NOTHING
    assert it.withdrawn == [(1, "the sender can't read it: the disk is gone")]
    assert it.sending.reads == 1
    with it.lock:
        it.outbox.read_ended(it.rails, CHUNK.notification)
    assert it.sending.reads == 0
