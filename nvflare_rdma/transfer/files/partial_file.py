"""Keeps a file that is being received on disk under a hidden name until it is whole, with a journal to go on from.

    .SENDER-KEY.rdma-part      the file, as long as it will be, with holes where nothing has come; SENDER tells which
                               site sends it, KEY the source's identity, and which site receives it
    .SENDER-KEY.rdma-journal   a line of JSON with that identity, then "NUMBER CAME KEPT" for every part that is
                               whole: digests of what came, and of what is in the file; locked while somebody works
                               on it

Lines are added without fsync: a transfer that goes on reads those parts again, and takes the ones that have their
digest. What came differs from what is kept if it was encoded on the way.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from nvflare_rdma.disk import punch_hole, read_at, write_at
from nvflare_rdma.errors import StorageError, TransferError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.files import hidden_files as hidden
from nvflare_rdma.transfer.files import owned_files as owned
from nvflare_rdma.transfer.files.layout import Layout
from nvflare_rdma.transfer.files.source import BLOCK_BYTES, FileIdentity, PartDigests

log = get_logger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Longer than a transfer whose sender is gone may wait for answers.
LOCK_SECONDS = 90.0
#: What a file system may take for a file besides its bytes: so much, and an eighth.
_OVERHEAD_BYTES = 1 << 20


class PartialFile:
    """Receives a file into `folder`, and takes up what an earlier transfer of the same identity, `owner` and `sender`
    left there, unless that is still at work and does not end within seconds.

    One of `finish`, `keep` and `discard` is to be called in the end. What nobody has taken up for a week is removed.

    The disk is taken for what comes, and not before: also a process that is killed leaves no more than that.

    Raises:
        StorageError: there is no room for the file, or `folder` can't be written. Nothing of the file is left, but for
            what an earlier transfer had left if there is no room for the rest.
    """

    def __init__(self, folder: str, layout: Layout, owner: str = "", sender: str = "") -> None:
        self.identity = identity = layout.identity
        self._layout = layout
        self.error: StorageError | None = None
        """The first error of the disk; None as long as there was none."""
        self._folder = Path(folder)
        self._sender = sender
        #: What is free, but for other files that the sender is sending.
        self._promised = 0
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._writing = 0
        self._closed = False
        #: Part -> digests of what came, and of what is kept.
        self._whole: dict[int, tuple[bytes, bytes]] = {}
        self._data = self._journal = -1
        self._resumable = True
        taken_up = False
        try:
            hidden.sweep(self._folder)
            self._open(identity.key(owner))
            self._take_up()
            taken_up = True
            self._require_room()
        except OSError as error:
            failure = self._failure(error)
            if taken_up:
                self.keep()
            else:
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

    def _open(self, key: str) -> None:
        self._journal_path, self._data_path = hidden.paths(self._folder, self._sender, key)
        if self._open_shared():
            return
        # The file is received twice at once, or somebody else has these names, or nothing can be locked here. It gets
        # names of its own, under which it can't be resumed.
        self._resumable = False
        self._journal_path, self._data_path = hidden.paths(self._folder, self._sender, f"{key}-{uuid.uuid4().hex}")
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

    def _require_room(self) -> None:
        """See that there is room for what is to come, so that a full disk shows before bytes move."""
        size = self.identity.size
        os.ftruncate(self._data, min(os.fstat(self._data).st_size, size))
        need = size - hidden.allocated_bytes(self._data)
        self._promised = hidden.still_to_come(self._folder, self._sender, self._journal_path)
        if need > 0 and self._free() < need + self._promised:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._promised = 0
        os.ftruncate(self._data, size)

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
                owned.keep_name(folder, path)
            finally:
                os.close(folder)
        except OSError as error:
            self.error = self._failure(error)
            raise self.error from error
        self.discard()

    def keep(self) -> None:
        """Leave what is here for another transfer, if it can be taken up; otherwise discard it."""
        self._stop_writing()
        if not (self._resumable and self.error is None and self.whole and self._give_back()):
            self.discard()
            return
        self._close()
        try:
            hidden.limit_kept(self._folder, self._sender)
        except OSError as error:
            log.warning("what partial files keep in %s can't be limited: %s", self._folder, error)

    def _give_back(self) -> bool:
        """Give back to the disk what is here of parts that are not whole. Returns False if it can't be done."""
        whole, end = 0, 0
        try:
            for start, nbytes in self._whole_stretches():
                if start > end:
                    with contextlib.suppress(OSError):  # no holes here: it may be little
                        punch_hole(self._data, end, start - end)
                whole, end = whole + nbytes, start + nbytes
            os.ftruncate(self._data, end)
            taken = hidden.allocated_bytes(self._data)
        except OSError as error:
            log.warning("what is here of %s is not kept: %s", self.identity.name, error)
            return False
        if taken > whole + whole // 8 + _OVERHEAD_BYTES:
            name = self.identity.name
            log.warning("what is here of %s is not kept: it takes %d bytes for %d that are whole", name, taken, whole)
            return False
        return True

    def _whole_stretches(self) -> Iterator[tuple[int, int]]:
        """Where the whole parts are in the file, in order, and how long they are."""
        for part in sorted(self.whole):
            yield self._layout.start(part), self._layout.nbytes(part)

    def _stop_writing(self) -> None:
        with self._idle:  # what is late writes to no descriptor that is somebody else's by then
            self._closed = True
            self._idle.wait_for(lambda: not self._writing)

    def _close(self) -> None:
        self._stop_writing()
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
        return hidden.free_bytes(self._folder)

    def _failure(self, error: OSError) -> StorageError:
        what = f"{self.identity.name} can't be kept in {self._folder}"
        if error.errno not in _FULL:
            return StorageError(f"{what}: {error}")
        try:
            free = f"{self._free()} bytes are free there"
            if self._promised:
                free += f", of which {self._promised} are for other files that {self._sender!r} is sending"
        except OSError as unknown:
            free = f"what is free is not known ({unknown})"
        why = "which is more than a file may have here" if error.errno == errno.EFBIG else free
        return StorageError(f"{what}: it needs {self.identity.size} bytes, {why} ({os.strerror(error.errno or 0)})")


def is_begun(folder: str, identity: FileIdentity, owner: str = "", sender: str = "") -> bool:
    """Whether an earlier transfer left something of a file."""
    return hidden.paths(Path(folder), sender, identity.key(owner))[0].exists()


def forget(folder: str, identity: FileIdentity, owner: str = "", sender: str = "") -> None:
    """Remove what an earlier transfer left of a file, which will not be gone on with."""
    hidden.remove(hidden.paths(Path(folder), sender, identity.key(owner))[0])
