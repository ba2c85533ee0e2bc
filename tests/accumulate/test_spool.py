"""A file without a name: it takes what fits and leaves as much free, and gives what was written."""

from __future__ import annotations

import errno
import gc
import os
import resource

import numpy as np
import pytest

from nvflare_rdma.accumulate import DiskRoom, Plain, Spool


def spool(folder):
    return Spool(DiskRoom(), "site-1", str(folder))


def test_tensors_lie_one_after_the_other(tmp_path):
    made = spool(tmp_path)
    first, second = made.reserve(10), made.reserve(6)
    second.write(0, memoryview(b"second"))
    first.write(4, memoryview(b"4 to 9"))
    first.write(0, memoryview(b"0123"))
    assert bytes(first.read(0, 10)) == b"01234 to 9"
    assert bytes(second.read(2, 4)) == b"cond"
    assert os.listdir(tmp_path) == []  # it has no name


def test_what_would_fill_the_disk_is_refused(tmp_path):
    disk = os.statvfs(tmp_path)
    made = spool(tmp_path)
    with pytest.raises(OSError, match="No space left") as refused:
        made.reserve(disk.f_bavail * disk.f_frsize // 2)
    assert refused.value.errno == errno.ENOSPC
    made.reserve(10).write(0, memoryview(b"0123456789"))  # what is smaller has its place all the same


def test_all_sites_take_half_of_the_disk_and_one_of_them_half_of_that():
    room, free = DiskRoom(), 1000
    for _ in range(25):  # in small parts as well as in a large one
        room.take("site-1", 10, free)
        free -= 10
    with pytest.raises(OSError, match="No space left"):
        room.take("site-1", 10, free)
    room.take("site-2", 250, free)
    with pytest.raises(OSError, match="No space left"):
        room.take("site-3", 1, free - 250)
    room.give_back("site-1", 250)
    room.take("site-3", 250, 750)


def test_what_is_gone_has_given_its_room_back(tmp_path):
    room, free = DiskRoom(), os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    kept = Spool(room, "site-1", str(tmp_path)).reserve(1 << 20)
    with pytest.raises(OSError, match="No space left"):
        room.take("site-1", free // 4, free)
    del kept
    gc.collect()
    room.take("site-1", free // 4, free)


def test_what_the_disk_refuses_is_not_counted(tmp_path):
    room = DiskRoom()
    made = Spool(room, "site-1", str(tmp_path))
    made.reserve(1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            made.reserve(10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert room.taken == 1000
    place = made.reserve(10_000)
    place.write(0, memoryview(b"x" * 10_000))
    assert bytes(place.read(9_999, 1)) == b"x"


def test_a_folder_that_is_not_there_is_said_when_something_comes(tmp_path):
    made = spool(tmp_path / "gone")
    with pytest.raises(OSError, match="gone"):
        made.reserve(10)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 0x3E00), ("bfloat16", 0x3FC0)])
def test_16_bits_are_decoded_to_float32_as_well(tmp_path, dtype, bits):
    place = spool(tmp_path).reserve(2000)
    place.write(0, memoryview(np.full(1000, bits, np.uint16)).cast("B"))
    values, own = (
        np.empty(500, np.float32),
        np.empty(500, np.uint16).view({"float16": np.float16}.get(dtype, np.uint16)),
    )
    plain = Plain(1000, dtype, place)
    plain.decode(500, values)
    plain.decode(0, own)
    assert np.all(values == 1.5)
    assert np.all(own.view(np.uint16) == bits)
    assert (plain.nbytes, plain.nbytes_on_disk) == (0, 2000)
