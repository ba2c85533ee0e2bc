"""Reads and writes exactly so many bytes of a file, which one system call may not do; and makes holes in files."""

from __future__ import annotations

import ctypes
import errno
import os

#: FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE (fallocate(2)).
_PUNCH_HOLE = 0x01 | 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
if _fallocate is not None:
    _fallocate.restype = ctypes.c_int
    _fallocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    while data:
        done = os.pwrite(fd, data, offset)
        offset, data = offset + done, data[done:]


def read_at(fd: int, memory: memoryview, offset: int) -> int:
    """Fill `memory` from `offset` on, and return how many bytes that were: fewer only at the end of the file. Raises
    OSError."""
    done = 0
    while done < len(memory) and (count := os.preadv(fd, [memory[done:]], offset + done)):
        done += count
    return done


def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Give `nbytes` of a file, from `offset` on, back to the disk; they read as zeros then. Raises OSError, also where
    the file system has no holes."""
    if _fallocate is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _fallocate(fd, _PUNCH_HOLE, offset, nbytes):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
