from __future__ import annotations

import ctypes
import errno
import mmap
import os

import pytest

from nvflare_rdma.fabric.shm import process_memory
from nvflare_rdma.fabric.shm.process_memory import address_of, map_shared, read_into, sealed_memory


def test_a_copy_that_the_kernel_does_in_pieces_is_complete(monkeypatch):
    whole = process_memory._readv

    def piecewise(pid, local, n, remote, m, flags):
        for vector in (local, remote):
            vector._obj.length = min(vector._obj.length, 1000)
        return whole(pid, local, n, remote, m, flags)

    monkeypatch.setattr(process_memory, "_readv", piecewise)
    source, target = bytearray(os.urandom(4321)), bytearray(4321)
    read_into(os.getpid(), address_of(memoryview(source)), memoryview(target))
    assert target == source


def test_a_copy_that_meets_unmapped_memory_is_an_error():
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as pages:
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), mmap.PAGESIZE, 0)
        target = memoryview(bytearray(2 * mmap.PAGESIZE))
        read_into(os.getpid(), address, target[: mmap.PAGESIZE])
        with pytest.raises(OSError, match="Bad address"):
            read_into(os.getpid(), address, target)


def test_a_process_that_is_gone_is_named_by_the_error():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(OSError, match="No such process") as caught:
        read_into(pid, 4096, memoryview(bytearray(1)))
    assert caught.value.errno == errno.ESRCH


def test_sealed_memory_can_not_change_its_size_and_is_shared():
    fd = sealed_memory(4096)
    memory = map_shared(fd, 4096)
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.pwrite(fd, b"hello", 0)
    os.close(fd)
    assert memory[:5].tobytes() == b"hello"


def reserve(nbytes: int) -> None:
    fd = sealed_memory(nbytes)  # vm.overcommit_memory decides whether this or the mapping refuses
    try:
        map_shared(fd, nbytes)
    finally:
        os.close(fd)


def test_more_memory_than_there_can_be_is_refused():
    with pytest.raises(MemoryError, match="shared memory"):
        reserve(1 << 50)
