"""What is on disk of a file that is being received."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nvflare_rdma.errors import ProtocolError, SourceError, StorageError, TransferError
from nvflare_rdma.transfer.files import hidden_files, partial_file
from nvflare_rdma.transfer.files.layout import Layout, plan
from nvflare_rdma.transfer.files.partial_file import PartialFile, forget
from nvflare_rdma.transfer.files.source import BLOCK_BYTES, FileIdentity, OpenFile, PartDigests

PART = 2 * BLOCK_BYTES
CONTENT = os.urandom(BLOCK_BYTES + 5) * 5  # five blocks and a piece: three parts


def identity(**changes) -> FileIdentity:
    fields = {"name": "model.bin", "size": len(CONTENT), "mtime_ns": 5, "content": "0" * 32, "part_bytes": PART}
    return FileIdentity(**{**fields, **changes})


def partial(folder: Path, of: FileIdentity, owner: str = "", sender: str = "") -> PartialFile:
    return PartialFile(str(folder), Layout(of, [item for item, _ in plan(of)]), owner, sender)


def receive(file: PartialFile, *parts: int) -> None:
    for part in parts:
        data = memoryview(CONTENT)[part * PART : (part + 1) * PART]
        digests = PartDigests(len(data))
        for offset in (BLOCK_BYTES, 0):  # in any order
            block = data[offset : offset + BLOCK_BYTES]
            file.write(part, offset, block)
            digests.add(offset, block)
        file.add(part, digests.whole(), digests.whole())


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def interrupted(tmp_path):
    """A folder in which two parts of three are."""
    file = partial(tmp_path, identity())
    receive(file, 0, 2)
    file.keep()
    assert len(hidden(tmp_path)) == 2
    return tmp_path


def finish(folder: Path, *missing: int) -> None:
    file = partial(folder, identity())
    assert file.whole == {0, 1, 2} - set(missing)
    receive(file, *missing)
    file.finish(str(folder / "whole"))
    assert (folder / "whole").read_bytes() == CONTENT
    assert not hidden(folder)


def test_it_appears_when_it_is_whole(tmp_path):
    file = partial(tmp_path, identity())
    receive(file, 1, 0)
    with pytest.raises(TransferError, match=r"2 of 3 parts of model\.bin are here"):
        file.finish(str(tmp_path / "whole"))
    assert not (tmp_path / "whole").exists()
    receive(file, 2)
    file.finish(str(tmp_path / "whole"))
    assert (tmp_path / "whole").read_bytes() == CONTENT
    assert not hidden(tmp_path)


def test_what_is_here_is_taken_up(interrupted):
    finish(interrupted, 1)


def test_only_what_has_its_digest(interrupted):
    part = next(interrupted.glob(".*.rdma-part"))
    with open(part, "r+b") as file:
        file.seek(17)
        file.write(b"\0" if CONTENT[17] else b"\1")
    finish(interrupted, 0, 1)


@pytest.mark.parametrize(
    "tail",
    [
        b"1 0123",
        b"1 " + b"0" * 32 + b"\n",
        b"1 " + b"0" * 32 + b" " + b"0" * 32 + b"\n",
        b"99 " + b"0" * 32 + b" " + b"0" * 32 + b"\n",
        b"\xff\n",
        b"1 x y\n",
    ],
)
def test_a_journal_with_a_damaged_end(tail, interrupted):
    with open(next(interrupted.glob(".*.rdma-journal")), "ab") as file:
        file.write(tail)
    finish(interrupted, 1)


def test_a_journal_without_its_file(interrupted):
    next(interrupted.glob(".*.rdma-part")).unlink()
    finish(interrupted, 0, 1, 2)


def test_a_file_without_its_journal(interrupted):
    os.truncate(next(interrupted.glob(".*.rdma-journal")), 0)
    finish(interrupted, 0, 1, 2)


@pytest.mark.parametrize(
    "change", [{"mtime_ns": 6}, {"content": "1" * 32}, {"name": "other"}, {"size": len(CONTENT) - 1}]
)
def test_another_file_begins_anew(change, interrupted):
    file = partial(interrupted, identity(**change))
    assert not file.whole
    file.keep()  # nothing is whole: nothing is kept
    assert len(hidden(interrupted)) == 2
    finish(interrupted, 1)


def test_the_same_file_for_another_site(interrupted):
    file = partial(interrupted, identity(), "site-2")
    assert not file.whole
    file.discard()
    finish(interrupted, 1)


def test_the_same_file_from_another_site(interrupted):
    file = partial(interrupted, identity(), sender="site-2")
    assert not file.whole
    file.discard()
    forget(str(interrupted), identity(), sender="site-2")
    finish(interrupted, 1)


def test_one_that_is_about_to_end_is_waited_for(interrupted):
    first = partial(interrupted, identity())
    threading.Timer(0.1, first.keep).start()
    finish(interrupted, 1)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(partial_file, "LOCK_SECONDS", 0.0)


@pytest.mark.usefixtures("impatient")
def test_the_same_file_twice_at_once(interrupted):
    first = partial(interrupted, identity())
    second = partial(interrupted, identity())
    assert not second.whole
    receive(second, 0, 1, 2)
    second.finish(str(interrupted / "second"))
    forget(str(interrupted), identity())  # not while somebody works on it
    receive(first, 1)
    first.finish(str(interrupted / "first"))
    assert (interrupted / "first").read_bytes() == (interrupted / "second").read_bytes() == CONTENT
    assert not hidden(interrupted)


@pytest.mark.usefixtures("impatient")
def test_one_that_could_not_be_gone_on_with_is_not_kept(interrupted):
    first = partial(interrupted, identity())
    second = partial(interrupted, identity())
    receive(second, 0)
    second.keep()
    assert len(hidden(interrupted)) == 2
    first.keep()
    finish(interrupted, 1)


def test_what_nobody_takes_up_is_removed(interrupted):
    journal = next(interrupted.glob(".*.rdma-journal"))
    partial(interrupted, identity(name="a")).keep()
    assert journal.exists()
    long_ago = time.time() - hidden_files._KEEP_SECONDS - 60
    os.utime(journal, (long_ago, long_ago))
    partial(interrupted, identity(name="b")).keep()
    assert not hidden(interrupted)


def test_what_is_late_is_not_written(tmp_path):
    file = partial(tmp_path, identity())
    file.keep()
    with pytest.raises(StorageError, match=r"model\.bin is not being received any more"):
        file.write(0, 0, memoryview(b"x"))


def test_an_empty_file(tmp_path):
    file = partial(tmp_path, identity(size=0))
    file.finish(str(tmp_path / "empty"))
    assert (tmp_path / "empty").read_bytes() == b""


# -- whose files they are ------------------------------------------------------------------------------------


def _is_not_touched(folder: Path) -> None:
    before = {path.name: path.lstat() for path in folder.iterdir()}
    file = partial(folder, identity())
    assert not file.whole
    receive(file, 0, 1)
    file.keep()  # it could not be gone on with
    file = partial(folder, identity())
    receive(file, 0, 1, 2)
    file.finish(str(folder / "whole"))
    assert (folder / "whole").read_bytes() == CONTENT
    (folder / "whole").unlink()
    after = {path.name: path.lstat() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name].st_mtime_ns == found.st_mtime_ns for name, found in before.items())


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder", "another user's"])
@pytest.mark.parametrize("which", ["journal", "part"])
def test_names_that_somebody_else_has(which, kind, tmp_path):
    path, other = hidden_files.paths(tmp_path, "", identity().key(""))[which == "part"], tmp_path / "precious"
    other.write_bytes(b"precious")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "hard link":
        path.hardlink_to(other)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        if os.geteuid():
            pytest.skip("only root can give files to others")
        path.write_bytes(b"theirs")
        os.chown(path, 12345, -1)
    forget(str(tmp_path), identity())
    _is_not_touched(tmp_path)
    assert other.read_bytes() == b"precious"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def cannot(*args) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", cannot)
    forget(str(tmp_path), identity())
    _is_not_touched(tmp_path)


def test_a_forked_process_does_not_keep_the_lock(interrupted, monkeypatch):
    monkeypatch.setattr(partial_file, "LOCK_SECONDS", 0.0)
    file = partial(interrupted, identity())
    child = os.dup(file._journal)  # shares the lock as a forked child's descriptor does
    file.keep()
    try:
        finish(interrupted, 1)
    finally:
        os.close(child)


def _finish_where_folders_fail(folder: Path, monkeypatch, code: int) -> None:
    fsync = os.fsync

    def fail(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(fd)

    file = partial(folder, identity())
    receive(file, 0, 1, 2)
    monkeypatch.setattr(os, "fsync", fail)
    try:
        file.finish(str(folder / "whole"))
    finally:
        file.keep()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_folders_that_can_not_be_synced(code, tmp_path, monkeypatch):
    _finish_where_folders_fail(tmp_path, monkeypatch, code)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_folder_that_fails_has_no_file(tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="Input/output error"):
        _finish_where_folders_fail(tmp_path, monkeypatch, errno.EIO)
    assert not list(tmp_path.iterdir())


# -- disks that refuse ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_shows_before_anything_is_written(small_disk):
    with pytest.raises(StorageError) as caught:
        partial(small_disk, identity())
    assert str(caught.value).startswith(f"model.bin can't be kept in {small_disk}: it needs {len(CONTENT)} bytes, ")
    assert " bytes are free there (No space left on device)" in str(caught.value)
    assert not hidden(small_disk)


def test_a_disk_that_fills_up_meanwhile(small_disk, monkeypatch):
    monkeypatch.setattr(PartialFile, "_free", lambda self: 1 << 40)  # what was free is taken by somebody else
    file = partial(small_disk, identity())
    with pytest.raises(StorageError, match="No space left on device"):
        receive(file, 0, 1, 2)
    with pytest.raises(StorageError, match="No space left on device"):
        file.write(0, 0, memoryview(b"x"))
    file.keep()
    assert not hidden(small_disk)


def test_a_file_larger_than_files_may_be(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK_BYTES, hard))
    try:
        with pytest.raises(StorageError, match=r"which is more than a file may have here \(File too large\)"):
            partial(tmp_path, identity())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not hidden(tmp_path)


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(StorageError, match="No such file or directory"):
        partial(tmp_path / "gone", identity())


# -- how much of the disk they take ------------------------------------------------------------------------------

PARTS = 40


def large(**changes) -> FileIdentity:
    return identity(size=PARTS * PART, **changes)


def receive_noise(file: PartialFile, *parts: int) -> None:
    data = memoryview(os.urandom(PART))
    digests = PartDigests(PART)
    digests.add(0, data)
    for part in parts:
        file.write(part, 0, data)
        file.add(part, digests.whole(), digests.whole())


def taken(folder: Path) -> int:
    """How many parts would fit into what the partial files there take."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob(".*.rdma-part")) // PART


def test_the_disk_is_taken_for_what_comes(tmp_path):
    file = partial(tmp_path, large())
    receive_noise(file, 7)
    assert taken(tmp_path) == 1
    file._close()  # as the end of a process would
    assert taken(tmp_path) == 1
    assert partial(tmp_path, large()).whole == {7}


def test_what_has_not_come_is_given_back(tmp_path):
    file = partial(tmp_path, large())
    receive_noise(file, 3, 5, 6)
    for part in {*range(PARTS)} - {3, 5, 6}:  # all of these lack a little
        file.write(part, 0, memoryview(os.urandom(PART - 1)))
    assert taken(tmp_path) >= PARTS - 1
    file.keep()
    assert taken(tmp_path) == 3
    file = partial(tmp_path, large())
    assert file.whole == {3, 5, 6}
    receive_noise(file, *{*range(PARTS)} - {3, 5, 6})
    file.finish(str(tmp_path / "whole"))
    assert (tmp_path / "whole").stat().st_size == PARTS * PART


@pytest.mark.parametrize(("whole", "kept"), [((0, 1), 2), ((10,), 0), ((0, PARTS - 1), 0)])
def test_a_file_system_without_holes(whole, kept, tmp_path, monkeypatch, caplog):
    def cannot(*args) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(partial_file, "punch_hole", cannot)
    file = partial(tmp_path, large())
    for part in range(PARTS):
        file.write(part, 0, memoryview(bytes(PART - 1)))
    receive_noise(file, *whole)
    file.keep()
    assert taken(tmp_path) == kept
    assert len(hidden(tmp_path)) == (2 if kept else 0)
    assert ("is not kept: it takes" in caplog.text) == (not kept)


def test_nothing_is_said_of_what_is_kept_of_a_file_that_has_its_name(tmp_path, caplog):
    file = partial(tmp_path, identity())
    receive(file, 0, 1, 2)
    file.finish(str(tmp_path / "whole"))
    file.keep()  # who receives it ends every transfer so
    assert caplog.text == ""
    assert (tmp_path / "whole").read_bytes() == CONTENT


def test_room_is_for_one_senders_files_together(tmp_path, monkeypatch):
    monkeypatch.setattr(PartialFile, "_free", lambda self: PARTS * PART * 3 // 2)
    first = partial(tmp_path, large(), sender="site-1")
    with pytest.raises(StorageError) as caught:
        partial(tmp_path, large(name="second"), sender="site-1")
    assert str(caught.value) == (
        f"second can't be kept in {tmp_path}: it needs {PARTS * PART} bytes, {PARTS * PART * 3 // 2} bytes are free "
        f"there, of which {PARTS * PART} are for other files that 'site-1' is sending (No space left on device)"
    )
    assert len(hidden(tmp_path)) == 2
    other = partial(tmp_path, large(name="third"), sender="site-2")  # what others announce holds no room
    first.keep()
    other.keep()
    assert not hidden(tmp_path)
    partial(tmp_path, large(name="second"), sender="site-1").keep()


def test_what_is_here_stays_if_there_is_no_room_for_the_rest(interrupted, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "_free", lambda self: 0)
        with pytest.raises(StorageError, match="0 bytes are free there"):
            partial(interrupted, identity())
    finish(interrupted, 1)


def interrupt(folder: Path, name: str, age: int, sender: str = "site-1") -> None:
    file = partial(folder, large(name=name), sender=sender)
    receive_noise(file, 2)
    journal = file._journal_path
    os.utime(journal, (time.time() - age, time.time() - age))
    file.keep()


def names(folder: Path) -> set[str]:
    journals = folder.glob(".*.rdma-journal")
    return {json.loads(path.read_text().splitlines()[0])["name"] for path in journals}


def test_one_sender_keeps_only_so_many(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hidden_files, "KEEP_FILES", 2)
    interrupt(tmp_path, "theirs", 1000, "site-2")
    for name, age in (("a", 50), ("b", 100)):
        interrupt(tmp_path, name, age)
    assert not caplog.messages
    at_work = partial(tmp_path, large(name="at work"), sender="site-1")
    interrupt(tmp_path, "c", 10)
    assert names(tmp_path) == {"theirs", "c", "at work"}
    (line,) = caplog.messages
    assert line.startswith("partial files from 'site-1' may keep ")
    assert " are removed, and will be sent from their beginning" in line
    at_work.discard()


@pytest.mark.parametrize(("free", "left"), [(0, 1), (3 * PART, 2)])
def test_one_sender_keeps_only_half_of_what_is_free(free, left, tmp_path, monkeypatch, caplog):
    interrupt(tmp_path, "a", 100)
    interrupt(tmp_path, "theirs", 1000, "site-2")
    monkeypatch.setattr(hidden_files, "free_bytes", lambda folder: free)
    monkeypatch.setattr(PartialFile, "_free", lambda self: PARTS * PART)
    interrupt(tmp_path, "b", 10)
    assert names(tmp_path) == ({"theirs", "b"} if left == 1 else {"theirs", "a", "b"})
    assert len(caplog.messages) == 2 - left
    monkeypatch.setattr(hidden_files, "free_bytes", lambda folder: 0)
    (tmp_path / "empty").mkdir()
    interrupt(tmp_path / "empty", "b", 10)  # alone, and all that there is
    assert not names(tmp_path / "empty")


# -- the source ----------------------------------------------------------------------------------------------


def test_identities_tell_files_apart(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    first = OpenFile(str(path)).identity
    assert first == OpenFile(str(path)).identity
    assert FileIdentity.unpack(first.pack()) == first
    odd = path.with_name("a\\b")
    odd.write_bytes(CONTENT)
    assert FileIdentity.unpack(OpenFile(str(odd)).identity.pack()).name == "a\\b"
    at = path.stat().st_mtime_ns
    path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    os.utime(path, ns=(at, at))  # a file system with coarse times
    assert OpenFile(str(path)).identity.key("") != first.key("")


@pytest.mark.parametrize("change", ["longer", "shorter", "touched"])
def test_a_source_that_changes(change, tmp_path):
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    file = OpenFile(str(path))
    if change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        os.truncate(path, len(CONTENT) + (1 if change == "longer" else -1))
    with pytest.raises(SourceError, match=f"{path} changed while it was sent"):
        file.read_into(memoryview(bytearray(100)), 0)
    with pytest.raises(SourceError, match=f"{path} changed while it was sent"):
        file.check()


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_source_that_can_not_be_read(kind, tmp_path):
    with pytest.raises(SourceError, match="no regular file" if kind == "folder" else "can't be read"):
        OpenFile(str(tmp_path if kind == "folder" else tmp_path / "x"))


@pytest.mark.parametrize(
    "change",
    [
        *({"name": name} for name in ("", ".", "..", "a/b", "/etc/passwd", "a\0b", "x" * 256, 5, None)),
        *({"size": size} for size in (-1, 1 << 60, "5", None)),
        {"size": 1 << 42, "part_bytes": BLOCK_BYTES},  # too many parts
        *({"part_bytes": part} for part in (0, -1, BLOCK_BYTES + 1, 1 << 40)),
        {"mtime_ns": 5.0},
        *({"quantization_type": kind} for kind in ("zip", "lossless", "Int8", 5, None, False)),
        {"content": "0"},
        {"more": 1},
    ],
    ids=str,
)
def test_descriptions_that_lie(change):
    with pytest.raises(ProtocolError):
        FileIdentity.unpack({**identity().pack(), **change})
    with pytest.raises(ProtocolError):
        FileIdentity.unpack(None)
