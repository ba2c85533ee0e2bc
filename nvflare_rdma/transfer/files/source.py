"""Opens a file that is sent in parts, and tells whether two sides have the same.

Digests are xxh3-128 (xxhash). Each block has one, so that blocks may be read and written in any order; a part's digest
is that of its blocks' digests. They find what broke, not attackers.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, StoredTensor, get_codec, read_header
from nvflare_rdma.disk import read_at
from nvflare_rdma.errors import ConfigError, ProtocolError, SourceError
from nvflare_rdma.transfer.manifest import MAX_ITEMS
from nvflare_rdma.transfer.pieces import PIECE_VALUES

#: The length of a block: a piece of values of 16 bits, or half a piece of float32.
BLOCK_BYTES = 2 * PIECE_VALUES
#: The longest part: so much, at most, is sent again after an interruption for each file that was moving.
PART_BYTES = 256 * BLOCK_BYTES
_SAMPLES, _SAMPLE_BYTES = 16, 64 * 1024


@dataclass(frozen=True)
class FileIdentity:
    """Tells which file it is, in which state, and how it is sent.

    `content` is a digest (hex) of samples of the file, as a file system may not tell times apart. `part_bytes` is the
    length of the longest part, and `quantization_type` the codec (see `codec_for_files`), "" for none.
    """

    name: str
    size: int
    mtime_ns: int
    content: str
    part_bytes: int = PART_BYTES
    quantization_type: str = ""

    @property
    def codec(self) -> FixedSizeCodec | None:
        """The codec that encodes its tensors; None if they are sent as they are."""
        return codec_for_files(self.quantization_type) if self.quantization_type else None

    def key(self, owner: str) -> str:
        """A key for names of files of `owner`, in which nothing is the sender's choice."""
        return xxhash.xxh3_128_hexdigest(repr([owner, *sorted(asdict(self).items())]).encode())

    def pack(self) -> dict[str, Any]:
        """Make msgpack types of it, for `unpack`."""
        return asdict(self)

    @classmethod
    def unpack(cls, data: Any) -> FileIdentity:
        """Check a peer's description of a file, and take what `pack` gave there.

        Raises:
            ProtocolError: it is malformed, or its name is no plain file name.
        """
        try:
            found = cls(**data)
        except TypeError as error:
            raise ProtocolError(f"malformed description of a file: {error}") from error
        texts = found.name, found.content, found.quantization_type
        if any(type(text) is not str for text in texts) or len(found.content) != 32:
            raise ProtocolError("malformed description of a file: its name, content or quantization_type")
        check_name(found.name)
        if any(type(n) is not int for n in (found.size, found.mtime_ns, found.part_bytes)):
            raise ProtocolError("malformed description of a file: its numbers")
        try:
            known = found.codec is None or found.codec.name == found.quantization_type
        except ConfigError as error:
            raise ProtocolError(f"malformed description of a file: {error}") from error
        if not known:
            raise ProtocolError(f"malformed description of a file: quantization_type {found.quantization_type!r}")
        if found.part_bytes > 0 and found.size > MAX_ITEMS * found.part_bytes:
            raise ProtocolError(f"a file of {found.size} bytes in parts of {found.part_bytes} can't be received")
        whole_blocks = 0 < found.part_bytes <= PART_BYTES and found.part_bytes % BLOCK_BYTES == 0
        if found.size < 0 or not whole_blocks:
            raise ProtocolError(f"a file of {found.size} bytes in parts of {found.part_bytes} can't be received")
        return found


def check_name(name: Any) -> None:
    """Raise ProtocolError unless `name` is a plain file name: nobody is to choose another folder."""
    if type(name) is not str or name in ("", ".", "..") or len(name) > 255 or set(name) & {"/", "\0"}:
        raise ProtocolError(f"{name!r} is no plain file name")


def codec_for_files(quantization_type: str) -> FixedSizeCodec:
    """The codec that encodes the tensors of a file on its way: always to the same bytes, of a number that is known
    before.

    Raises:
        ConfigError: there is no such codec, or this machine has another byte order than the file.
    """
    codec = get_codec(quantization_type)
    if sys.byteorder != "little":
        raise ConfigError(f"quantization_type {quantization_type!r} is for files on little-endian machines only")
    if isinstance(codec, FixedSizeCodec) and not codec.needs_feedback:
        return codec
    reason = "it leaves most values out" if codec.needs_feedback else "its sizes show only when all is encoded"
    known = [get_codec(name) for name in CODEC_NAMES]
    allowed = ", ".join(c.name for c in known if isinstance(c, FixedSizeCodec) and not c.needs_feedback)
    raise ConfigError(
        f"quantization_type {quantization_type!r} can't be used for files, as {reason}; use one of: {allowed}"
    )


class OpenFile:
    """A file that is read, with its identity when it was opened. It is closed when nothing reads it any more.

    `broken` tells why the file can't be sent, and is "" as long as it can. `tensors` has the file's tensors if they are
    to be encoded.

    Args:
        quantization_type: see `codec_for_files`; "" sends the file as it is.

    Raises:
        SourceError: the file can't be read, or is to be encoded and is no safetensors file. ConfigError: there is no
            such type.
    """

    def __init__(self, path: str, quantization_type: str = "") -> None:
        self.path = path
        self.broken = ""
        self._fd = -1
        codec = codec_for_files(quantization_type) if quantization_type else None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self._fd)
            self._state = found.st_size, found.st_mtime_ns
            content = self._content(found.st_size) if stat.S_ISREG(found.st_mode) else ""
        except OSError as error:
            raise SourceError(f"{path} can't be read: {error}") from error
        if not content:
            raise SourceError(f"{path} is no regular file")
        self.identity = FileIdentity(
            os.path.basename(path), *self._state, content, quantization_type=codec.name if codec is not None else ""
        )
        self.tensors: list[StoredTensor] = []
        if codec is not None:
            try:
                self.tensors = read_header(self.identity.size, self.read_into)
            except ValueError as error:
                raise SourceError(
                    f"{path} can't be encoded as {codec.name}: it is no safetensors file, as {error}; leave out "
                    "quantization_type to send it as it is"
                ) from error

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
        """Fill `memory` with the file's bytes from `offset` on.

        Raises:
            SourceError: the file can't be read, or has changed since it was opened.
        """
        try:
            done = read_at(self._fd, memory, offset)
        except OSError as error:
            raise self.failure(f"can't be read at {offset}: {error}") from error
        self.check()
        if done < len(memory):
            raise self.failure(f"ended at {offset + done} while it was sent")

    def check(self) -> None:
        """Raise SourceError if the file has changed since it was opened, or could not be read."""
        if self.broken:
            raise SourceError(self.broken)
        found = os.fstat(self._fd)
        if (found.st_size, found.st_mtime_ns) != self._state:
            raise self.failure(
                f"changed while it was sent: {found.st_size} bytes, modified at {found.st_mtime_ns} ns, not "
                f"{self._state[0]} and {self._state[1]} any more; send it again when nobody writes it"
            )

    def failure(self, why: str) -> SourceError:
        """Make the error to raise. The first reason counts."""
        self.broken = self.broken or f"{self.path} {why}"
        return SourceError(self.broken)


class PartDigests:
    """Collects the digests of a part's blocks as they come, in any order. The part has `nbytes` bytes, and each block
    but the last one `block`."""

    def __init__(self, nbytes: int, block: int = BLOCK_BYTES) -> None:
        self._nbytes = nbytes
        self._block = block
        self._lock = threading.Lock()
        self._blocks: dict[int, bytes] = {}

    def add(self, offset: int, data: memoryview) -> bool:
        """Take the digests of the whole blocks in `data`, which begins at `offset` in the part. Returns False if one of
        them was another before."""
        found, size = {}, self._block
        for start in range(-offset % size, len(data), size):
            block = data[start : start + size]
            if len(block) == size or offset + len(data) == self._nbytes:
                found[(offset + start) // size] = xxhash.xxh3_128_digest(block)
        with self._lock:
            same = all(self._blocks.get(block, digest) == digest for block, digest in found.items())
            self._blocks |= found
        return same

    def whole(self) -> bytes | None:
        """The digest of the part; None until all of it was there."""
        with self._lock:
            if len(self._blocks) != -(-self._nbytes // self._block):
                return None
            return xxhash.xxh3_128_digest(b"".join(self._blocks[n] for n in sorted(self._blocks)))
