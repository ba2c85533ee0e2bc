"""The one place that knows which FLARE this package was written against, and what of FLARE is not public.

All other modules use FLARE as its documentation says. Whatever reaches behind that is a function here: it first calls
`require_flare`, so that another FLARE gives a clear message instead of an AttributeError deep inside it. Functions
import FLARE when they are called; to import this module takes no FLARE.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from nvflare_rdma.errors import UnsupportedVersionError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.version import __version__

_KNOWN = (2, 9)
#: The releases of it with which this package's tests have passed.
TRIED = ("2.9.0",)

#: Public context property of a run on a side that has `nvflare_rdma.streaming.RdmaTransfer`.
TRANSFER_PROP = "nvflare_rdma.transfer"
#: Private context property of a server's run whose results wait until they are added: the `Holdings`.
ACCUMULATE_PROP = "nvflare_rdma.accumulate"
#: Private context property of a run on a side that has `RdmaTransfer`: how fast messages go to each site (`LinkRates`).
RATES_PROP = "nvflare_rdma.rates"


@functools.cache
def require_flare(feature: str) -> None:
    """Raise `UnsupportedVersionError` unless FLARE 2.9 is installed, which `feature` needs; warn of one of its releases
    that was not tried."""
    try:
        installed = version("nvflare")
    except PackageNotFoundError:
        raise UnsupportedVersionError(
            f"{feature} needs NVIDIA FLARE 2.9, which is not installed. Install it: pip install 'nvflare>=2.9,<2.10'"
        ) from None
    parts = re.match(r"(\d+)\.(\d+)", installed)
    if parts is None or (int(parts[1]), int(parts[2])) != _KNOWN:
        raise UnsupportedVersionError(
            f"{feature} uses internals of NVIDIA FLARE 2.9, but {installed} is installed. "
            "Install a matching one (pip install 'nvflare>=2.9,<2.10') or a newer nvflare-rdma."
        )
    if installed not in TRIED:
        _warn_of(installed)


@functools.cache
def _warn_of(installed: str) -> None:
    """Once in a process, whatever needs FLARE."""
    get_logger(__name__).warning(
        "NVIDIA FLARE %s was not tried with nvflare-rdma %s, which was tried with %s. It is used nevertheless; if "
        "something goes wrong, install one of these, or a newer nvflare-rdma",
        installed,
        __version__,
        ", ".join(TRIED),
    )


# -- serialization -------------------------------------------------------------------------------------------


def replace_decomposer(decomposer: Any) -> None:
    """Have FLARE use `decomposer` for its type and data, in place of the one it knows, in this process.

    `fobs.register` keeps the first for a type, and FLARE registers its own early.
    """
    require_flare("RdmaTransfer")
    from nvflare.fuel.utils.class_loader import get_class_name
    from nvflare.fuel.utils.fobs import fobs

    name = get_class_name(decomposer.supported_type())
    fobs.register(decomposer)  # what else that does
    fobs._decomposers[name] = decomposer
    for dot in decomposer.supported_dots():
        fobs._dot_handlers[dot] = decomposer


class PrefixedReferences:
    """A mixin for a `ViaDownloaderDecomposer`, before it: its references begin with `reference_prefix`.

    FLARE makes the reference and the datum that names it in one private method. It runs in a process whose version
    `replace_decomposer` has checked.
    """

    reference_prefix: str

    def _create_datum(self, fobs_ctx: dict[str, Any]) -> Any:
        from nvflare.fuel.utils.fobs.decomposers.via_downloader import _CtxKey

        datum = super()._create_datum(fobs_ctx)  # type: ignore[misc]
        objects = fobs_ctx[_CtxKey.OBJECTS]
        ref_id, downloadable = objects[-1]
        objects[-1] = self.reference_prefix + ref_id, downloadable
        datum.value = json.dumps({**json.loads(datum.value), "ref_id": self.reference_prefix + ref_id})
        return datum


def offload_folder(contexts: tuple[Mapping[str, Any], ...]) -> str | None:
    """The folder for tensors that FLARE wants on disk, from the first FOBS context that says something about it; None
    if they are to be in memory.

    Raises:
        RuntimeError: FLARE wants them on disk, and no context names the folder.
    """
    require_flare("RdmaTransfer")
    from nvflare.app_common.utils.tensor_disk_offload_context import _TENSOR_DISK_OFFLOAD_ROOT_DIR
    from nvflare.fuel.utils.fobs import FOBSContextKey

    def first(key: str) -> Any:
        return next((context[key] for context in contexts if key in context), None)

    if not first(FOBSContextKey.TENSOR_DISK_OFFLOAD):
        return None
    if not (root := first(_TENSOR_DISK_OFFLOAD_ROOT_DIR)):
        raise RuntimeError(f"{_TENSOR_DISK_OFFLOAD_ROOT_DIR} is not set in the FOBS context")
    return str(root)


# -- downloads -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def abortable_download(cell: Any, source: str, ref_id: str, abort_signal: Any) -> Iterator[Any]:
    """A signal that is triggered when `abort_signal` is, or when FLARE says that `source` has died.

    FLARE has this inside its own downloads and offers no way to it.
    """
    require_flare("RdmaTransfer")
    from nvflare.fuel.f3.streaming.download_service import DownloadService

    signal = DownloadService._register_source_download(cell, source, ref_id, abort_signal)
    try:
        yield signal
    finally:
        DownloadService._unregister_source_download(source, ref_id, signal)


def cancel_download(cell: Any, source: str, ref_id: str, secure: bool, optional: bool) -> None:
    """Tell the sender's transaction that this receiver does not go on: it need not wait for the receiver's time to be
    up. If the message is lost, the sender waits as it would without it."""
    require_flare("RdmaTransfer")
    from nvflare.fuel.f3.cellnet.utils import new_cell_message
    from nvflare.fuel.f3.streaming.download_service import OBJ_DOWNLOADER_CHANNEL, OBJ_DOWNLOADER_TOPIC, _PropKey

    cell.fire_and_forget(
        channel=OBJ_DOWNLOADER_CHANNEL,
        topic=OBJ_DOWNLOADER_TOPIC,
        targets=source,
        message=new_cell_message({}, {_PropKey.REF_ID: ref_id, _PropKey.CANCEL: True}),
        secure=secure,
        optional=optional,
    )


_told_size: ContextVar[tuple[int, float] | None] = ContextVar("told_size", default=None)
_SIZE = re.compile(r"elapsed=[0-9.]+s size=[0-9.]+MB \([0-9,]+ bytes\)")


@contextlib.contextmanager
def download_logged_as(nbytes: int, seconds: float) -> Iterator[None]:
    """FLARE's line about a download that it ends in this thread meanwhile says these figures: it only confirms what has
    come directly, and counts what its own messages carry."""
    _tell_sizes()
    token = _told_size.set((nbytes, seconds))
    try:
        yield
    finally:
        _told_size.reset(token)


@functools.cache
def _tell_sizes() -> None:
    require_flare("RdmaTransfer")
    from nvflare.fuel.f3.streaming.download_service import download_object
    from nvflare.fuel.utils.log_utils import get_obj_logger

    def tell(record: logging.LogRecord) -> bool:
        if (size := _told_size.get()) is not None and isinstance(record.msg, str) and not record.args:
            nbytes, seconds = size
            true = f"elapsed={seconds:.2f}s size={nbytes / 1048576:.1f}MB ({nbytes:,} bytes)"
            record.msg = _SIZE.sub(true, record.msg)
        return True

    get_obj_logger(download_object).addFilter(tell)


def add_download_progress(ref_id: str, receiver: str, nbytes: int, count: int) -> None:
    """Tell FLARE's transaction what has arrived at a receiver: for its log line and the sender's callback.

    FLARE counts what its messages carry, and offers no way to count anything else.
    """
    require_flare("RdmaTransfer")
    from nvflare.fuel.f3.streaming.download_service import DownloadService

    ref = DownloadService._ref_table.get(ref_id)
    if ref is not None:
        ref.mark_active()
        ref.mark_receiver_active(receiver)
        ref.tx.add_total_bytes(nbytes)
        ref.emit_progress(receiver_id=receiver, bytes_delta=nbytes, items_delta=count)


# -- object streams ------------------------------------------------------------------------------------------


class ContainerKeys(NamedTuple):
    """Where FLARE's `ContainerStreamer` has a container's type, size and result in a stream's context."""

    type: str
    size: str
    result: str


def container_keys() -> ContainerKeys:
    """The keys, which FLARE keeps to itself."""
    require_flare("ContainerStreamer")
    from nvflare.app_common.streamers import container_streamer as flare

    return ContainerKeys(flare._CTX_TYPE, flare._CTX_SIZE, flare._CTX_RESULT)


# -- cells ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellConnections:
    """How a cell's own connections are made, which is how its links are made, too.

    Attributes:
        url: how the server is reached; "" if that is unknown.
        parent_url: how the cell reaches its parent; "" if it has none.
        secure: whether links need TLS.
        credentials: FLARE's connection parameters, with the paths of certificates.
        identities: maps a cell's name, which stands for all names below it, too, to the common name in its
            certificate.
    """

    url: str
    secure: bool
    credentials: Mapping[str, Any]
    identities: Mapping[str, str] = field(default_factory=dict)
    parent_url: str = ""


def cell_connections(cell: Any) -> CellConnections:
    """What a FLARE `Cell` knows of its own connections."""
    require_flare("RdmaTransfer")
    from nvflare.fuel.f3.drivers.driver_params import DriverParams

    core = cell.core_cell
    credentials = dict(core.endpoint.conn_props or {})
    url = core.root_url[0] if isinstance(core.root_url, list) else core.root_url
    # Also where FLARE's own connections are clear because somebody else protects them (connection_security=clear):
    # that does not protect these.
    secure = bool(core.secure or credentials.get(DriverParams.CA_CERT.value))
    resolver = core.identity_resolver
    # This cell's own name stands for the cells below it here, too. Nobody else's does.
    own = cell.get_fqcn()
    exact = {name: identity for name, identity in resolver.exact_identity_map.items() if name == own}
    identities = {**resolver.prefix_identity_map, **exact}
    return CellConnections(url or "", secure, credentials, identities, core.parent_url or "")


def answers(cell: Any, name: str, seconds: float) -> bool:
    """Whether the cell `name` says something within so many seconds to the echo request that FLARE's cells answer."""
    require_flare("RdmaTransfer")
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
    from nvflare.fuel.f3.cellnet.net_agent import _CHANNEL, _TOPIC_ECHO
    from nvflare.fuel.f3.message import Message

    reply = cell.core_cell.send_request(
        channel=_CHANNEL, topic=_TOPIC_ECHO, target=name, request=Message(), timeout=seconds, optional=True
    )
    nobody = (ReturnCode.TIMEOUT, ReturnCode.TARGET_UNREACHABLE, ReturnCode.COMM_ERROR)
    return reply.get_header(MessageHeaderKey.RETURN_CODE) not in nobody


def connected_to(cell: Any, name: str, seconds: float) -> list[str] | None:
    """The names of the cells with which the cell `name` has connections; None if it does not say within so many
    seconds."""
    require_flare("RdmaTransfer")
    from nvflare.fuel.f3.cellnet.net_agent import _CHANNEL, _TOPIC_PEERS
    from nvflare.fuel.f3.message import Message

    reply = cell.core_cell.send_request(
        channel=_CHANNEL, topic=_TOPIC_PEERS, target=name, request=Message(), timeout=seconds, optional=True
    )
    return list(map(str, reply.payload)) if isinstance(reply.payload, list) else None


def wait_for_results(cell: Any, moving: Callable[[], bool]) -> None:
    """Have the request by which a site's job process hands in a result wait for the answer as long as `moving` says
    that something of it is on its way, and then once more for its usual time.

    The server answers when it has the whole result. FLARE lets its requests wait in this way, but not this one: a
    result that takes longer than the request's time is sent again while it is still on its way.
    """
    require_flare("RdmaTransfer")
    from nvflare.apis.fl_constant import ServerCommandNames
    from nvflare.fuel.f3.cellnet.defs import CellChannel

    result = {"channel": CellChannel.SERVER_COMMAND, "topic": ServerCommandNames.SUBMIT_UPDATE}

    if "_send_request" in vars(cell):  # done
        return
    send = cell._send_request

    def send_request(*args: Any, **others: Any) -> Any:
        if result.items() <= others.items():
            others.setdefault("progress_wait_cb", moving)
        return send(*args, **others)

    cell._send_request = send_request


class ResultLost(BaseException):
    """Ends the work of the thread that decodes a site's result, of which the rest will never come.

    At a server, FLARE takes an `Exception` there for the failure of the whole job, and ends its process: a site that
    lives would wait for an answer. Nobody waits for this one, and other sites' results may be enough.
    """


def sender_of_result(message: Any) -> str:
    """The cell that sent a FLARE message, or None, if it brings the server a site's result of a task; else ""."""
    if message is None:
        return ""
    require_flare("RdmaTransfer")
    from nvflare.apis.fl_constant import ServerCommandNames
    from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
    from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey

    where = [message.get_header(key) for key in (StreamHeaderKey.CHANNEL, StreamHeaderKey.TOPIC)]
    is_result = where == [CellChannel.SERVER_COMMAND, ServerCommandNames.SUBMIT_UPDATE]
    return str(message.get_header(MessageHeaderKey.ORIGIN) or "") if is_result else ""


class MessageForDownload:
    """A mixin for a `ViaDownloaderDecomposer`, before it: its `download` gets the message that names the reference as
    `message`, None if there is none."""

    def _get_download_kwargs(self, fobs_ctx: dict[str, Any]) -> dict[str, Any]:
        from nvflare.fuel.utils.fobs import FOBSContextKey

        return {**super()._get_download_kwargs(fobs_ctx), "message": fobs_ctx.get(FOBSContextKey.MESSAGE)}  # type: ignore[misc]


def report_ended(fl_ctx: Any, site: str, seconds: float, told: Any = None) -> Any:
    """Have the workflow of a server's run take `site` for disconnected in so many seconds at the latest, unless FLARE
    hears of it before: FLARE's `dead_client_grace_period` is for sites of which nothing is known.

    Returns the workflow; nothing is done if it is the one that was `told`, or if it is None, as none runs.
    """
    require_flare("RdmaTransfer")
    from nvflare.apis.fl_constant import FLContextKey

    runner = fl_ctx.get_prop(FLContextKey.RUNNER)
    workflow = runner.current_wf if runner is not None else None
    if workflow is None or workflow is told:
        return workflow
    runner.handle_dead_job(site, fl_ctx)
    communicator = workflow.controller.communicator
    with communicator._dead_clients_lock:
        status = communicator._dead_clients.get(site)
        if status is not None:
            earlier = time.time() - communicator._dead_client_grace + seconds
            status.report_time = min(status.report_time, earlier)
    return workflow


def identity_resolver(identities: Mapping[str, str]) -> Callable[[str], str]:
    """FLARE's rule for the common name that a cell's certificate has to have, given the cell's name and what
    `CellConnections.identities` says."""
    require_flare("RdmaTransfer")
    from nvflare.fuel.f3.cellnet.identity import CellIdentityResolver

    resolve: Callable[[str], str] = CellIdentityResolver(prefix_identity_map=dict(identities)).resolve
    return resolve


def max_frame_bytes() -> int:
    """The largest frame that FLARE's drivers carry."""
    from nvflare.fuel.f3.drivers.net_utils import MAX_FRAME_SIZE

    return int(MAX_FRAME_SIZE)


def replace_blob_task(task: type) -> None:
    """Have FLARE put together the blobs of this process with `task`, which is derived from its `BlobTask`."""
    require_flare("The rdma driver")
    from nvflare.fuel.f3.streaming import blob_streamer

    blob_streamer.BlobTask = task


def take_over_schemes(driver: type) -> None:
    """Have FLARE use `driver` for its schemes in this process, in place of what it has for them. FLARE itself keeps the
    first driver of a scheme, and registers its own before it looks at folders of others."""
    require_flare("rdma_upgrade")
    from nvflare.fuel.f3 import communicator

    for scheme in driver.supported_transports():  # type: ignore[attr-defined]
        communicator.driver_mgr.drivers[scheme] = driver


def driver_of(url: str) -> type | None:
    """The class of the driver that FLARE has for a URL in this process, None if it has none."""
    require_flare("ParentDoor")
    from nvflare.fuel.f3 import communicator

    return communicator.driver_mgr.find_driver_class(url)  # type: ignore[no-any-return]


# -- recipes and jobs ----------------------------------------------------------------------------------------


def job_of(target: Any, feature: str) -> Any:
    """The `FedJob` of a `Recipe`; a FedJob is its own."""
    require_flare(feature)
    from nvflare.recipe.spec import Recipe

    return target._job if isinstance(target, Recipe) else target


def apps_of(target: Any, feature: str) -> dict[str, Any]:
    """The apps of a `Recipe` or `FedJob` by site, "server" and "@ALL" among them. FLARE has no public list."""
    apps: dict[str, Any] = job_of(target, feature)._deploy_map
    return apps


def prepare_client_apps(target: Any, feature: str) -> None:
    """Give each site of a `Recipe` that was configured per site its own app now, and not when the job is exported."""
    if job_of(target, feature) is not target:
        target._ensure_client_apps_prepared()


def use_installed_package(job: Any) -> None:
    """Keep FLARE from copying sources of this package into a `FedJob`, as it does with packages that it doesn't know.

    The package is installed on every site, and a partial copy of another version would hide it there.
    """
    job.set_app_packages(sorted({*job.job.app_packages, "nvflare_rdma"}))


def filters_of(runner: Any, section: str) -> Any:
    """The filter table `section` of FLARE's ServerRunner (which has it in its config) or ClientRunner."""
    require_flare("The check for matching filters")
    return getattr(runner if hasattr(runner, section) else runner.config, section)


def apply_dxo_filter(component: Any, dxo: Any, shareable: Any, fl_ctx: Any) -> Any:
    """What FLARE's `DXOFilter` does with one DXO: `process_dxo`, the DXO's filter history, and the job's audit log."""
    require_flare("A filter")
    return component._apply_filter(dxo, shareable, fl_ctx)


def streams_tensors(fl_ctx: Any, task: str) -> bool:
    """Whether this side's job has FLARE's TensorServerStreamer or TensorClientStreamer for `task`
    (`Recipe.enable_tensor_streaming`): what leaves the filters is then saved in files' format and sent, whatever marks
    it has."""
    require_flare("A filter")
    engine = fl_ctx.get_engine()
    if hasattr(engine, "get_all_components"):  # a client's; a server has no such call
        components = engine.get_all_components()
    else:
        components = getattr(getattr(engine, "run_manager", None), "components", None)
    streamers = {"TensorServerStreamer", "TensorClientStreamer"}  # by name, since to import them takes torch
    return any(
        any(cls.__name__ in streamers for cls in type(component).__mro__) and task in component.tasks
        for component in (components or {}).values()
    )


# -- the simulator -------------------------------------------------------------------------------------------


def simulator_entry() -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """What adds the options of `nvflare simulator` to a parser, and what runs the parsed ones."""
    require_flare("nvflare_rdma.simulator")
    from nvflare.private.fed.app.simulator.simulator import define_simulator_parser, run_simulator

    return define_simulator_parser, run_simulator


def patch_simulator(scheme: str, open_ports: Callable[[int], list[int]]) -> None:
    """Have the simulator of this process, and the sites it will start, use `scheme`, and take ports from
    `open_ports`."""
    require_flare("nvflare_rdma.simulator")
    from nvflare.private.fed.app.deployer import simulator_deployer
    from nvflare.private.fed.app.simulator import simulator_runner

    class SchemeDeployer(simulator_deployer.SimulatorDeployer):
        """SimulatorDeployer builds both configs with a fixed scheme; the sites take theirs from the client's."""

        def _create_simulator_server_config(self, admin_storage: str, max_clients: int) -> dict[str, Any]:
            config: dict[str, Any] = super()._create_simulator_server_config(admin_storage, max_clients)
            config["service"]["scheme"] = scheme
            return config

        def _create_simulator_client_config(self, client_name: str, args: Any) -> Any:
            config, build_ctx = super()._create_simulator_client_config(client_name, args)
            for server in config["servers"]:
                server["service"]["scheme"] = scheme
            return config, build_ctx

    simulator_runner.SimulatorDeployer = SchemeDeployer
    simulator_deployer.get_open_ports = simulator_runner.get_open_ports = open_ports
