"""A file as parts of `PART_BYTES`, and what tells whether two sides have the same.

Digests are xxh3-128 (xxhash): of each block of `BLOCK_BYTES`, so that blocks may be read and written in any order; a
part's is that of its blocks' digests. They find what broke, not attackers.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from nvflare_rdma.channel.bodies import MAX_UNIT_BYTES, Source, Take
from nvflare_rdma.errors import ProtocolError, SourceError
from nvflare_rdma.streaming.manifest import MAX_ITEMS

BLOCK_BYTES = MAX_UNIT_BYTES
#: What is sent again after an interruption, at most, for each file that was moving.
PART_BYTES = 64 * BLOCK_BYTES
_SAMPLES, _SAMPLE_BYTES = 16, 64 * 1024


@dataclass(frozen=True)
class FileIdentity:
    """Which file, and in which state. ``content``: digest (hex) of samples of it, as a file system may not tell times
    apart."""

    name: str
    size: int
    mtime_ns: int
    content: str
    part_bytes: int = PART_BYTES

    @property
    def parts(self) -> int:
        return -(-self.size // self.part_bytes)

    def key(self, owner: str) -> str:
        """For names of files of ``owner``: nothing of them is the sender's choice."""
        return xxhash.xxh3_128_hexdigest(repr([owner, *sorted(asdict(self).items())]).encode())

    def nbytes(self, part: int) -> int:
        """Length of a part."""
        return min(self.part_bytes, self.size - part * self.part_bytes)

    def pack(self) -> dict[str, Any]:
        """For `unpack`."""
        return asdict(self)

    @classmethod
    def unpack(cls, data: Any) -> FileIdentity:
        """What `pack` gave.

        Raises:
            ProtocolError: it is malformed, or its name is no plain file name.
        """
        try:
            found = cls(**data)
        except TypeError as error:
            raise ProtocolError(f"malformed description of a file: {error}") from error
        if not (type(found.name) is type(found.content) is str and len(found.content) == 32):
            raise ProtocolError("malformed description of a file: its name or content")
        check_name(found.name)
        if any(type(n) is not int for n in (found.size, found.mtime_ns, found.part_bytes)):
            raise ProtocolError("malformed description of a file: its numbers")
        if found.part_bytes > 0 and found.parts > MAX_ITEMS:
            raise ProtocolError(f"a file of {found.size} bytes in {found.parts} parts can't be received")
        whole_blocks = 0 < found.part_bytes <= PART_BYTES and found.part_bytes % BLOCK_BYTES == 0
        if found.size < 0 or not whole_blocks:
            raise ProtocolError(f"a file of {found.size} bytes in parts of {found.part_bytes} can't be received")
        return found


def check_name(name: Any) -> None:
    """Raise ProtocolError unless ``name`` is a plain file name: nobody is to choose another folder."""
    if type(name) is not str or name in ("", ".", "..") or len(name) > 255 or set(name) & {"/", "\0"}:
        raise ProtocolError(f"{name!r} is no plain file name")


class OpenFile:
    """A file that is read, with its identity when it was opened. It is closed when nothing reads it any more.

    ``broken``: why it can't be sent, "" as long as it can.

    Raises:
        SourceError: it can't be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.broken = ""
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self._fd)
            self._state = found.st_size, found.st_mtime_ns
            content = self._content(found.st_size) if stat.S_ISREG(found.st_mode) else ""
        except OSError as error:
            raise SourceError(f"{path} can't be read: {error}") from error
        if not content:
            raise SourceError(f"{path} is no regular file")
        self.identity = FileIdentity(os.path.basename(path), *self._state, content)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def _content(self, size: int) -> str:
        digest = xxhash.xxh3_128()
        last = max(size - _SAMPLE_BYTES, 0)
        for offset in sorted({last * n // (_SAMPLES - 1) for n in range(_SAMPLES)}):
            digest.update(os.pread(self._fd, _SAMPLE_BYTES, offset))
        return digest.hexdigest()

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill ``memory``.

        Raises:
            SourceError: it can't be read, or has changed since it was opened.
        """
        done = 0
        try:
            while done < len(memory):
                count = os.preadv(self._fd, [memory[done:]], offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            raise self.failure(f"can't be read at {offset + done}: {error}") from error
        self.check()
        if done < len(memory):
            raise self.failure(f"ended at {offset + done} while it was sent")

    def check(self) -> None:
        """Raise SourceError if it has changed since it was opened, or could not be read."""
        if self.broken:
            raise SourceError(self.broken)
        found = os.fstat(self._fd)
        if (found.st_size, found.st_mtime_ns) != self._state:
            raise self.failure(
                f"changed while it was sent: {found.st_size} bytes, modified at {found.st_mtime_ns} ns, not "
                f"{self._state[0]} and {self._state[1]} any more; send it again when nobody writes it"
            )

    def failure(self, why: str) -> SourceError:
        """What to raise. The first reason counts."""
        self.broken = self.broken or f"{self.path} {why}"
        return SourceError(self.broken)


class PartDigests:
    """Of a part's blocks as they come, in any order."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._blocks: dict[int, bytes] = {}

    def add(self, offset: int, data: memoryview) -> bool:
        """Blocks of ``data``, which lies at ``offset``; False if one was another before. Pieces of blocks don't
        count."""
        found = {}
        for start in range(-offset % BLOCK_BYTES, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            if len(block) == BLOCK_BYTES or offset + len(data) == self._nbytes:
                found[(offset + start) // BLOCK_BYTES] = xxhash.xxh3_128_digest(block)
        with self._lock:
            same = all(self._blocks.get(block, digest) == digest for block, digest in found.items())
            self._blocks |= found
        return same

    def whole(self) -> bytes | None:
        """The part's digest, when all of it was there."""
        with self._lock:
            if len(self._blocks) != -(-self._nbytes // BLOCK_BYTES):
                return None
            return xxhash.xxh3_128_digest(b"".join(self._blocks[n] for n in sorted(self._blocks)))


class PartSource(Source):
    """One part of a file, read when it is written to the peer."""

    ready = False

    def __init__(self, file: OpenFile, part: int) -> None:
        identity = file.identity
        self.nbytes = identity.nbytes(part)
        self.digests = PartDigests(self.nbytes)
        self._file = file
        self._start = part * identity.part_bytes

    def digest(self) -> bytes:
        """What `digests` would be of, if it was not read yet.

        Raises:
            SourceError: it can't be read, or has changed.
        """
        block = memoryview(bytearray(min(self.nbytes, BLOCK_BYTES)))
        while (digest := self.digests.whole()) is None:
            for offset in range(0, self.nbytes, BLOCK_BYTES):
                self.read(offset, min(BLOCK_BYTES, self.nbytes - offset), lambda length: block[:length])
        return digest

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        slot = take(length)
        self._file.read_into(slot, self._start + offset)
        if not self.digests.add(offset, slot):
            raise self._file.failure("changed while it was sent: it reads differently the second time")
        return slot


def sources(file: OpenFile) -> Mapping[str, PartSource]:
    """All of a file's parts, by number."""
    return {str(part): PartSource(file, part) for part in range(file.identity.parts)}
