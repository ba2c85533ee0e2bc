"""The two ends of a bench: those of a live check (`peer_link`), which know of codecs, of what a process has used, and
of plain TCP besides.

    active side, --connect                         passive side, --listen

    about      run: a key of the run's own            a JSON object; for another run than the present one: busy
    use        chunk: of links that open from now on  {}
    used       nothing                                CPU seconds so far, and the peak of memory since the last time
    raw        nothing                                a ticket for a connection of `bench_raw`; or busy

One run at a time is served, and ends with its first link: then its other links end as well, and what they ask is not
answered. What it may ask for is bounded by the listener's own settings: messages of a quarter of its
memory budget at most, chunks as its links allow, rails and fabrics as its settings say, until its time is over.
"""

from __future__ import annotations

import contextlib
import resource
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from nvflare_rdma.cli.peer_link import BUSY, Bounds, Exchange
from nvflare_rdma.errors import ProtocolError
from nvflare_rdma.settings import Settings

_MIB = 1024 * 1024
#: So many messages have memory at a time, and no message is larger.
_AT_ONCE, _MOST_MESSAGE = 4, 16 * _MIB
#: Messages that are asked for at once, which bounds what one measurement moves; and questions over a link.
MOST_MESSAGES, _MOST_QUESTIONS = 256, 100_000
LEAST_CHUNK, MOST_CHUNK = 64 * 1024, 64 * _MIB
EXACT = "exact"


def bounds_of(settings: Settings) -> Bounds:
    """What this side takes part in: all messages that have memory at a time are within the budget."""
    message = min(_MOST_MESSAGE, settings.rdma_memory_budget_bytes // _AT_ONCE) // 4 * 4
    return Bounds(message, _AT_ONCE, MOST_MESSAGES, _MOST_QUESTIONS)


def usable_codecs() -> list[str]:
    """The codecs in which tensors travel piece by piece, as links carry them."""
    from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, get_codec

    return [name for name in CODEC_NAMES if isinstance(get_codec(name), FixedSizeCodec)]


@dataclass(frozen=True)
class Used:
    """What a process has used.

    Attributes:
        cpu_seconds: since it began.
        peak_bytes: the most memory that it had since this was asked last.
    """

    cpu_seconds: float
    peak_bytes: int


def used() -> Used:
    """What this process has used. Where the kernel does not let a peak be reset, it is the one since the beginning."""
    told = resource.getrusage(resource.RUSAGE_SELF)
    peak = told.ru_maxrss * 1024
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return Used(told.ru_utime + told.ru_stime, peak)


class Host(Protocol):
    """What serves the links of a run."""

    def join(self, key: Any, exchange: BenchExchange) -> str:
        """Have a link be one of the present run, if that has this key, or begin one: "" if so, else why not."""

    def is_member(self, exchange: BenchExchange) -> bool:
        """Whether a link is of the present run."""

    def use_chunk(self, nbytes: int) -> None:
        """Have the links that open from now on ask for such chunks; 0 is what the settings say."""

    def raw_ticket(self, exchange: BenchExchange) -> str | None:
        """A ticket for a plain connection of this link's run; None if there are as many as there may be."""


class BenchExchange(Exchange):
    """One end of a bench, on one link; `host` is on the passive side."""

    host: Host | None = None
    run: object | None = None
    """The one that it has joined, which may be over."""

    waits: ExitStack | None = None
    """At a listener: holds its place among the links that have joined no run yet."""

    def progress(self) -> tuple[int, ...]:
        """Other numbers than before if something was asked, or bytes came or went."""
        landed = sum(came for came, _ in self.link.incoming().values())
        granted = sum(each.reached for each in list(self._sending))
        return self._questions, self.received_bytes, landed, granted

    def answer(self, told: dict[str, Any], about: Any) -> dict[str, Any]:
        """See `Exchange.answer`."""
        assert self.host is not None
        if told.get("ask") == "about":
            if refusal := self.host.join(told.get("run"), self):
                return {BUSY: refusal}
            return dict(about(self.link))
        if self.run is None:
            raise ProtocolError("it asks for something before it has said of which run it is")
        if not self.host.is_member(self):
            raise ProtocolError("it asks for something after its run is over")
        match told:
            case {"ask": "use", "chunk": int(nbytes)} if nbytes == 0 or LEAST_CHUNK <= nbytes <= MOST_CHUNK:
                self.host.use_chunk(nbytes)
                return {}
            case {"ask": "used"}:
                now = used()
                return {"cpu_seconds": now.cpu_seconds, "peak_bytes": now.peak_bytes}
            case {"ask": "raw"}:
                if (ticket := self.host.raw_ticket(self)) is None:
                    return {BUSY: "there are as many plain connections as there may be"}
                return {"ticket": ticket}
        return super().answer(told, about)

    def knows(self, codec: Any) -> bool:
        """See `Exchange.knows`."""
        return codec == "" or codec in usable_codecs()
