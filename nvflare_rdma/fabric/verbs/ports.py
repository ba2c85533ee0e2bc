"""Devices and registered memory through pyverbs (rdma-core's Python binding, package python3-pyverbs), and the one
place that translates its errors. What else calls it: `queue_pair`, `iwarp_connect`.

Sources: ibv_open_device(3), ibv_get_async_event(3), ibv_reg_mr(3). pyverbs never releases the GIL, so nothing here
waits: event channels are polled for by their descriptor, and are set not to block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Protocol, TypeVar

from nvflare_rdma.errors import FabricError
from nvflare_rdma.fabric.verbs.devices import IWARP, Gid, PortInfo
from nvflare_rdma.fabric.verbs.pyverbs import MR, PD, Context, PyverbsError, e

_Made = TypeVar("_Made", bound="Closable")

_ERRNO_HINTS = {
    errno.ENOMEM: "the limit of locked memory may be used up: `ulimit -l unlimited`",
    errno.EACCES: "no permission for /dev/infiniband: is this user in the group rdma?",
    errno.EPERM: "not permitted in this container: give it /dev/infiniband and IPC_LOCK",
    errno.ENODEV: "the device is gone",
    errno.EIO: "the device is gone, or its driver failed: see dmesg",
    errno.ETIMEDOUT: "the peer's address does not answer (no neighbour, or no route to it)",
    errno.EMFILE: "this process has too many files open: `ulimit -n`",
    errno.EFAULT: "the memory is not mapped, or not for this kind of access",
}
#: A port that goes down may come up again before the queue pairs have given up: that is none.
_FATAL_EVENTS = frozenset({"DEVICE_FATAL", "QP_FATAL", "CQ_ERR"})
_EVENTS = {value: name.removeprefix("IBV_EVENT_") for name, value in vars(e).items() if name.startswith("IBV_EVENT_")}


@contextlib.contextmanager
def translated(device: str, what: str) -> Iterator[None]:
    """Raise FabricError for what pyverbs, or the system, raises while `device` does `what`."""
    try:
        yield
    except (PyverbsError, OSError) as error:
        code = (error.errno if isinstance(error, OSError) else getattr(error, "error_code", None)) or -1
        hint = _ERRNO_HINTS.get(code, "")
        raise FabricError(f"{device}: {what} failed: {error}{f' ({hint})' if hint else ''}") from error


def nothing_came(error: PyverbsError) -> bool:
    """Whether it says that an event channel, which does not block, has no event to give."""
    return getattr(error, "error_code", None) == errno.EAGAIN


#: Held by whoever may open an event descriptor: pyverbs, or librdmacm by itself.
descriptors = threading.RLock()


def _event_descriptors(kind: str) -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if kind in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found


def with_descriptor(make: Callable[[], _Made], attribute: str, kind: str = "infinibandevent") -> tuple[_Made, int]:
    """What `make` makes, and the event descriptor that came with it, which old versions of pyverbs don't tell.
    `kind` is what the kernel calls it."""
    with descriptors:
        before = _event_descriptors(kind)
        made = make()
        fd = getattr(made, attribute, None)
        if fd is None:
            opened = _event_descriptors(kind) - before
            if len(opened) != 1:
                made.close()
                raise OSError("another part of this process opened event descriptors at the same moment")
            fd = opened.pop()
    os.set_blocking(fd, False)
    return made, fd


class Access(Enum):
    """What memory is registered for: to be sent, to take messages, or to be written by the peer."""

    SOURCE = 0
    RECEIVE = int(e.IBV_ACCESS_LOCAL_WRITE)
    EXPOSED = int(e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE)


class MemoryRegion:
    """Registered memory. `lkey` names it in work requests of this side, `rkey` in writes of the peer, until it is
    closed."""

    def __init__(self, region: Any) -> None:
        self._open = [region]
        self.lkey: int = region.lkey
        self.rkey: int = region.rkey

    def close(self) -> None:
        """Deregister the memory."""
        close_all(self._open)


class Port:
    """An opened port with a protection domain of its own: what is registered here only one peer can reach."""

    def __init__(self, info: PortInfo, gid: Gid) -> None:
        self.info = info
        self.gid = gid
        self._open: list[Any] = []
        try:
            with translated(info.device, "opening the device"):
                self.context, self.events_fd = with_descriptor(lambda: Context(name=info.device), "async_fd")
                self._open.append(self.context)
                port, device = self.context.query_port(info.number), self.context.query_device()
            with translated(info.device, "allocating a protection domain"):
                self.pd = PD(self.context)
                self._open.append(self.pd)
        except BaseException:  # left to the garbage collector, it is closed in any order: that crashes
            self.close()
            raise
        self.mtu: int = port.active_mtu
        self.lid: int = port.lid
        self.max_message = min(port.max_msg_sz, 1 << 31)
        self.max_work = device.max_qp_wr
        self.max_segments = device.max_sge
        self.max_completions = device.max_cqe

    def register(self, address: int, nbytes: int, access: Access) -> MemoryRegion:
        """Pin memory and make it known to the device. Keeps no reference to it."""
        with translated(self.info.device, f"registering {nbytes} bytes"):
            return MemoryRegion(MR(self.pd, nbytes, access.value, address=address))

    def events(self) -> list[str]:
        """What has happened to the device or its queue pairs (ibv_get_async_event(3)); see `is_fatal`."""
        names = []
        with contextlib.suppress(PyverbsError):  # there is no more, most likely: pyverbs drops this call's errno
            while True:
                event = self.context.get_async_event()
                names.append(_EVENTS.get(event.event_type, str(event.event_type)))
                event.ack()
        return names

    def is_fatal(self, event: str) -> bool:
        """Whether it makes the whole port useless. An iWARP device calls it fatal for a queue pair when its peer ends
        the connection (TERMINATE): that queue pair's flushed work tells."""
        return event in _FATAL_EVENTS and not (self.info.transport == IWARP and event == "QP_FATAL")

    @property
    def gone(self) -> bool:
        """Whether the device was removed. One with hardware says so by an event; the kernel's own (rxe, siw) are
        silent, and not removed until they are closed, but their device file is."""
        return os.fstat(self.context.cmd_fd).st_nlink == 0

    def close(self) -> None:
        """Close the port, also when the device is gone. Everything that was made of it has to be closed before."""
        close_all(self._open)


class Closable(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """Close it."""


def make_event(device: str) -> int:
    """An eventfd(2) that doesn't block. Raises FabricError."""
    with translated(device, "making an eventfd"):
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def close_all(opened: list[Any]) -> None:
    """Close the last that was opened first; what can't be closed any more belongs to a device that is gone."""
    while opened:
        with contextlib.suppress(PyverbsError):
            opened.pop().close()
