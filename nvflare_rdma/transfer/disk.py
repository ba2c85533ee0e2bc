"""Reads and writes exactly so many bytes of a file, which one system call may not do."""

from __future__ import annotations

import os


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
