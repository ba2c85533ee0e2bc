"""Records what each transfer of this process did.

Who moves data makes a `Meter`, counts on it, and ends it; the record then goes to the `Ledger` that the meter was
given, and from there to its subscribers (`metrics.reporting` is one). What is counted belongs to the transfer alone,
also where several share a link, except for the budget, which is the process's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias

from nvflare_rdma.logs import get_logger
from nvflare_rdma.transfer.receipt import Receipt

log = get_logger(__name__)

Direction: TypeAlias = Literal["sent", "received"]


class HasPeak(Protocol):
    """Knows the most bytes that were held at a time: see `MemoryBudget.watch`."""

    peak: int


@dataclass(frozen=True)
class TransferRecord:
    """Tells how one transfer to or from one peer went."""

    time: float
    """When it ended: seconds since 1970."""
    direction: Direction
    cell: str
    """FQCN of this side's cell."""
    peer: str
    """FQCN of the peer's cell."""
    kind: str
    """What was moved: "tensors", "container" or "file"."""
    items: int
    """Tensors, entries or files that have arrived; 0 if it failed."""
    raw_bytes: int
    """Bytes that the items have for their users; 0 if it failed."""
    wire_bytes: int
    """Bytes of the items as they travel, encoded or not, without headers and seals, and without what was sent again."""
    seconds: float
    resent_chunks: int
    """Chunks that were asked for (received) or written (sent) once more, lost with a rail or damaged."""
    fabric: str
    """The fabric in use in the end; "control" is the control stream; "" if no link was needed, or on FLARE's path. Of a
    transfer that failed, the fabric over which some of it came, whatever was tried afterwards."""
    budget_peak_bytes: int
    """The most that all transfers of the process together held meanwhile of its budget for what arrives."""
    path: Literal["direct", "flare"]
    reason: str
    """Why it took the fallback, FLARE's own path; "" if it did not."""
    outcome: str
    """"done", or "failed: " and the reason."""
    codecs: str = ""
    """What was sent in which codec, such as "48 normfloat4, 100 exact"; "" unless it was sent and something encoded."""
    relative_error: float | None = None
    """The largest relative error of a tensor that was sent; None if none was encoded with loss."""
    error_from: str = ""
    """"whole" if it was measured, "sample" if it, or one that may be larger, is an estimate; "" if there is none."""
    digest: str = ""
    """xxh3, 128 bits, of what was sent, in hexadecimal digits; "" where `codecs` is, or if it is not known."""

    def is_of(self, run: str) -> bool:
        """Whether it belongs to the run whose cell is `run`. The simulator's server has a job's messages in its
        parent's cell, too; and other cells may be in this process, of other sites there and of other jobs."""
        return f"{run}.".startswith(f"{self.cell}.") or self.cell.startswith(f"{run}.")

    @property
    def failed(self) -> bool:
        """Whether it did not bring what it was for."""
        return self.outcome != "done"

    @property
    def goodput(self) -> float:
        """Raw bytes a second."""
        return self.raw_bytes / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The fields and `goodput` for JSON, rounded to sensible digits."""
        times = {"time": round(self.time, 3), "seconds": round(self.seconds, 6), "goodput": round(self.goodput)}
        return {**asdict(self), **times}


class Ledger:
    """Takes records from any thread, and hands them to its subscribers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscribers: list[Callable[[TransferRecord], None]] = []
        self._failed: set[Callable[[TransferRecord], None]] = set()

    def subscribe(self, callback: Callable[[TransferRecord], None]) -> Callable[[], None]:
        """Call `callback` with every record from now on, in the thread in which the transfer ends. Returns a function
        that ends this."""
        with self._lock:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._subscribers:
                    self._subscribers.remove(callback)
                self._failed.discard(callback)

        return unsubscribe

    def record(self, record: TransferRecord) -> None:
        """Hand a record to all subscribers. One that fails is logged once, and disturbs nobody."""
        with self._lock:
            subscribers = list(self._subscribers)
        for callback in subscribers:
            try:
                callback(record)
            except Exception:
                with self._lock:
                    first = callback not in self._failed
                    self._failed.add(callback)
                if first:
                    log.exception(
                        "a subscriber failed to take a transfer's record; its further failures are not logged"
                    )


class Meter:
    """Counts one transfer as it goes on. Who moves the data sets and adds to the public attributes; `end` makes the
    record."""

    def __init__(
        self, direction: Direction, cell: str, peer: str, kind: str = "tensors", ledger: Ledger | None = None
    ) -> None:
        self.wire_bytes = 0
        self.resent_chunks = 0
        self.fabric = ""
        #: `Link.way` of the link in use in the end; "" if none was needed.
        self.way = ""
        #: Watches the budget while the transfer lasts; None where there is no budget.
        self.budget: HasPeak | None = None
        #: Of a sender: what has left; None if nothing of it was encoded.
        self.receipt: Receipt | None = None
        self._direction, self._cell, self._peer, self._kind, self._ledger = direction, cell, peer, kind, ledger
        self._reason = ""
        self._broken_fabric = ""
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._ended = False

    @property
    def seconds(self) -> float:
        """How long the transfer has taken so far."""
        return time.monotonic() - self._began

    @property
    def fell_back(self) -> bool:
        """Whether the transfer takes the fallback."""
        return bool(self._reason)

    def fall_back(self, reason: str) -> None:
        """Note that the transfer takes the fallback. The first reason counts."""
        self._broken_fabric = self._broken_fabric or self.fabric
        self._reason, self.fabric = self._reason or reason, ""

    def end(self, items: int = 0, raw_bytes: int = 0, failure: str = "") -> None:
        """End the transfer: what arrived, or why nothing did. Only the first call does anything."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        if self._direction == "received" and not failure and not self._reason:
            self._say_received(items, raw_bytes)
        if self.receipt is not None:
            self._sign_off(self.receipt, items, raw_bytes)
        if self._ledger is None:
            return
        self._ledger.record(
            TransferRecord(
                time=time.time(),
                direction=self._direction,
                cell=self._cell,
                peer=self._peer,
                kind=self._kind,
                items=items,
                raw_bytes=raw_bytes,
                wire_bytes=self.wire_bytes,
                seconds=self.seconds,
                resent_chunks=self.resent_chunks,
                fabric=self.fabric or (self._broken_fabric if failure else ""),
                budget_peak_bytes=self.budget.peak if self.budget is not None else 0,
                path="flare" if self._reason else "direct",
                reason=self._reason,
                outcome=f"failed: {failure}" if failure else "done",
                **(self.receipt.as_fields() if self.receipt is not None else {}),
            )
        )

    @property
    def _things(self) -> str:
        return {"container": "entries of a container"}.get(self._kind, self._kind)

    def _sign_off(self, receipt: Receipt, items: int, raw_bytes: int) -> None:
        """One line for each message that left in few bits: what an officer of security asks for."""
        log.info(
            "sent %s to %s: %d bytes, %d on the way; %s",
            f"the file {receipt.file}" if receipt.file else f"{items} {self._things}",
            self._peer,
            raw_bytes,
            self.wire_bytes,
            receipt,
        )

    def _say_received(self, items: int, raw_bytes: int) -> None:
        """One line for each transfer that came directly; what takes the fallback has a line that says why."""
        log.info(
            "received %d %s from %s directly: %d bytes, %d on the way, in %.2f s over %s",
            items,
            self._things,
            self._peer,
            raw_bytes,
            self.wire_bytes,
            self.seconds,
            self.way or "no link, as all of it came with the first answer",
        )


class Meters:
    """Keeps a sender's meters: one for each receiver that has begun and not ended."""

    def __init__(self, cell: str, kind: str = "tensors", ledger: Ledger | None = None) -> None:
        self._cell, self._kind, self._ledger = cell, kind, ledger
        self._lock = threading.Lock()
        self._open: dict[str, Meter] = {}

    def begin(self, receiver: str) -> Meter:
        """The meter of a receiver, a new one if it has none."""
        with self._lock:
            if receiver not in self._open:
                self._open[receiver] = Meter("sent", self._cell, receiver, self._kind, self._ledger)
            return self._open[receiver]

    def find(self, receiver: str) -> Meter | None:
        """The meter of a receiver, None if it has not begun."""
        with self._lock:
            return self._open.get(receiver)

    def end(self, receiver: str, items: int = 0, raw_bytes: int = 0, failure: str = "") -> None:
        """End a receiver's transfer, if it has begun. See `Meter.end`."""
        with self._lock:
            meter = self._open.pop(receiver, None)
        if meter is not None:
            meter.end(items, raw_bytes, failure)

    def close(self, failure: str) -> None:
        """End all transfers that are left; they have failed."""
        with self._lock:
            receivers = list(self._open)
        for receiver in receivers:
            self.end(receiver, failure=failure)


@dataclass(frozen=True)
class Totals:
    """Sums of several transfers in one direction."""

    transfers: int = 0
    raw_bytes: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0
    """Time in which at least one of them was under way."""
    resent_chunks: int = 0

    @property
    def goodput(self) -> float:
        """Raw bytes a second."""
        return self.raw_bytes / self.seconds if self.seconds else 0.0


def total(records: Iterable[TransferRecord]) -> Totals:
    """Add up records."""
    records = list(records)
    seconds, until = 0.0, float("-inf")
    for begin, end in sorted((record.time - record.seconds, record.time) for record in records):
        seconds += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return Totals(
        len(records),
        sum(record.raw_bytes for record in records),
        sum(record.wire_bytes for record in records),
        seconds,
        sum(record.resent_chunks for record in records),
    )
