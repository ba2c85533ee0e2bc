"""Memory of another process of this user: reading it, and sharing one's own. Linux only.

Sources: process_vm_readv(2), memfd_create(2), fcntl(2) (file seals), mmap(2), PR_SET_PTRACER in prctl(2). The
calls go through ctypes, which releases the GIL; Python's own `mmap` would keep a descriptor open per mapping.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from nvflare_rdma.errors import FabricError
from nvflare_rdma.fabric.slots import HUGE_PAGE_BYTES

_MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3; it implies MFD_ALLOW_SEALING
_PR_SET_PTRACER = 0x59616D61
_MAP_FAILED = ctypes.c_void_p(-1).value
#: With these nobody can truncate the file, so touching a mapping of it never raises SIGBUS.
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def _libc_function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.restype, function.argtypes = result, arguments
    return function


_iovecs = ctypes.POINTER(_IoVec)
_readv = _libc_function(
    "process_vm_readv",
    ctypes.c_ssize_t,
    *(ctypes.c_int, _iovecs, ctypes.c_ulong, _iovecs, ctypes.c_ulong, ctypes.c_ulong),
)
_mmap = _libc_function(
    "mmap",
    ctypes.c_void_p,
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_munmap = _libc_function("munmap", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc_function("madvise", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_prctl = _libc_function("prctl", ctypes.c_int, ctypes.c_int, *[ctypes.c_ulong] * 4)


def _errno_error(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")


def address_of(view: memoryview) -> int:
    """Where the bytes of a contiguous, not empty view are."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def read_into(pid: int, address: int, target: memoryview) -> None:
    """Copy `len(target)` bytes at `address` of process `pid`.

    Raises:
        OSError: EPERM (not allowed to trace it), ESRCH (it is gone), EFAULT (nothing is mapped there), ENOSYS.
    """
    if _readv is None:
        raise OSError(errno.ENOSYS, "process_vm_readv: not in this C library")
    done, length = 0, len(target)
    here = address_of(target) if length else 0
    while done < length:
        # The kernel moves at most 2 GiB at once, and stops at the first page that it can't read.
        local, remote = _IoVec(here + done, length - done), _IoVec(address + done, length - done)
        got = _readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if got < 0:
            raise _errno_error("process_vm_readv")
        if got == 0:
            raise OSError(errno.EFAULT, "process_vm_readv: nothing was read")
        done += got


def sealed_memory(nbytes: int) -> int:
    """The descriptor of an anonymous file of `nbytes` whose size can't be changed.

    Pages come as they are touched, as with other memory; what can't be enough is refused here. (fallocate(2) would
    take pages at once, and wake the out-of-memory killer where this gets an error.)

    Raises:
        MemoryError: there is not enough memory. OSError: no descriptor is left, or memfd_create is forbidden.
    """
    try:
        fd = os.memfd_create("nvflare-rdma", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create("nvflare-rdma", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.ENOMEM, errno.EFBIG, errno.EINVAL):
            raise MemoryError(f"no {nbytes} bytes of shared memory are free: {error.strerror}") from error
        raise
    return fd


def check_sealed(fd: int, nbytes: int) -> None:
    """Make sure that a mapping of a stranger's descriptor can be touched safely.

    Raises:
        ValueError: it is no memfd, its size can still be changed, or it is not `nbytes` long.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError(f"the descriptor is no memfd: {error.strerror}") from error
    if seals & SIZE_SEALS != SIZE_SEALS:
        raise ValueError(f"the memfd is not sealed against a change of its size (seals {seals:#x})")
    if os.fstat(fd).st_size != nbytes:
        raise ValueError(f"the memfd holds {os.fstat(fd).st_size} bytes, not {nbytes}")


def map_shared(fd: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Map a file for reading and writing. It is unmapped when no view of the array is left; `fd` can be closed.

    Raises:
        MemoryError: there is no room for it (address space, vm.max_map_count).
    """
    address = _mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise MemoryError(f"can't map {nbytes} bytes of shared memory: {_errno_error('mmap').strerror}")
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(memory, _munmap, address, nbytes).atexit = False
    if nbytes >= HUGE_PAGE_BYTES:
        _madvise(address, nbytes, mmap.MADV_HUGEPAGE)  # a wish: kernels without it refuse
    return np.frombuffer(memoryview(memory), np.uint8)


class Tracer:
    """Whom this process lets read its memory under Yama's ptrace_scope=1.

    Yama keeps one such process, so it is given to one peer at a time, and taken back when that peer's last
    endpoint ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._users = 0

    def allow(self, pid: int) -> bool:
        """True: `pid` is declared; call `release` later. False: another peer holds it, or there is no Yama."""
        with self._lock:
            if self._users and self._pid != pid:
                return False
            if not self._users and _prctl(_PR_SET_PTRACER, pid, 0, 0, 0) != 0:
                return False
            self._pid = pid
            self._users += 1
            return True

    def release(self) -> None:
        """Take back what one `allow` gave."""
        with self._lock:
            self._users -= 1
            if not self._users:
                _prctl(_PR_SET_PTRACER, 0, 0, 0, 0)


TRACER = Tracer()


def unusable_reason() -> str:
    """Why neither way works in this process ("" if one does): reading one's own memory, or creating a memfd."""
    token = bytearray(os.urandom(16))
    copy = bytearray(len(token))
    try:
        read_into(os.getpid(), address_of(memoryview(token)), memoryview(copy))
        if copy == token:
            return ""
        raise FabricError("process_vm_readv: it read other bytes")
    except OSError as error:
        reason = str(error)
    with contextlib.suppress(MemoryError, OSError):
        os.close(sealed_memory(mmap.PAGESIZE))
        return ""
    return (
        f"neither process_vm_readv ({reason}) nor memfd_create is allowed in this process "
        "(let the container's seccomp profile allow one of them)"
    )
