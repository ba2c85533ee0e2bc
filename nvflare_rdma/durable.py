"""What it takes for a file's new name to outlive its host. Needs neither FLARE nor torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

#: Errors of fsync on a folder, where the file system has no such thing.
_NO_FSYNC = (errno.EINVAL, errno.EOPNOTSUPP)


def sync_folder(folder: int | Path) -> None:
    """Have the disk keep what names a folder has: an open one, or one by its path. Where the file system has no such
    thing, and where this user may not read the folder, nothing is done.

    Raises:
        OSError: the disk has failed, or there is no such folder.
    """
    if isinstance(folder, int):
        _sync(folder)
        return
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        _sync(opened)
    finally:
        os.close(opened)


def _sync(opened: int) -> None:
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
