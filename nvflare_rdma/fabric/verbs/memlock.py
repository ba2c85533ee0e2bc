"""How much memory this process may lock: what a device may reach is pinned, and counts (ib_umem_get in the kernel)."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_MIB = 1024 * 1024
_CAP_IPC_LOCK = 14
_FIRST_USER_NAMESPACE = 0xEFFFFFFD  # its inode (USER_NS_INIT_INO in linux/nsfs.h)
#: For queues, and what other parts of a process lock.
_RESERVE = 2 * _MIB


def memlock_limit() -> int | None:
    """Bytes that this process may lock (RLIMIT_MEMLOCK); None if there is no limit for it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY or _ignores_limits() else soft


def _ignores_limits() -> bool:
    """Whether it has CAP_IPC_LOCK, and not just in a user namespace of its own (rootless containers)."""
    try:
        status = Path("/proc/self/status").read_text()
        capabilities = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
        return bool(capabilities >> _CAP_IPC_LOCK & 1) and os.stat("/proc/self/ns/user").st_ino == _FIRST_USER_NAMESPACE
    except (OSError, StopIteration, ValueError):
        return False


def memlock_needed(budget: int) -> int:
    """What RDMA needs to lock with a memory budget of `budget` bytes: that for what comes in, and as much for what
    goes out. Many peers at once may take more, see `RegistrationCache`."""
    return 2 * budget + _RESERVE


def memlock_reason(budget: int) -> str:
    """Why RDMA can't have what it needs for `budget`, and what to do; "" if it can."""
    limit, needed = memlock_limit(), memlock_needed(budget)
    if limit is None or limit >= needed:
        return ""
    fits = (limit - _RESERVE) // 2 // _MIB
    lower = f"; or lower rdma_memory_budget_bytes to {fits * _MIB} or less" if fits >= 1 else ""
    return (
        f"this process may lock {limit // 1024} KiB of memory (RLIMIT_MEMLOCK), RDMA needs {needed // 1024} KiB for "
        f"rdma_memory_budget_bytes={budget}: run `ulimit -l unlimited` as root before it starts (systemd: "
        "LimitMEMLOCK=infinity; docker: --ulimit memlock=-1; for logins: `* - memlock unlimited` in "
        f"/etc/security/limits.conf){lower}"
    )
