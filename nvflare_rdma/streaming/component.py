"""`RdmaTransfer`: the FLARE component that moves a job's tensors over links of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import ssl
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.drivers.net_utils import get_ssl_context
from nvflare.fuel.utils.app_config_utils import get_positive_float_var

from nvflare_rdma.errors import RdmaError
from nvflare_rdma.filters import tell_what_is_decoded
from nvflare_rdma.flare_compat import (
    ACCUMULATE_PROP,
    RATES_PROP,
    TRANSFER_PROP,
    cell_connections,
    replace_decomposer,
    require_flare,
    wait_for_results,
)
from nvflare_rdma.logs import escaped
from nvflare_rdma.metrics import TransferReporter
from nvflare_rdma.runtime import large_tensors_in_huge_pages, shared, this_runtime
from nvflare_rdma.settings import Settings, as_time, load_settings, parse_patience
from nvflare_rdma.streaming.absence import Absences, EndedSites
from nvflare_rdma.streaming.decomposers import RdmaArrayDecomposer, torch_decomposer
from nvflare_rdma.streaming.identity import identifier
from nvflare_rdma.streaming.leftovers import Leftovers
from nvflare_rdma.streaming.parents import meeting_function
from nvflare_rdma.streaming.rates import LinkRates
from nvflare_rdma.streaming.ties import Ties
from nvflare_rdma.streaming.trainer import hand_on, inherited_site, is_trainer, take_back
from nvflare_rdma.timers import too_short
from nvflare_rdma.transfer import PeerLinks

_ANY_PORT = (0, 0)
_ANY_HOST = ("", "0", "0.0.0.0", "::")
#: Public context property of a run on a side where `RdmaTransfer` could not start: the reason.
FAILURE_PROP = "nvflare_rdma.transfer_failure"
_MAX_FAILURE, _MOST_TOLD = 1000, 1000


class RdmaTransfer(FLComponent):
    """Moves torch tensors and numpy arrays of a job's messages directly between the processes that hold and want them,
    from memory to memory. Add it to the server and to the clients of a job (`nvflare_rdma.recipe.add_transfer` does).

    A trainer that FLARE starts in a process of its own (`launch_external_process`) gets it from the site's job process.

    Where there is no direct way (a firewall, a peer without this component), they take FLARE's own path, and one log
    line for each peer and reason says why. A site without this package can't load it: leave it out there.

    Args:
        accumulate: at the server, keep torch tensors as they came until an aggregator adds them: in few bits where they
            came so, and on disk where they are more than the memory budget. The aggregator gets tensors that do this
            by themselves, and that become plain ones when anything else is done with them. At a site it means nothing.
        patience: how long a transfer whose link is gone waits for its peer: seconds, or a text such as "4h"; None for
            what the setting `rdma_patience` says. `add_transfer(recipe, patience=...)` lengthens FLARE's timers, too.

    Raises:
        UnsupportedVersionError: when the run starts, unless FLARE is 2.9. ConfigError: `patience`, or a setting, is
            wrong.
    """

    __module__ = "nvflare_rdma.streaming"  # the public name, which FLARE writes into exported jobs

    def __init__(self, accumulate: bool = True, patience: str | float | None = None) -> None:
        super().__init__()
        large_tensors_in_huge_pages()
        # FLARE writes arguments into an exported job config from attributes of their names.
        self.accumulate = accumulate
        self.patience = None if patience is None else parse_patience(patience, "patience")
        self._started = False
        self._accumulating = False
        self._handed_on = False
        self._reporter: TransferReporter | None = None
        self._rates: LinkRates | None = None
        self._told: set[tuple[str, str]] = set()
        self._ties = Ties()
        self._leftovers: Leftovers | None = None
        self._ended_sites: EndedSites | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """FLARE's hook: links live as long as the run."""
        if event_type == EventType.END_RUN and self._handed_on:  # also of a run that did not start
            self._handed_on = False
            take_back()
        if event_type == EventType.ABOUT_TO_START_RUN and not self._handed_on:
            # Clients only, before START_RUN starts the trainer.
            require_flare("RdmaTransfer")
            hand_on(fl_ctx.get_engine().get_cell(), self.patience)
            self._handed_on = True
        elif event_type == EventType.START_RUN and not self._started:
            *above, job = FQCN.split(fl_ctx.get_engine().get_cell().get_fqcn())
            if above == [FQCN.ROOT_SERVER]:
                self._ended_sites = EndedSites(fl_ctx.get_engine(), job)
            self._install(fl_ctx)
            fl_ctx.set_prop(TRANSFER_PROP, True, private=False, sticky=True)
            tell_what_is_decoded(fl_ctx)
            self._started = True
            self._rates = LinkRates(shared().ledger, fl_ctx.get_engine().get_cell().get_fqcn())
            fl_ctx.set_prop(RATES_PROP, self._rates, private=True, sticky=True)
            if FQCN.get_root(fl_ctx.get_engine().get_cell().get_fqcn()) == FQCN.ROOT_SERVER:
                self._leftovers = Leftovers(shared().holdings.disk)
                if self.accumulate:
                    self._keep_results_encoded(fl_ctx)
            more = shared().holdings.take if self._accumulating else dict
            self._reporter = TransferReporter(self, fl_ctx, shared().ledger, more)
        elif event_type == EventType.END_RUN and self._started:
            self._started = False
            self._leftovers = self._ended_sites = None
            if self._rates is not None:
                self._rates.stop()
            if self._accumulating:
                self._accumulating = False
                shared().holdings.stop()
            if shared().links.stop():
                shared().tensor_memory.clear()
                shared().notices.clear()
            if self._reporter is not None:
                self._reporter.close()
        else:
            self._ties.handle_event(event_type, fl_ctx)
            if (leftovers := self._leftovers) is not None:  # another thread may end the run meanwhile
                leftovers.handle_event(event_type, fl_ctx)
            if (ended := self._ended_sites) is not None:
                ended.handle_event(event_type, fl_ctx)
            if event_type in (EventType.BEFORE_TASK_DATA_FILTER, EventType.BEFORE_TASK_RESULT_FILTER):
                self._say_what_failed_there(fl_ctx)
            if self._reporter is not None:
                self._reporter.handle_event(event_type, fl_ctx)

    def _keep_results_encoded(self, fl_ctx: FLContext) -> None:
        budget = load_settings().rdma_memory_budget_bytes
        shared().holdings.start(budget)
        self._accumulating = True
        fl_ctx.set_prop(ACCUMULATE_PROP, shared().holdings, private=True, sticky=True)
        what = (
            "Results that come in few bits stay encoded here until an aggregator adds them; what is beyond "
            f"{budget} bytes (rdma_memory_budget_bytes) waits on disk, "
            f"in {tempfile.gettempdir()}"
        )
        self.log_info(fl_ctx, escaped(what))

    def _install(self, fl_ctx: FLContext) -> None:
        """Call `install`. If it fails, the other side is told why: its log is read where this one's is not."""
        try:
            install(_server_host(fl_ctx), self.patience, self._ended_sites.add if self._ended_sites else _no_matter)
            wait_for_results(
                fl_ctx.get_engine().get_cell(), lambda: any(each.is_busy for each in list(shared().services))
            )
            self._say_what_ends_first(fl_ctx)
        except RdmaError as error:
            fl_ctx.set_prop(FAILURE_PROP, str(error)[:_MAX_FAILURE], private=False, sticky=True)
            raise

    def _say_what_ends_first(self, fl_ctx: FLContext) -> None:
        """Log which of FLARE's timers of this side don't wait as long as transfers do."""
        settings = load_settings()
        patience = settings.rdma_patience if self.patience is None else self.patience
        server = FQCN.get_root(fl_ctx.get_engine().get_cell().get_fqcn()) == FQCN.ROOT_SERVER
        startup = Path(fl_ctx.get_engine().get_workspace().get_server_startup_file_path()) if server else None
        if found := too_short(patience, server, get_positive_float_var, startup):
            line = (
                f"transfers wait {as_time(patience)} for a peer that is out of reach, but FLARE gives up earlier here: "
                f"{', '.join(found)} (seconds). add_transfer(recipe, patience=...) sets what a job can set"
            )
            asked = self.patience is not None or settings.rdma_patience != Settings.rdma_patience
            (self.log_warning if asked else self.log_info)(fl_ctx, escaped(line))

    def _say_what_failed_there(self, fl_ctx: FLContext) -> None:
        """Log once why the transfer of the other side of a task does not run."""
        peer = fl_ctx.get_peer_context()
        failure = peer.get_prop(FAILURE_PROP) if peer is not None else None
        if not isinstance(failure, str) or not failure:
            return
        told = str(peer.get_identity_name()), failure[:_MAX_FAILURE]
        if told not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(told)
            what = f"RdmaTransfer does not run at {told[0]}, so its tensors take FLARE's own path: {told[1]}"
            self.log_warning(fl_ctx, escaped(what))


def _server_host(fl_ctx: FLContext) -> str:
    """The host at which the sites reach the server, by the start-up kit of a server; "" if there is none."""
    path = fl_ctx.get_engine().get_workspace().get_server_startup_file_path()
    try:
        target = json.loads(Path(path).read_text())["servers"][0]["service"]["target"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return str(target).rpartition(":")[0].strip("[]")


def _no_matter(peer: str) -> None:
    """Where it changes nothing that a peer has ended."""


def install(server_host: str = "", patience: float | None = None, ended: Callable[[str], object] = _no_matter) -> None:
    """Have FLARE's tensors and arrays move over links, from now on until `LinksByCell.stop`. `server_host` is where the
    server is reached, if a cell does not know it better; `patience` is the job's own, if it has one; `ended` is called
    with the name of each peer that is missed and has ended."""
    require_flare("RdmaTransfer")
    runtime = this_runtime()  # a wrong setting is said now
    runtime.shared.encoded_chunks.limit = runtime.settings.rdma_memory_budget_bytes // 16
    replace_decomposer(RdmaArrayDecomposer())
    # A trainer that exchanges torch tensors has imported torch by now; another need not wait for that. Where another
    # thread is still importing it, this waits until that is done.
    if not is_trainer() or "torch" in sys.modules:
        with contextlib.suppress(ImportError):  # a site without torch
            replace_decomposer(torch_decomposer())
    runtime.shared.links.start(functools.partial(open_links, server_host=server_host, patience=patience, ended=ended))


def install_in_trainer() -> None:
    """Call `install` for as long as the process lives, if FLARE has started it as a Client API trainer."""
    if is_trainer():
        install()
        atexit.register(shared().links.stop)


install_in_trainer.__module__ = "nvflare_rdma.streaming"  # as all that this package hands on


def open_links(
    cell: Any,
    server_host: str = "",
    patience: float | None = None,
    ended: Callable[[str], object] = _no_matter,
) -> PeerLinks:
    """The links of a cell. They are as its own connections are: with its certificates, if it has any. A trainer's are
    its site's. Without `patience` the setting counts. `ended` is called with each peer that is missed and has ended."""
    runtime, name = this_runtime(), cell.get_fqcn()
    site = inherited_site() or cell_connections(cell)
    ports, trainers = runtime.settings.rdma_data_ports, False
    if ports == "auto":
        server = FQCN.get_root(name) == FQCN.ROOT_SERVER
        ports, trainers = (_ANY_PORT, False) if server else ("none", True)
    host = urlparse(site.url).hostname or ""
    if host in _ANY_HOST:  # a server knows where it listens, and not how it is reached
        host = server_host

    def tls(server_side: bool) -> ssl.SSLContext | None:
        if not site.secure:
            return None
        made: ssl.SSLContext = get_ssl_context({**site.credentials, DriverParams.SECURE.value: True}, server_side)
        return made

    identify = identifier(site.identities)
    server_at = host, _port(site.url)
    meet = None if is_trainer() else meeting_function(cell, site, server_at)
    own = None if isinstance(ports, str) else ports
    links = PeerLinks(name, runtime, tls, identify, server_at, own, trainers, meet)
    links.has_ended = Absences(cell, ended=ended).has_ended
    links.patience = runtime.settings.rdma_patience if patience is None else patience
    return links


def _port(url: str) -> int:
    """The port in a URL; 0 if there is none."""
    try:
        return urlparse(url).port or 0
    except ValueError:
        return 0
