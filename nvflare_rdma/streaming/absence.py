"""Whether a peer that does not answer has ended, or can't be reached for now; and what the server's workflow hears.

A process that is gone does not come back under its name, so nobody waits for it. What tells is its parent's cell: where
the parent answers and has no connection with the process, and the process does not answer either, for longer than FLARE
takes to connect a process again, it has ended. The kernel closes the connections of a process that ends, and not those
of one that is stopped. Where neither answers, nothing is known: the host is out of reach, or sleeps. A process on
another host than its parent's looks as one that has ended when its parent has given up its connection, after a minute
or more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.fqcn import FQCN

from nvflare_rdma.flare_compat import answers, connected_to, report_ended

_ANSWER_SECONDS = 10.0
#: FLARE's cells wait for up to a minute before they connect again.
_GRACE_SECONDS = 90.0
#: So long after it was asked last, a question is about another absence.
_OTHER_ABSENCE_SECONDS = 90.0
#: A site whose job process has ended gives a sign of life within so many seconds, or its tasks go on without it. It is
#: FLARE's `dead_client_grace_period`, which a job's patience lengthens for sites that are only out of reach.
_SIGN_OF_LIFE_SECONDS = 60.0


class Absences:
    """Knows since when peers of a cell don't answer, though their parents do."""

    def __init__(
        self,
        cell: Any,
        grace: float = _GRACE_SECONDS,
        ended: Callable[[str], object] = lambda peer: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ended` is called with each peer that has ended, whenever that is found."""
        self._cell = cell
        self._grace = grace
        self._ended = ended
        self._clock = clock
        self._lock = threading.Lock()
        #: Since when each is absent, and when that was asked last.
        self._known: dict[str, tuple[float, float]] = {}

    def has_ended(self, peer: str) -> bool:
        """Whether the process whose cell is `peer` has ended, as far as can be told. It is to be asked now and then
        while the peer is missed, and takes some seconds."""
        *above, _ = FQCN.split(peer)
        if not above:
            return False
        is_absent = not answers(self._cell, peer, _ANSWER_SECONDS)
        if is_absent:
            parent = FQCN.join(above)
            connected = connected_to(self._cell, parent, _ANSWER_SECONDS)
            if connected is None and self.has_ended(parent):
                return True  # a trainer ends with its job process
            is_absent = connected is not None and peer not in connected
        now = self._clock()
        with self._lock:
            # Names come from messages, and may be made up: those that nobody asks about any more are forgotten.
            self._known = {name: at for name, at in self._known.items() if now - at[1] <= _OTHER_ABSENCE_SECONDS}
            if not is_absent:
                self._known.pop(peer, None)
                return False
            since, _ = self._known.get(peer, (now, now))
            self._known[peer] = since, now
        if now - since < self._grace:
            return False
        self._ended(peer)
        return True


class EndedSites:
    """Has the workflows of a server's job no longer wait for sites whose job processes have ended. FLARE's own reports
    are for the workflow of the moment; a later one would wait for the site again."""

    def __init__(self, engine: Any, job: str) -> None:
        """`job` is the last part of the names of the job's cells."""
        self._engine = engine
        self._job = job
        self._lock = threading.Lock()
        #: The sites, and the last workflow that has heard of each.
        self._known: dict[str, Any] = {}

    def add(self, peer: str) -> None:
        """`peer` has ended. Others than a site's process of this job are no matter here: a trainer's end is for its job
        process to see. Who has sent the message that names `peer` may have made the name up."""
        for client in self._engine.get_clients():
            if FQCN.join([client.get_fqcn(), self._job]) == peer:
                with self._lock:
                    self._known[client.name] = None  # also who was told before: it may have lived meanwhile
                self._report()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """FLARE's events: another workflow may run when a site asks for a task, and the one that asks lives."""
        if event_type != EventType.BEFORE_PROCESS_TASK_REQUEST or not self._known:
            return
        peer = fl_ctx.get_peer_context()
        with self._lock:
            self._known.pop(peer.get_identity_name() if peer is not None else "", None)
        self._report()

    def _report(self) -> None:
        with self._lock:
            known = list(self._known.items())
        with self._engine.new_context() as fl_ctx:
            for site, told in known:
                workflow = report_ended(fl_ctx, site, _SIGN_OF_LIFE_SECONDS, told)
                with self._lock:
                    if site in self._known:
                        self._known[site] = workflow
