"""`RdmaTransfer`: the FLARE component that puts a job's tensors on data channels."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any
from urllib.parse import urlparse

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.drivers.net_utils import get_ssl_context

from nvflare_rdma.flare_compat import TRANSFER_PROP, replace_decomposer, require_flare
from nvflare_rdma.metrics.reporting import TransferReporter
from nvflare_rdma.process import this_process
from nvflare_rdma.streaming.channels import DataChannels
from nvflare_rdma.streaming.decomposers import RdmaArrayDecomposer, memory, torch_decomposer
from nvflare_rdma.streaming.registry import registry
from nvflare_rdma.streaming.sending import hot

_ANY_PORT = (0, 0)


class RdmaTransfer(FLComponent):
    """Moves torch tensors and numpy arrays of a job's messages directly between the processes that hold and want them,
    from memory to memory. Add it to the server and to the clients of a job (`nvflare_rdma.recipe.add_transfer` does).

    Where there is no direct way (a firewall, a peer without this package or component), they go on FLARE's own path,
    and one log line says why.

    Raises:
        UnsupportedVersionError: when the run starts, unless FLARE is 2.9. ConfigError: a setting is wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self._started = False
        self._reporter: TransferReporter | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """FLARE's hook: channels live as long as the run."""
        if event_type == EventType.START_RUN and not self._started:
            install()
            fl_ctx.set_prop(TRANSFER_PROP, True, private=False, sticky=True)
            self._started = True
            self._reporter = TransferReporter(self, fl_ctx)
        elif event_type == EventType.END_RUN and self._started:
            self._started = False
            if registry.stop():
                memory.clear()
            if self._reporter is not None:
                self._reporter.close()
        elif self._reporter is not None:
            self._reporter.handle_event(event_type, fl_ctx)


def install() -> None:
    """From now on FLARE's tensors and arrays move over data channels, until `registry.stop`."""
    require_flare("RdmaTransfer")
    settings = this_process().settings  # a wrong one is said now
    hot.limit = settings.rdma_memory_budget_bytes // 16
    replace_decomposer(RdmaArrayDecomposer())
    with contextlib.suppress(ImportError):  # a site without torch
        replace_decomposer(torch_decomposer())
    registry.start(open_channels)


def open_channels(cell: Any) -> DataChannels:
    """As the cell's own connections are: with its certificates, if it has any."""
    process, core, name = this_process(), cell.core_cell, cell.get_fqcn()
    credentials = core.endpoint.conn_props or {}
    ports = process.settings.rdma_data_ports
    if ports == "auto":
        ports = _ANY_PORT if FQCN.get_root(name) == FQCN.ROOT_SERVER else "none"
    url = core.root_url[0] if isinstance(core.root_url, list) else core.root_url
    host = urlparse(url or "").hostname or ""

    def tls(server_side: bool) -> ssl.SSLContext | None:
        # Also where FLARE's own connections are clear because somebody else protects them (connection_security=clear):
        # that does not protect these.
        if not (core.secure or credentials.get(DriverParams.CA_CERT.value)):
            return None
        made: ssl.SSLContext = get_ssl_context({**credentials, DriverParams.SECURE.value: True}, server_side)
        return made

    return DataChannels(name, process, tls, host, None if isinstance(ports, str) else ports)
