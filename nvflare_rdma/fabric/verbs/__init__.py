"""RDMA devices (InfiniBand, RoCE, iWARP) through libibverbs and pyverbs. Importing this loads no pyverbs.

VerbsFabric, RegistrationCache     the fabric, and the registered memory that all its links share
list_ports, choose_ports, ...      which ports and addresses this machine has, and which would be used
pyverbs_reason, memlock_reason, device_file_reason      why RDMA can't be used, and what would change that
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nvflare_rdma.fabric.base import Fabric
from nvflare_rdma.fabric.options import FabricOptions
from nvflare_rdma.fabric.registry import FabricFactory, LinkEnd
from nvflare_rdma.fabric.verbs.availability import device_file_reason, probe, pyverbs_reason
from nvflare_rdma.fabric.verbs.devices import ROCE, PortInfo, choose_gid, choose_ports, device_file, list_ports
from nvflare_rdma.fabric.verbs.memlock import memlock_limit, memlock_needed, memlock_reason

#: Of a link, or one for each device that was asked for, if `rdma_rails` allows as many.
QUEUE_PAIRS = 2

if TYPE_CHECKING:
    from nvflare_rdma.fabric.verbs.fabric import VerbsFabric, address_on
    from nvflare_rdma.fabric.verbs.pyverbs import Context
    from nvflare_rdma.fabric.verbs.registration_cache import RegistrationCache

__all__ = [
    "ROCE",
    "Context",
    "PortInfo",
    "RegistrationCache",
    "VerbsFabric",
    "address_on",
    "choose_gid",
    "choose_ports",
    "device_file",
    "device_file_reason",
    "factory",
    "list_ports",
    "memlock_limit",
    "memlock_needed",
    "memlock_reason",
    "probe",
    "pyverbs_reason",
]

_MODULES = {
    **dict.fromkeys(("VerbsFabric", "address_on"), "fabric"),
    "Context": "pyverbs",
    "RegistrationCache": "registration_cache",
}

if not TYPE_CHECKING:  # a type checker would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def factory(options: FabricOptions) -> FabricFactory:
    """See `nvflare_rdma.fabric.registry`. All links share one cache of registered memory."""
    from nvflare_rdma.fabric.verbs.fabric import VerbsFabric, address_on
    from nvflare_rdma.fabric.verbs.registration_cache import RegistrationCache

    registrations = RegistrationCache(options.budget)
    rails = min(options.rails, max(QUEUE_PAIRS, len(options.verbs.devices)))

    def make(end: LinkEnd) -> Fabric:
        return VerbsFabric(rails, options.verbs, registrations, address_on(end.local_address))

    return make
