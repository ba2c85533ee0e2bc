"""Keeps a file that is being received on disk under a hidden name until it is whole, with a journal to go on from.

    .KEY.rdma-part      the file, as long as it will be; KEY tells the source's identity, and which site receives it
    .KEY.rdma-journal   a line of JSON with that identity, then "NUMBER CAME KEPT" for every part that is whole:
                        digests of what came, and of what is in the file; locked while somebody works on it

Lines are added without fsync: a transfer that goes on reads those parts again, and takes the ones that have their
digest. What came differs from what is kept if it was encoded on the way.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
import uuid
from pathlib import Path

from nvflare_rdma.errors import StorageError, TransferError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.disk import read_at, write_at
from nvflare_rdma.transfer.files import owned_files as owned
from nvflare_rdma.transfer.files.layout import Layout
from nvflare_rdma.transfer.files.source import BLOCK_BYTES, FileIdentity, PartDigests

log = get_logger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_JOURNAL, _PART = ".rdma-journal", ".rdma-part"
#: Longer than a transfer whose sender is gone may wait for answers.
LOCK_SECONDS = 90.0
_KEEP_SECONDS = 7 * 24 * 3600.0


class PartialFile:
    """Receives a file into `folder`, and takes up what an earlier transfer of the same identity and `owner` left there,
    unless that is still at work and does not end within seconds.

    One of `finish`, `keep` and `discard` is to be called in the end. What nobody has taken up for a week is removed.

    Raises:
        StorageError: there is no room for the file, or `folder` can't be written. Nothing of the file is left.
    """

    def __init__(self, folder: str, layout: Layout, owner: str = "") -> None:
        self.identity = identity = layout.identity
        self._layout = layout
        self.error: StorageError | None = None
        """The first error of the disk; None as long as there was none."""
        self._folder = Path(folder)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._writing = 0
        self._closed = False
        #: Part -> digests of what came, and of what is kept.
        self._whole: dict[int, tuple[bytes, bytes]] = {}
        self._data = self._journal = -1
        self._resumable = True
        try:
            self._sweep()
            self._open(identity.key(owner))
            self._take_up()
            self._allocate()
        except OSError as error:
            failure = self._failure(error)
            self.discard()
            raise failure from error

    @property
    def whole(self) -> frozenset[int]:
        """The parts that are whole, and need not be sent."""
        return frozenset(self.digests())

    def digests(self) -> dict[int, bytes]:
        """The digests of the parts that are whole, as they came."""
        with self._lock:
            return {part: came for part, (came, _) in self._whole.items()}

    # -- opening -------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        for journal in self._folder.glob(f".*{_JOURNAL}"):
            with contextlib.suppress(OSError):
                if time.time() - journal.stat().st_mtime > _KEEP_SECONDS:
                    remove(journal)

    def _open(self, key: str) -> None:
        self._journal_path, self._data_path = _paths(self._folder, key)
        if self._open_shared():
            return
        # The file is received twice at once, or somebody else has these names, or nothing can be locked here. It gets
        # names of its own, under which it can't be resumed.
        self._resumable = False
        self._journal_path, self._data_path = _paths(self._folder, f"{key}-{uuid.uuid4().hex}")
        self._journal = os.open(self._journal_path, owned.CREATE | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):
            owned.lock(self._journal)
        self._data = os.open(self._data_path, owned.CREATE | os.O_EXCL, 0o666)

    def _open_shared(self) -> bool:
        """Open the files under the names that all attempts share. Returns False if that can't be done."""
        while (journal := owned.open_own(self._journal_path, 0o600)) >= 0:
            try:
                if not owned.wait_for_lock(journal, LOCK_SECONDS):
                    return False
                if not os.fstat(journal).st_nlink:
                    continue  # its last owner has just removed it
                self._data = owned.open_own(self._data_path, 0o666)
                if self._data >= 0:
                    self._journal, journal = journal, -1
                    return True
                self._journal_path.unlink()
                return False
            except OSError as error:
                if error.errno not in owned.NO_LOCKS:
                    raise
                self._journal_path.unlink(missing_ok=True)
                return False
            finally:
                if journal >= 0:
                    owned.release(journal)
        return False

    def _take_up(self) -> None:
        """Take up the parts that the journal has, as far as they are on disk."""
        header = json.dumps(self.identity.pack()).encode()
        with open(self._journal, "rb", closefd=False) as file:
            first, *lines = file.read().split(b"\n")
        found = dict(filter(None, map(self._parse, lines))) if first == header else {}
        self._whole = {part: digests for part, digests in found.items() if self._digest(part) == digests[1]}
        if found:
            log.info("%s: %d of %d parts are here already", self.identity.name, len(self._whole), len(self._layout))
        rest = b"".join(self._line(part) for part in sorted(self._whole))
        os.ftruncate(self._journal, 0)
        os.lseek(self._journal, 0, os.SEEK_SET)
        os.write(self._journal, header + b"\n" + rest)

    def _parse(self, line: bytes) -> tuple[int, tuple[bytes, bytes]] | None:
        with contextlib.suppress(ValueError):
            part, came, kept = line.decode().split()
            if len(came) == len(kept) == 32 and 0 <= int(part) < len(self._layout):
                return int(part), (bytes.fromhex(came), bytes.fromhex(kept))
        return None  # it was being written when its writer ended

    def _line(self, part: int) -> bytes:
        came, kept = self._whole[part]
        return f"{part} {came.hex()} {kept.hex()}\n".encode()

    def _digest(self, part: int) -> bytes | None:
        """The digest of what is on disk of a part; None if not all of it is."""
        nbytes, start = self._layout.nbytes(part), self._layout.start(part)
        digests, block = PartDigests(nbytes), memoryview(bytearray(BLOCK_BYTES))
        for offset in range(0, nbytes, BLOCK_BYTES):
            count = read_at(self._data, block[: nbytes - offset], start + offset)
            if count != min(BLOCK_BYTES, nbytes - offset):
                return None
            digests.add(offset, block[:count])
        return digests.whole()

    def _allocate(self) -> None:
        """Reserve room for the whole file, so that a full disk shows before bytes move."""
        os.ftruncate(self._data, min(os.fstat(self._data).st_size, self.identity.size))
        if not self.identity.size:
            return
        try:
            os.posix_fallocate(self._data, 0, self.identity.size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            if self._free() < self.identity.size - os.fstat(self._data).st_blocks * 512:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            os.ftruncate(self._data, self.identity.size)

    # -- parts ---------------------------------------------------------------------------------------------

    def write(self, part: int, offset: int, data: memoryview) -> None:
        """Write bytes of a part, which begin at `offset` in it.

        Raises:
            StorageError: the disk does not take them.
        """
        with self._lock:
            if self._closed or self.error is not None:
                raise self.error or StorageError(f"{self.identity.name} is not being received any more")
            self._writing += 1
        try:
            write_at(self._data, data, self._layout.start(part) + offset)
        except OSError as error:
            self.error = self.error or self._failure(error)
            raise self.error from error
        finally:
            with self._idle:
                self._writing -= 1
                self._idle.notify_all()

    def add(self, part: int, came: bytes, kept: bytes) -> None:
        """Note in the journal that a part is whole and verified, with the digests of what came and of what is kept."""
        with self._lock:
            self._whole[part] = came, kept
            try:
                os.write(self._journal, self._line(part))
            except OSError as error:
                self.error = self.error or self._failure(error)
                raise self.error from error
        with contextlib.suppress(OSError):
            # The kernel begins to write it now (fadvise(2)), and not when all parts are here and `finish` waits for it.
            start, nbytes = self._layout.start(part), self._layout.nbytes(part)
            os.posix_fadvise(self._data, start, nbytes, os.POSIX_FADV_DONTNEED)

    def drop(self, part: int) -> None:
        """Forget a part that is not what the sender has. The journal's next line about it counts."""
        with self._lock:
            del self._whole[part]

    # -- ends ----------------------------------------------------------------------------------------------

    def finish(self, path: str) -> None:
        """Give the file its name, `path` in the same folder, when all of it is safe on disk.

        Raises:
            StorageError: the disk does not take it. TransferError: it is not whole.
        """
        if len(self.whole) != len(self._layout):
            raise TransferError(f"{len(self.whole)} of {len(self._layout)} parts of {self.identity.name} are here")
        try:
            os.fsync(self._data)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.rename(self._data_path, path)
                owned.sync_folder(folder, path)
            finally:
                os.close(folder)
        except OSError as error:
            self.error = self._failure(error)
            raise self.error from error
        self.discard()

    def keep(self) -> None:
        """Leave what is here for another transfer, if it can be taken up; otherwise discard it."""
        if self._resumable and self.error is None and self.whole:
            self._close()
        else:
            self.discard()

    def _close(self) -> None:
        with self._idle:  # what is late writes to no descriptor that is somebody else's by then
            self._closed = True
            self._idle.wait_for(lambda: not self._writing)
        if self._data >= 0:
            os.close(self._data)
        if self._journal >= 0:  # the lock goes last
            owned.release(self._journal)
        self._data = self._journal = -1

    def discard(self) -> None:
        """Remove the files under the hidden names."""
        with self._idle:
            self._closed = True
        if self._journal >= 0:
            for path in (self._data_path, self._journal_path):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        self._close()

    def _free(self) -> int:
        found = os.statvfs(self._folder)
        return found.f_bavail * found.f_frsize

    def _failure(self, error: OSError) -> StorageError:
        what = f"{self.identity.name} can't be kept in {self._folder}"
        if error.errno not in _FULL:
            return StorageError(f"{what}: {error}")
        try:
            free = f"{self._free()} bytes are free there"
        except OSError as unknown:
            free = f"what is free is not known ({unknown})"
        why = "which is more than a file may have here" if error.errno == errno.EFBIG else free
        return StorageError(f"{what}: it needs {self.identity.size} bytes, {why} ({os.strerror(error.errno or 0)})")


def forget(folder: str, identity: FileIdentity, owner: str = "") -> None:
    """Remove what an earlier transfer left of a file, which will not be gone on with."""
    remove(_paths(Path(folder), identity.key(owner))[0])


def remove(journal: Path) -> None:
    """Remove a journal and its file, unless somebody works on them, or they are somebody else's."""
    try:
        fd = os.open(journal, owned.OPEN)
        try:
            if owned.is_own(fd) and owned.lock(fd):
                journal.with_suffix(_PART).unlink(missing_ok=True)
                journal.unlink()
        finally:
            owned.release(fd)
    except OSError as error:
        if error.errno not in (errno.ENOENT, *owned.FOREIGN, *owned.NO_LOCKS):
            raise


def _paths(folder: Path, key: str) -> tuple[Path, Path]:
    return folder / f".{key}{_JOURNAL}", folder / f".{key}{_PART}"
