"""The parent processes of FLARE's jobs: each may have one port, through which peers come to all its job processes.

A job process asks a parent for a route by a message, whose origin FLARE has authenticated. What goes over the route is
in `nvflare_rdma.transfer.junction` and `remote_listener`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlparse

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message

from nvflare_rdma.channel import Door
from nvflare_rdma.errors import FabricUnavailable, ProtocolError
from nvflare_rdma.flare_compat import CellConnections, cell_connections, driver_of, require_flare
from nvflare_rdma.logs import get_logger
from nvflare_rdma.runtime import shared, this_runtime
from nvflare_rdma.transfer import Junction, MeetingPlace, RouteKey, are_hosts, listen, own_hosts, site_of

log = get_logger(__name__)

_CHANNEL, _TOPIC = "nvflare_rdma", "route"
_ANSWER_SECONDS = 5.0
_JOB_IS_OVER = (EventType.JOB_COMPLETED, EventType.JOB_ABORTED, EventType.JOB_CANCELLED)
_ANY_HOST = ("", "0", "0.0.0.0", "::")


class ParentDoor(FLComponent):
    """Gives a server or site one port for the direct links of all its jobs: the first free one of `rdma_data_ports` in
    its `comm_config.json`; without that setting a server's own port, where the `rdma` driver has it. Add it to the
    components in its `local/resources.json`.

    Its job processes are then reached through this port by whoever can't reach them straight, and so are other sites'
    by each other through the server's. It joins connections and reads nothing: TLS, tickets and seals are those of
    the processes at both ends.

    Raises:
        UnsupportedVersionError: when FLARE starts, unless it is 2.9. ConfigError: a setting is wrong.
    """

    __module__ = "nvflare_rdma.streaming"  # the public name, which is in configurations

    def __init__(self) -> None:
        super().__init__()
        self._junction: Junction | None = None
        self._door: Door | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """FLARE's hook: the port is open as long as the parent runs."""
        if event_type == EventType.SYSTEM_START and self._junction is None:
            require_flare("ParentDoor")
            self._start(fl_ctx.get_engine().get_cell())
        elif event_type == EventType.SYSTEM_END and self._junction is not None:
            for magic in self._junction.takers:
                shared().ports.remove_taker(magic)
            self._junction.close()
            if self._door is not None:
                self._door.close()
            self._door = self._junction = None
        elif event_type in _JOB_IS_OVER and self._junction is not None and (job := _job_of(fl_ctx)):
            self._junction.close_routes(job)

    def _start(self, cell: Any) -> None:
        runtime, fqcn = this_runtime(), cell.get_fqcn()
        ports, shares, port = runtime.settings.rdma_data_ports, _shares_flares_port(cell), 0
        if isinstance(ports, str) and not shares:
            log.warning("ParentDoor opens no port, since rdma_data_ports is %r: set it to a port", ports)
            return
        name = f"the data port of {fqcn}"
        self._junction = junction = Junction(site_of(fqcn), name)
        if not isinstance(ports, str):
            try:
                self._door = Door(listen("", ports), None, runtime.tcp(), junction.refuse, name)
            except OSError as error:
                log.error("ParentDoor opens no port, so its jobs need ports of their own: %s", error)
                return
            self._door.takers = dict(junction.takers)
            threading.Thread(target=self._door.serve, name="rdma-parent-door", daemon=True).start()
            port = self._door.address[1]
        else:
            for magic, taker in junction.takers.items():
                shared().ports.add_taker(magic, taker)
        cell.register_request_cb(channel=_CHANNEL, topic=_TOPIC, cb=functools.partial(_answer, junction, fqcn, port))
        log.info(
            "%s joins the direct links of all its jobs at %s", fqcn, f"port {port}" if port else "FLARE's own port"
        )


def _shares_flares_port(cell: Any) -> bool:
    """Whether the port at which the sites reach the server is the `rdma` driver's, which takes routes, too. It may not
    listen yet when FLARE says that the system has started."""
    if cell.get_fqcn() != FQCN.ROOT_SERVER:
        return False
    return bool(getattr(driver_of(cell_connections(cell).url), "shares_its_port", False))


def _job_of(fl_ctx: FLContext) -> str:
    """The job that an event is about: a server and a client have it in different places."""
    data = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
    job = data.get(JobMetaKey.JOB_ID.value) if isinstance(data, dict) else None
    return str(job or fl_ctx.get_prop(FLContextKey.CURRENT_JOB_ID) or "")


def _answer(junction: Junction, parent: str, port: int, message: Any) -> Any:
    """Make a route to the cell that asks: one of this parent's or, if it is the server's, of any site."""
    origin = str(message.get_header(MessageHeaderKey.ORIGIN))
    if parent != FQCN.ROOT_SERVER and site_of(origin) != site_of(parent):
        return make_reply(ReturnCode.UNAUTHENTICATED, f"{origin} is not of this site")
    try:
        key = junction.open(origin)
    except ProtocolError as error:
        return make_reply(ReturnCode.SERVICE_UNAVAILABLE, str(error))
    return make_reply(ReturnCode.OK, "", {"id": key.id, "secret": key.secret, "port": port, "hosts": own_hosts()})


def meeting_function(cell: Any, site: CellConnections, server: tuple[str, int]) -> Callable[[str], MeetingPlace]:
    """A function that has a parent, by the site's name, make a route to `cell`. It raises FabricUnavailable where that
    one has no `ParentDoor`."""

    def meet(parent: str) -> MeetingPlace:
        own = parent == site_of(cell.get_fqcn())
        if own and not site.parent_url:
            raise FabricUnavailable(f"{cell.get_fqcn()} has no parent")  # as in the simulator
        host = urlparse(site.parent_url).hostname if own else server[0]
        reply = cell.send_request(
            channel=_CHANNEL,
            topic=_TOPIC,
            target=FQCN.get_parent(cell.get_fqcn()) if own else parent,
            request=new_cell_message({}, {}),
            timeout=_ANSWER_SECONDS,
            optional=True,
        )
        if (code := reply.get_header(MessageHeaderKey.RETURN_CODE)) != ReturnCode.OK:
            raise FabricUnavailable(f"{parent} joins no connections, as it has no ParentDoor ({code})")
        key, hosts, port = _parse(reply.payload)
        near = ("127.0.0.1" if own and host in (None, *_ANY_HOST) else host or "", port or server[1])
        if not all(near):
            raise FabricUnavailable(f"{cell.get_fqcn()} doesn't know where {parent} can be reached")
        return MeetingPlace(key, near, hosts, port)

    return meet


def _parse(payload: Any) -> tuple[RouteKey, list[str], int]:
    match payload:
        case {"id": bytes(id), "secret": bytes(secret), "port": int(port), "hosts": hosts} if (
            0 <= port < 65536 and are_hosts(hosts)
        ):
            try:
                return RouteKey(id, secret), list(hosts), port
            except ProtocolError as error:
                raise FabricUnavailable(str(error)) from error
    raise FabricUnavailable("the parent's answer about its port is malformed")
