"""Opens and locks files that this process's user owns, in a folder that anybody may write to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from pathlib import Path

from nvflare_rdma.durable import sync_folder

OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe is not waited for
CREATE = OPEN | os.O_CREAT
#: Errors of opening what is somebody else's, or no file.
FOREIGN = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EISDIR, errno.ENODEV)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_LOOK_SECONDS = 0.05


def open_own(path: Path, mode: int) -> int:
    """Open or create a file. Returns -1 if it is somebody else's or no plain file: anybody may write to some
    folders."""
    try:
        fd = os.open(path, CREATE, mode)
    except OSError as error:
        if error.errno not in FOREIGN:
            raise
        return -1
    if is_own(fd):
        return fd
    os.close(fd)
    return -1


def is_own(fd: int) -> bool:
    """Whether an open file is a plain one of this user's, under one name."""
    found = os.fstat(fd)
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink <= 1


def keep_name(folder: int, path: str) -> None:
    """Make sure that what has just got the name `path` keeps it; if that can't be, remove it and raise OSError."""
    try:
        sync_folder(folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def release(fd: int) -> None:
    """Give up a file's lock, and close it. Closing alone would leave the lock to a process that was forked meanwhile
    and has the descriptor, too."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def lock(fd: int) -> bool:
    """Lock an open file, unless somebody else has it locked. The system unlocks it when the process ends, however it
    does. Returns whether it is locked now.

    Raises:
        OSError: one of `NO_LOCKS`, where the file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(fd: int, seconds: float) -> bool:
    """Lock an open file as soon as that can be done, as `lock`: an earlier transfer whose sender is gone may not have
    noticed yet."""
    deadline = time.monotonic() + seconds
    while not (locked := lock(fd)) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return locked
