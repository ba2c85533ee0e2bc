"""Files from cell to cell: a `FileContent` and `pull_file`, joined by a function call where FLARE's messages are."""

from __future__ import annotations

import os
import threading

import pytest

from nvflare_rdma.errors import FabricUnavailable, IntegrityError, ProtocolError, StorageError, TransferError
from nvflare_rdma.transfer import receiver
from nvflare_rdma.transfer.files.partial_file import PartialFile
from nvflare_rdma.transfer.files.source import BLOCK_BYTES, PartDigests
from nvflare_rdma.transfer.files.transfer import FileContent, pull_file
from nvflare_rdma.transfer.manifest import Item, pack
from nvflare_rdma.transfer.receiver import AbortedError, LostError
from tests.support.file_transfers import PART
from tests.support.tcp_pair import DEADLINE, in_parallel


def content(parts: float) -> bytes:
    return os.urandom(int(parts * PART))


@pytest.mark.parametrize("fabrics", [("tcp",), ("shm", "tcp")], ids=["tcp", "shm"])
@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK_BYTES, BLOCK_BYTES + 1, PART, 3 * PART, 3 * PART - 1, 3 * PART + 1])
def test_files_of_all_sizes(size, fabrics, files, cell):
    it, site = files(os.urandom(size), fabrics=fabrics), cell("site-1", fabrics=fabrics)
    path = it.pull(site)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert it.asked() == ([list(range(-(-size // PART)))] if size else [])
    assert sorted(n for asked in it.asked("digests") for n in asked) == list(range(-(-size // PART)))
    assert it.service.has_served("site-1")


def test_a_file_in_the_smallest_budget(files, cell):
    it = files(os.urandom(6 << 20), fabrics=("tcp",), budget=1 << 20)
    site = cell("site-1", fabrics=("tcp",), budget=1 << 20)
    it.pull(site)
    for side in (it.channels, site):
        context = side._shared.context
        assert 0 < context.pool._busiest <= 1 << 20
        assert context.budget.peak <= context.budget.limit


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_three_receivers_at_once_into_one_folder(files, cell):
    it = files(content(4.3))
    sites = [cell(f"site-{i}", ports=None) for i in range(3)]
    paths = [it.folder / f"whole-{site.name}" for site in sites]
    in_parallel(
        *(
            lambda site=site, path=path: pull_file(site, "server", it.ask(site.name), it.target(site, path))
            for site, path in zip(sites, paths, strict=True)
        )
    )
    assert all(path.read_bytes() == it.content for path in paths)
    assert len(list(it.folder.iterdir())) == 3


def test_an_interrupted_transfer_goes_on_from_what_is_there(files, cell):
    it, site = files(content(8)), cell("site-1")
    stop = threading.Event()
    read = it.file.read_into
    # The last part does not come before the transfer is aborted.
    it.file.read_into = lambda memory, at: (at < 7 * PART or stop.wait(DEADLINE)) and read(memory, at)
    with pytest.raises(AbortedError):
        it.pull(site, aborted=lambda: bool(it.asked("digests")))
    stop.set()
    assert len(list(it.folder.iterdir())) == 2
    taken = next(it.folder.glob(".*.rdma-part")).stat().st_blocks * 512
    found = it.partial(site.name)
    there = set(found.whole)
    assert there
    assert taken // PART == len(there)  # nothing is kept for what is not there
    found.keep()
    it.requests.clear()
    it.open()  # also the sender begins anew
    it.pull(site)
    assert it.asked() == [sorted(set(range(8)) - there)]


@pytest.mark.parametrize("lost", [False, True])
def test_what_was_here_is_compared_with_what_the_sender_has(lost, files, cell, monkeypatch):
    it, site = files(content(5)), cell("site-1")
    found = it.partial(site.name)
    for part in (0, 1, 3):
        data = memoryview(it.content)[part * PART : (part + 1) * PART]
        digests = PartDigests(PART)
        digests.add(0, data)
        found.write(part, 0, data)
        found.add(part, digests.whole(), digests.whole())
    found.keep()
    with open(it.source, "r+b") as file:  # where no sample is
        file.seek(PART + 100_000)
        file.write(bytes(1000))
    it.content = it.source.read_bytes()
    os.utime(it.source, ns=(it.file.identity.mtime_ns, it.file.identity.mtime_ns))
    announced = it.file.identity
    it.open()
    assert it.file.identity == announced

    def ask(request: dict) -> dict:
        if lost and request["do"] == "compare":
            raise LostError("no answer")
        return it.ask(site.name)(request)

    it.pull(site, ask)
    assert it.asked() == [[0, 1, 2, 3, 4] if lost else [1, 2, 4]]


def test_what_is_aborted_at_the_very_end_does_not_appear(files, cell):
    it, site, gone = files(content(1)), cell("site-1"), threading.Event()

    def ask(request: dict) -> dict:
        answer = it.ask(site.name)(request)
        if request["do"] == "digests":
            gone.set()
        return answer

    with pytest.raises(AbortedError):
        it.pull(site, ask, aborted=gone.is_set)
    assert not (it.folder / "whole").exists()


def test_a_channel_that_breaks_is_opened_again(files, cell):
    it, site = files(content(8)), cell("site-1", ports=None)
    broken = []

    def ask(request: dict) -> dict:
        if request["do"] == "digests" and not broken:
            broken.append(site.find("server").close(0.0))
        return it.ask("site-1")(request)

    it.pull(site, ask)
    assert len(broken) == 1


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_source_that_changes_is_an_error_that_names_it(when, files, cell):
    it, site = files(content(4)), cell("site-1")
    read = it.file.read_into

    def change(memory: memoryview, at: int) -> None:
        os.utime(it.source, ns=(1, 1))
        read(memory, at)

    if when == "before":
        os.utime(it.source, ns=(1, 1))
    else:
        it.file.read_into = change
    with pytest.raises(TransferError, match=f"{it.source} changed while it was sent"):
        it.pull(site)
    assert it.file.broken.startswith(f"{it.source} changed while it was sent")
    assert not list(it.folder.iterdir())
    if when == "during":
        assert site.find("server") is not None  # the channel serves others


def test_a_source_that_reads_differently_the_second_time(files, cell):
    it, site = files(content(1)), cell("site-1", ports=None)
    it.sent.parts["0"].source(True).read(0, BLOCK_BYTES, lambda n: memoryview(bytearray(n)))
    with open(it.source, "r+b") as file:
        file.write(b"\0" * 64)
    os.utime(it.source, ns=(it.file.identity.mtime_ns, it.file.identity.mtime_ns))
    with pytest.raises(TransferError, match="it reads differently the second time"):
        it.pull(site)


def test_a_source_that_can_not_be_read(files, cell, monkeypatch):
    it, site = files(content(2)), cell("site-1")

    def fail(*args) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(TransferError, match=rf"{it.source} can't be read at .*Input/output error"):
        it.pull(site)
    assert not list(it.folder.iterdir())


def test_a_disk_that_refuses_is_told_at_once(files, cell, monkeypatch):
    it, site = files(content(4)), cell("site-1")
    write, calls = os.pwrite, []

    def full(*args) -> int:
        calls.append(args)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=rf"model.bin can't be kept in {it.folder}: it needs {4 * PART} bytes"):
        it.pull(site)
    assert not list(it.folder.iterdir())
    assert len(it.asked()) == 1  # no second attempt


def test_too_little_room_is_told_before_anything_is_sent(files, cell, monkeypatch):
    monkeypatch.setattr(PartialFile, "_free", lambda self: 1000)
    it, site = files(content(2)), cell("site-1")
    with pytest.raises(StorageError, match=rf"model.bin can't .* needs {2 * PART} bytes, 1000 bytes are free there"):
        it.pull(site)
    assert not list(it.folder.iterdir())
    assert not it.asked()


def test_no_direct_way_leaves_nothing(files, cell):
    it = files(content(1), ports=None)
    with pytest.raises(FabricUnavailable):
        it.pull(cell("site-1", ports=None))
    assert not list(it.folder.iterdir())


# -- hostile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", [b"0" * 16, None, "x", b""])
def test_digests_that_differ(digest, files, cell):
    it, site = files(content(2)), cell("site-1")

    def ask(request: dict) -> dict:
        answer = it.ask("site-1")(request)
        return {"digests": [digest for _ in answer["digests"]]} if request["do"] == "digests" else answer

    with pytest.raises(IntegrityError, match=r"part \d of model.bin differs from what server has read"):
        it.pull(site, ask)
    assert not list(it.folder.iterdir())


@pytest.mark.parametrize(
    "lie",
    [
        {"file": None},
        {"file": {"name": "../../etc/passwd"}},
        {"manifest": pack([Item("0", False, "uint8", (1 << 40,))])},
        {"manifest": pack([Item("0", False, "uint8", (PART,))])},
        {"manifest": pack([Item("0", False, "uint8", (PART,)), Item("1", False, "int8", (PART,))])},
        {"manifest": pack([])},
        {"digests": []},
        {"digests": 5},
    ],
    ids=str,
)
def test_answers_that_lie(lie, files, cell):
    it, site = files(content(2)), cell("site-1")

    def ask(request: dict) -> dict:
        answer = it.ask("site-1")(request)
        return {key: lie.get(key, value) for key, value in answer.items()}

    with pytest.raises(ProtocolError):
        it.pull(site, ask)
    assert not list(it.folder.iterdir())


@pytest.mark.parametrize("change", [{"size": 1 << 30}, {"name": "other"}, {"mtime_ns": 0}, {"part_bytes": BLOCK_BYTES}])
def test_another_file_than_was_announced(change, files, cell):
    it, site = files(content(2)), cell("site-1")

    def ask(request: dict) -> dict:
        answer = it.ask("site-1")(request)
        return {**answer, "file": {**answer["file"], **change}} if "file" in answer else answer

    with pytest.raises(ProtocolError, match="server announced"):
        it.pull(site, ask)


@pytest.mark.parametrize("wanted", [None, [5], [-1], ["x"], [None], "0 1"])
def test_requests_for_digests_of_what_is_not_there(wanted, files):
    it = files(content(2))
    for what in ("digests", "compare"):
        assert "refused" in it.ask("site-1")({"do": what, "items": wanted})


def test_one_request_of_a_site_at_a_time_reads_what_is_on_disk(files, monkeypatch):
    """Each keeps a thread that FLARE has for all sites."""
    it, going, began = files(content(2)), threading.Event(), threading.Event()

    def digest(self, part):
        began.set()
        assert going.wait(DEADLINE)
        return b"digest"

    monkeypatch.setattr(FileContent, "_digest", digest)
    answers: list[dict] = []
    request = {"do": "compare", "items": [0]}
    first = threading.Thread(target=lambda: answers.append(it.ask("site-1.job")(request)), daemon=True)
    first.start()
    assert began.wait(DEADLINE)
    for _ in range(5):
        assert "is still being answered" in it.ask("site-1.other")(request)["refused"]
    going.set()
    first.join(DEADLINE)
    assert answers == [{"digests": [b"digest"]}]
    assert it.ask("site-1.job")(request) == {"digests": [b"digest"]}


def test_digests_of_what_was_not_read(files):
    assert files(content(2)).ask("site-1")({"do": "digests", "items": [0, 1]}) == {"digests": [None, None]}


def test_pieces_of_blocks_have_no_digest(files):
    it = files(content(1))
    source = it.sent.parts["0"].source(True)
    for start in range(0, PART, BLOCK_BYTES // 2):
        source.read(start, BLOCK_BYTES // 2, lambda n: memoryview(bytearray(n)))
    assert source.digests.whole() is None


def test_nothing_comes(files, cell, monkeypatch):
    monkeypatch.setattr(receiver, "_LOOK_SECONDS", 0.01)
    it, site = files(content(1)), cell("site-1", stall=0.05)
    it.service._send = lambda request, receiver: {}
    with pytest.raises(TransferError, match="did not come from server"):
        it.pull(site)
    assert not list(it.folder.iterdir())
