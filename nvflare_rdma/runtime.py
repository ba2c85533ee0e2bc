"""What a process shares, all of it in one place: settings, memory, fabrics, links, and what its transfers know.

`this_runtime` gives the `Runtime` for the settings as they are now. It is handed down: `install` gives it to what moves
tensors, the driver to its links. What FLARE makes by class name, without arguments, asks `shared` when it is used.
Tests make a `Runtime` or a `Shared` of their own. To import this module takes no FLARE.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nvflare_rdma.accumulate import Holdings
from nvflare_rdma.channel import ChannelLimits, LinkContext, SharedPorts
from nvflare_rdma.errors import RdmaError
from nvflare_rdma.fabric import (
    Availability,
    Fabric,
    FabricFactory,
    LinkEnd,
    MemoryBudget,
    RailPlaces,
    SendMemory,
    SlotPool,
    TcpFabric,
    factories,
    host_identity,
    plain_host,
    probe,
)
from nvflare_rdma.flare_compat import max_frame_bytes
from nvflare_rdma.logs import get_logger
from nvflare_rdma.settings import Settings, load_settings
from nvflare_rdma.transfer import (
    EncodedChunkCache,
    Ledger,
    LongWaits,
    Notices,
    PeerLinks,
    Service,
    SitePlaces,
    StreamRequestRouter,
    TensorMemory,
    stream_places,
    waiting_places,
)

log = get_logger(__name__)


class LinksByCell:
    """The links of each FLARE cell of a process to its peers, made when the cell's tensors first need them.

    FLARE has more than one cell in a process (the simulator's server has one for the job and one for itself), and
    which of them sends or receives a message shows only when it does. There are links between `start` and `stop`;
    these may be nested, as a process may have several runs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = 0
        self._process = os.getpid()
        self._make: Callable[[Any], PeerLinks] | None = None
        self._links: dict[str, PeerLinks | None] = {}

    def start(self, make: Callable[[Any], PeerLinks]) -> None:
        """A run begins: from now on `make` opens the links of a FLARE `Cell`."""
        with self._lock:
            self._runs += 1
            self._make = make

    def stop(self) -> bool:
        """A run has ended; with the last one all links are closed. Returns whether it was the last. A forked process,
        which may call it when it exits, leaves them to its parent."""
        if self._process != os.getpid():
            return False
        with self._lock:
            self._runs = max(self._runs - 1, 0)
            if self._runs:
                return False
            links, self._links, self._make = list(self._links.values()), {}, None
        for opened in links:
            if opened is not None:
                opened.close()
        return True

    def of(self, cell: Any) -> PeerLinks | None:
        """The links of `cell`; None outside of runs, or if they can't be made, which is logged once."""
        name = cell.get_fqcn()
        with self._lock:
            if name not in self._links and self._make is not None:
                try:
                    self._links[name] = self._make(cell)
                except (RdmaError, OSError, RuntimeError) as error:
                    log.error("%s can't have data links, so its tensors take FLARE's own path: %s", name, error)
                    self._links[name] = None
            return self._links.get(name)


def large_tensors_in_huge_pages() -> None:
    """Have torch take the memory of large tensors in huge pages, in this process and in those that it starts, unless
    the environment says otherwise.

    A model that is copied, or comes from a file, is written to memory that nobody has touched: in pages of 4 KiB that
    takes two to four times as long. torch looks when it makes its first tensor (c10/core/impl/alloc_cpu.cpp); after
    that it is of no use to this process. numpy asks for huge pages by itself.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class EnvironmentChanges:
    """Environment variables of this process that are set for as long as any of its runs needs them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = 0
        self._before: dict[str, str | None] = {}

    def add(self, variables: Callable[[], Mapping[str, str]]) -> None:
        """Set what `variables` returns, for one run more."""
        with self._lock:
            for name, value in variables().items():
                self._before.setdefault(name, os.environ.get(name))
                os.environ[name] = value
            self._runs += 1

    def remove(self) -> None:
        """One run needs them no more; with the last, the environment is as it was before the first."""
        with self._lock:
            self._runs -= 1
            if self._runs:
                return
            before, self._before = self._before, {}
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@dataclass(frozen=True, eq=False)
class Shared:
    """What all transfers of a process share, whatever its settings say.

    Attributes:
        links: the links of the process's cells.
        stream_requests: the streams that the process sends.
        waiting_places: for threads of FLARE's that wait for a site.
        stream_places: for streams that are received from a site.
        tensor_memory: the memory in which tensors arrive.
        encoded_chunks: chunks that were encoded for one receiver and that others are about to want.
        ledger: takes the record of each transfer to those who want to know.
        long_waits: tells people how far transfers are.
        notices: what was said in the log of transfers with each peer.
        environment: what is handed on to the processes that FLARE starts.
        holdings: what is held of results that wait until they are added.
        services: those that serve what the process sends.
        blob_memory: the memory in which FLARE puts together large blobs.
        ports: the ports that FLARE's connections come to by the driver, for other connections of this package.
        rail_places: of the rails that peers have opened to the process.
    """

    links: LinksByCell = field(default_factory=LinksByCell)
    stream_requests: StreamRequestRouter = field(default_factory=StreamRequestRouter)
    waiting_places: SitePlaces = field(default_factory=waiting_places)
    stream_places: SitePlaces = field(default_factory=stream_places)
    tensor_memory: TensorMemory = field(default_factory=TensorMemory)
    encoded_chunks: EncodedChunkCache = field(default_factory=EncodedChunkCache)
    ledger: Ledger = field(default_factory=Ledger)
    long_waits: LongWaits = field(default_factory=LongWaits)
    notices: Notices = field(default_factory=Notices)
    environment: EnvironmentChanges = field(default_factory=EnvironmentChanges)
    holdings: Holdings = field(default_factory=Holdings)
    services: weakref.WeakSet[Service] = field(default_factory=weakref.WeakSet)
    blob_memory: SlotPool = field(default_factory=lambda: SlotPool(keep_bytes=None))
    ports: SharedPorts = field(default_factory=SharedPorts)
    rail_places: RailPlaces = field(default_factory=RailPlaces)


@dataclass(frozen=True)
class Runtime:
    """What all links of a process that were made with the same settings share.

    Attributes:
        context: for links that carry FLARE's frames; its budget and pool are everybody's.
        factories: make the fabrics that this process can use, by name.
        shared: what also links with other settings share.
    """

    settings: Settings
    context: LinkContext
    factories: Mapping[str, FabricFactory]
    shared: Shared = field(default_factory=Shared)

    @property
    def ledger(self) -> Ledger:
        """Where the records of transfers go."""
        return self.shared.ledger

    @property
    def long_waits(self) -> LongWaits:
        """Which tells people how far transfers are."""
        return self.shared.long_waits

    @property
    def waiting_places(self) -> SitePlaces:
        """For threads of FLARE's that wait for a site."""
        return self.shared.waiting_places

    def tcp(self, dial: Callable[[], socket.socket] | None = None, most_rails: int | None = None) -> TcpFabric:
        """The tcp fabric of a door, or of a link that `dial` makes the rails of, at most so many."""
        made = self.factories[TcpFabric.name](LinkEnd(dial=dial, most_rails=most_rails))
        assert isinstance(made, TcpFabric)
        return made

    def fabrics(self, tcp: TcpFabric, sock: socket.socket) -> dict[str, Fabric]:
        """What a link whose control stream is on `sock` can use; `tcp` is its own, or that of the door it came by."""
        end = LinkEnd(plain_host(str(sock.getsockname()[0])))
        others = {name: make(end) for name, make in self.factories.items() if name != tcp.name}
        return {tcp.name: tcp, **others}


_shared = Shared()
_runtimes: dict[Settings, Runtime] = {}
_lock = threading.Lock()
_parents: list[Shared] = []


def _begin_anew() -> None:
    """In a forked process: the links and whatever else was shared are the parent's, who goes on with them. They are
    kept, so that nothing of them is freed, and not used."""
    global _shared, _lock
    _parents.append(_shared)
    _shared, _lock = Shared(long_waits=_shared.long_waits.anew()), threading.Lock()
    _runtimes.clear()


os.register_at_fork(after_in_child=_begin_anew)


def shared() -> Shared:
    """The process's own. It does not look at the settings, so it never fails."""
    return _shared


def this_runtime() -> Runtime:
    """The runtime for the settings as they are now, one for all callers.

    Raises:
        ConfigError: a setting is wrong.
    """
    settings = load_settings()
    with _lock:
        if settings not in _runtimes:
            _runtimes[settings] = runtime_of(settings)
        return _runtimes[settings]


def runtime_of(settings: Settings) -> Runtime:
    """A runtime of its own for these settings, but for what all of them share.

    Raises:
        ConfigError: this kernel has nothing of what a setting names.
    """
    available = probe(settings.fabric_options)
    return Runtime(settings, make_context(settings, available), factories(settings.fabric_options, available), shared())


def make_context(settings: Settings, available: Mapping[str, Availability]) -> LinkContext:
    """The context of links with these settings, with memory of its own. `available` is what `probe` has found."""
    return LinkContext(
        limits=ChannelLimits(max_message_bytes=max_frame_bytes()),
        **make_memory(settings.rdma_memory_budget_bytes),
        order=settings.rdma_fabrics,
        unavailable={name: state.reason for name, state in available.items()},
        host=host_identity(),
        controller=settings.rdma_controller,
        chunk_bytes=settings.rdma_chunk_bytes,
        integrity=settings.rdma_integrity,
        rail_places=shared().rail_places,
    )


def make_memory(budget: int) -> dict[str, Any]:
    """The parts of a `LinkContext` that hold memory, together at most `budget` bytes: a sixteenth is left for chunks
    that several receivers want (`Shared.encoded_chunks`), three are for what is sent, twelve for what arrives."""
    sixteenth, pool = budget // 16, SlotPool(keep_bytes=None, most_bytes=budget)
    return {"budget": MemoryBudget(12 * sixteenth), "pool": pool, "sending": SendMemory(pool, 3 * sixteenth)}
