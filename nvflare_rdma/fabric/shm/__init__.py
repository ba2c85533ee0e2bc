"""Shared memory between two processes of one user on one host."""

from __future__ import annotations

import socket
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nvflare_rdma.fabric.base import Fabric
from nvflare_rdma.fabric.options import Availability, FabricOptions
from nvflare_rdma.fabric.registry import FabricFactory, LinkEnd

if TYPE_CHECKING:
    from nvflare_rdma.fabric.shm.fabric import ShmFabric
    from nvflare_rdma.fabric.shm.process_memory import address_of

__all__ = ["ShmFabric", "address_of", "factory", "probe"]

_MODULES = {"ShmFabric": "fabric", "address_of": "process_memory"}

if not TYPE_CHECKING:  # a type checker would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def factory(options: FabricOptions) -> FabricFactory:
    """See `nvflare_rdma.fabric.registry`."""
    from nvflare_rdma.fabric.shm.fabric import ShmFabric

    def make(end: LinkEnd) -> Fabric:
        return ShmFabric()

    return make


def probe(options: FabricOptions) -> Availability:
    """See `nvflare_rdma.fabric.registry`."""
    if sys.platform != "linux":
        return Availability(False, f"shared memory between processes needs Linux, not {sys.platform}")
    try:
        # Not at the top: it needs numpy, which the command line does without.
        from nvflare_rdma.fabric.shm.process_memory import unusable_reason
    except ImportError as error:
        return Availability(False, f"numpy can't be loaded: {error}: install nvflare-rdma again")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind("")  # Linux picks a free abstract name (autobind, unix(7))
    except OSError as error:
        return Availability(False, f"abstract Unix sockets are forbidden in this process: {error} (seccomp, AppArmor)")
    reason = unusable_reason()
    return Availability(not reason, reason)
