"""FLARE's own blob code with the buffer that the driver gives it."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
from nvflare.fuel.f3.streaming import blob_streamer
from nvflare.fuel.f3.streaming.stream_types import BlobSizeError, StreamError, StreamFuture

from nvflare_rdma.driver.blob_memory import HugePageBlobTask, use_huge_pages
from nvflare_rdma.fabric.slots import HUGE_PAGE_BYTES
from nvflare_rdma.runtime import shared

CHUNK = 1 << 20


@pytest.fixture(autouse=True)
def _with_huge_pages(monkeypatch):
    monkeypatch.setattr(blob_streamer, "BlobTask", blob_streamer.BlobTask)
    use_huge_pages()


def receive(data: bytes, **options) -> StreamFuture:
    """What FLARE makes of a stream that brings ``data``."""
    handler = blob_streamer.BlobHandler(lambda future: None)
    handler.chunk_size = CHUNK
    future = StreamFuture(1, {})
    task = blob_streamer.BlobTask(future, blob_streamer.BlobStream(data, {}), **options)
    handler._read_stream(task)
    return future


def pattern(size: int) -> bytes:
    return np.arange(-(-size // 8), dtype=np.uint64).tobytes()[:size]


@pytest.mark.parametrize("size", [1, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, 5 * CHUNK + 3])
def test_a_blob_arrives_as_it_was_sent(size):
    result = receive(pattern(size)).result(timeout=60)
    assert isinstance(result, memoryview)
    assert result == pattern(size)
    assert not result.readonly


def test_the_next_blob_of_that_size_uses_the_memory_again_once_nobody_has_it():
    size = 5 * CHUNK

    def address(view: memoryview) -> int:
        return np.frombuffer(view, np.uint8).__array_interface__["data"][0]

    first = receive(pattern(size)).result(timeout=60)
    kept = first[7:9]
    where = address(first)
    del first
    gc.collect()
    second = receive(bytes(size)).result(timeout=60)
    assert address(second) != where
    assert kept == pattern(size)[7:9]
    del kept
    gc.collect()
    assert address(receive(bytes(size)).result(timeout=60)) == where


def test_a_blob_that_is_announced_and_does_not_come_keeps_no_memory_of_others():
    pool = shared().blob_memory
    pool.clear()
    before = pool._busiest
    announced = int(before) + (64 << 20)
    future = StreamFuture(1, {})
    task = blob_streamer.BlobTask(future, SimpleNamespace(get_size=lambda: announced))
    future.set_exception(StreamError("the peer has gone"))
    assert len(task.buffer) == announced
    del task, future
    gc.collect()
    assert pool._busiest == before
    receive(pattern(5 * CHUNK)).result(timeout=60)
    assert pool._busiest == max(before, pool.cost(5 * CHUNK))


def test_flares_own_limits_hold():
    with pytest.raises(BlobSizeError):
        receive(bytes(3 * CHUNK), max_size=CHUNK)
    chunks = receive(pattern(3 * CHUNK), preserve_chunks=True).result(timeout=60)
    assert not isinstance(chunks, memoryview)  # FLARE's list of chunks
    assert blob_streamer.BlobTask is HugePageBlobTask
