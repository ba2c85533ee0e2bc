"""The names under which partial files are on disk, and how much of it each sender's may keep.

    .SENDER-KEY.rdma-part       see `partial_file`
    .SENDER-KEY.rdma-journal

SENDER tells the site that sends the file, so that no site takes up or removes what another one's transfers have left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.files import owned_files as owned

log = get_logger(__name__)

_JOURNAL, _PART = ".rdma-journal", ".rdma-part"
_KEEP_SECONDS = 7 * 24 * 3600.0
#: What one sender's partial files may keep in a folder when nobody works on them: so many files, and half of what would
#: be free without them.
KEEP_FILES = 8


def paths(folder: Path, sender: str, key: str) -> tuple[Path, Path]:
    """The journal, and the file."""
    stem = f"{_prefix(sender)}{key}"
    return folder / f"{stem}{_JOURNAL}", folder / f"{stem}{_PART}"


def _prefix(sender: str) -> str:
    return f".{xxhash.xxh3_64_hexdigest(sender.encode())}-"


def free_bytes(folder: Path) -> int:
    """How many bytes are free for this user. Raises OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def allocated_bytes(fd: int | Path) -> int:
    """How many bytes of the disk a file takes. Raises OSError."""
    return os.stat(fd, follow_symlinks=isinstance(fd, int)).st_blocks * 512


def remove(journal: Path) -> bool:
    """Remove a journal and its file, unless somebody works on them, or they are somebody else's. Returns whether they
    are gone."""
    try:
        fd = os.open(journal, owned.OPEN)
        try:
            if owned.is_own(fd) and owned.lock(fd):
                journal.with_suffix(_PART).unlink(missing_ok=True)
                journal.unlink()
                return True
        finally:
            owned.release(fd)
    except OSError as error:
        if error.errno not in (errno.ENOENT, *owned.FOREIGN, *owned.NO_LOCKS):
            raise
    return False


def sweep(folder: Path) -> None:
    """Remove what nobody has taken up for a week."""
    for journal in folder.glob(f".*{_JOURNAL}"):
        with contextlib.suppress(OSError):
            if time.time() - journal.stat().st_mtime > _KEEP_SECONDS:
                remove(journal)


def still_to_come(folder: Path, sender: str, but: Path) -> int:
    """How many bytes other transfers of `sender` that are under way into `folder` have not got yet. `but` is the
    journal of who asks. Another sender's transfers don't count: nobody holds room with what it only promises."""
    total = 0
    for journal in _journals(folder, sender):
        with contextlib.suppress(OSError):
            if journal != but and _is_worked_on(journal):
                part = journal.with_suffix(_PART)
                total += max(os.lstat(part).st_size - allocated_bytes(part), 0)
    return total


def limit_kept(folder: Path, sender: str) -> None:
    """Remove the oldest partial files of `sender` if they keep more than they may. Raises OSError."""
    found = []
    for journal in _journals(folder, sender):
        with contextlib.suppress(OSError):
            found.append((os.lstat(journal).st_mtime_ns, journal, allocated_bytes(journal.with_suffix(_PART))))
    found.sort(reverse=True)
    room = (free_bytes(folder) + sum(nbytes for _, _, nbytes in found)) // 2
    kept, kept_bytes, removed, removed_bytes = 0, 0, 0, 0
    for _, journal, nbytes in found:
        if (kept == KEEP_FILES or kept_bytes + nbytes > room) and remove(journal):
            removed, removed_bytes = removed + 1, removed_bytes + nbytes
        else:
            kept, kept_bytes = kept + 1, kept_bytes + nbytes
    if removed:
        log.warning(
            "partial files from %r may keep %d bytes and %d files in %s: %d of them, with %d bytes, are removed, and "
            "will be sent from their beginning",
            *(sender, room, KEEP_FILES, folder, removed, removed_bytes),
        )


def _journals(folder: Path, sender: str) -> Iterator[Path]:
    yield from folder.glob(f"{_prefix(sender)}*{_JOURNAL}")


def _is_worked_on(journal: Path) -> bool:
    fd = os.open(journal, owned.OPEN)
    try:
        return owned.is_own(fd) and not owned.lock(fd)
    finally:
        owned.release(fd)
