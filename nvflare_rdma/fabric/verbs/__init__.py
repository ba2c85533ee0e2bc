"""RDMA devices (InfiniBand, RoCE, iWARP) through libibverbs and pyverbs. Importing this loads no pyverbs."""

from __future__ import annotations

from nvflare_rdma.fabric.base import Fabric
from nvflare_rdma.fabric.options import FabricOptions
from nvflare_rdma.fabric.registry import FabricFactory, LinkEnd
from nvflare_rdma.fabric.verbs.availability import probe

__all__ = ["factory", "probe"]


def factory(options: FabricOptions) -> FabricFactory:
    """See `nvflare_rdma.fabric.registry`. All links share one cache of registered memory."""
    from nvflare_rdma.fabric.verbs.fabric import VerbsFabric, address_on
    from nvflare_rdma.fabric.verbs.registration_cache import RegistrationCache

    registrations = RegistrationCache(options.budget)

    def make(end: LinkEnd) -> Fabric:
        return VerbsFabric(options.rails, options.verbs, registrations, address_on(end.local_address))

    return make
