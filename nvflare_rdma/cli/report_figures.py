"""The figures of a report: what a job's records add up to.

Both ends of a transfer write a record. Of each pair of sites, and direction, one end's records count: the receiver's,
which say what arrived, unless the sender has more of them (the receiver's are missing, or are not all there). What a
site was busy with comes from its own records, by its own clock, unless it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from nvflare_rdma.cli.output import CommandError
from nvflare_rdma.cli.report_records import SERVER, Entry, Job, Run, named
from nvflare_rdma.transfer import total


@dataclass(frozen=True)
class Moved:
    """What has arrived of several transfers."""

    transfers: int = 0
    raw_bytes: int = 0
    wire_bytes: int = 0


@dataclass(frozen=True)
class Effort:
    """What several transfers took, whether they brought something or not."""

    direct: int
    """Transfers that went directly."""
    fallback: int
    """Transfers that took FLARE's own path."""
    failed: int
    """Attempts that brought nothing."""
    resent_chunks: int
    budget_peak_bytes: int


@dataclass(frozen=True)
class Busy:
    """How long a site had at least one transfer under way, in each direction and in all, by its own clock."""

    received_seconds: float
    sent_seconds: float
    seconds: float


@dataclass(frozen=True)
class Round:
    """A round of the job; None is what was moved outside of rounds."""

    round: int | None
    down: Moved
    """From the server to sites."""
    up: Moved
    """From sites to the server."""
    between: Moved
    """From site to site."""
    moved: Moved
    effort: Effort
    slowest_site: str
    slowest_seconds: float
    goodput: float
    """Raw bytes a second of the mean site, while it moved something."""
    loss: float | None


@dataclass(frozen=True)
class Site:
    """A site, or the server."""

    name: str
    received: Moved
    sent: Moved
    busy: Busy
    effort: Effort
    fabrics: Mapping[str, int]
    wrote_records: bool
    damaged_lines: int
    entries: tuple[Entry, ...] = field(repr=False)
    """Its own records, in the order in which the transfers began."""


@dataclass(frozen=True)
class Told:
    """A reason, for a fallback or a failure, and where it was given."""

    reason: str
    transfers: int
    ways: tuple[str, ...]
    """Who sent to whom, as "server to site-1"."""
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """All that is known of a job's transfers."""

    job: str
    name: str
    status: str
    source: str
    other_jobs: tuple[str, ...]
    kinds: tuple[str, ...]
    moved: Moved
    effort: Effort
    fabrics: Mapping[str, int]
    """Direct transfers by fabric; "" is those that came with the first answer."""
    lost_bytes: int
    """Bytes that travelled for attempts that failed."""
    rounds: tuple[Round, ...]
    sites: tuple[Site, ...]
    """The server first, if it took part."""
    fallbacks: tuple[Told, ...]
    failures: tuple[Told, ...]
    loss_name: str
    damaged_lines: int
    unreadable: tuple[str, ...]
    """Folders and files that can't be read, and why."""

    @property
    def numbered(self) -> int:
        """How many rounds there are."""
        return sum(each.round is not None for each in self.rounds)

    @property
    def clients(self) -> tuple[Site, ...]:
        """The sites without the server."""
        return tuple(site for site in self.sites if site.name != SERVER)


def report_on(jobs: list[Job], job: Job, source: Path) -> Report:
    """The report on one of the jobs that were found below `source`.

    Raises:
        CommandError: not one line of its records is whole.
    """
    entries = [entry for run in job.runs.values() for entry in run.entries]
    damaged = sum(run.damaged for run in job.runs.values())
    if not entries:
        what = f"no record of job {job.label} is whole: {damaged} damaged lines in {job.where}"
        raise CommandError("NO_RECORDS", what, "the disk was full, or the job has only begun: look again later")
    counted = _counted(entries)
    known = named(job)
    names = sorted({name for e in entries for name in (e.sender, e.receiver)}, key=lambda n: (n != SERVER, n))
    by_round = {at: (_of_round(counted, at), _of_round(entries, at)) for at in _rounds(entries)}
    return Report(
        job=job.label,
        name=known.name,
        status=known.status,
        source=str(source),
        other_jobs=tuple(other.label for other in jobs if other is not job),
        kinds=tuple(sorted({entry.record.kind for entry in counted})),
        moved=_moved(counted),
        effort=_effort(counted, entries),
        fabrics=_fabrics(counted),
        lost_bytes=_per_pair(entries, lambda them: sum(e.record.wire_bytes for e in them if e.record.failed)),
        rounds=tuple(
            _round(at, *of_it, None if at is None else known.losses.get(at)) for at, of_it in by_round.items()
        ),
        sites=tuple(_site(name, job.runs.get(name), counted, entries) for name in names),
        fallbacks=_told(job, ((e, e.record.reason) for e in counted if e.record.path == "flare")),
        failures=_told(job, ((e, e.record.outcome.removeprefix("failed: ")) for e in entries if e.record.failed)),
        loss_name=known.loss_name,
        damaged_lines=damaged,
        unreadable=tuple(job.unreadable),
    )


def _rounds(entries: list[Entry]) -> list[int | None]:
    return sorted({entry.round for entry in entries}, key=lambda at: (at is None, at or 0))


def _of_round(entries: list[Entry], at: int | None) -> list[Entry]:
    return [entry for entry in entries if entry.round == at]


def _counted(entries: list[Entry]) -> list[Entry]:
    """Of each transfer that brought something the record that counts."""
    found: list[Entry] = []
    for pair in _pairs(entries):
        received, sent = (
            [e for e in pair if e.record.direction == side and not e.record.failed] for side in ("received", "sent")
        )
        found += received if len(received) >= len(sent) else sent
    return found


def _pairs(entries: Iterable[Entry]) -> Iterable[list[Entry]]:
    def who(entry: Entry) -> tuple[str, str]:
        return entry.sender, entry.receiver

    return (list(them) for _, them in groupby(sorted(entries, key=who), who))


def _per_pair(entries: list[Entry], figure: Callable[[list[Entry]], int]) -> int:
    """The sum over all pairs of what the side says that says more: an attempt may have failed on both, or on one."""
    return sum(
        max(figure([e for e in pair if e.record.direction == side]) for side in ("sent", "received"))
        for pair in _pairs(entries)
    )


def _moved(entries: Iterable[Entry]) -> Moved:
    records = [entry.record for entry in entries if not entry.record.failed]
    return Moved(len(records), sum(r.raw_bytes for r in records), sum(r.wire_bytes for r in records))


def _effort(counted: list[Entry], entries: list[Entry]) -> Effort:
    """Of the records that count, and of all: failures, and budgets of all processes."""
    return Effort(
        direct=sum(entry.record.path != "flare" for entry in counted),
        fallback=sum(entry.record.path == "flare" for entry in counted),
        failed=_per_pair(entries, lambda them: sum(entry.record.failed for entry in them)),
        resent_chunks=sum(entry.record.resent_chunks for entry in counted),
        budget_peak_bytes=max((entry.record.budget_peak_bytes for entry in entries), default=0),
    )


def _fabrics(counted: list[Entry]) -> dict[str, int]:
    names = [entry.record.fabric for entry in counted if entry.record.path != "flare"]
    return {name: names.count(name) for name in sorted(set(names), key=lambda n: (-names.count(n), n))}


def _busy(name: str, entries: list[Entry]) -> Busy:
    """From what a site has written of its own; if that is nothing, from what others have written about it."""

    def seconds(them: list[Entry]) -> float:
        # Only what one host has written has one clock.
        by_writer = groupby(sorted(them, key=lambda e: e.writer), lambda e: e.writer)
        return round(sum(total(entry.record for entry in group).seconds for _, group in by_writer), 6)

    own = [entry for entry in entries if entry.writer == name]
    own = own or [entry for entry in entries if entry.other == name]
    return Busy(
        received_seconds=seconds([entry for entry in own if entry.receiver == name]),
        sent_seconds=seconds([entry for entry in own if entry.sender == name]),
        seconds=seconds(own),
    )


def _round(at: int | None, counted: list[Entry], entries: list[Entry], loss: float | None) -> Round:
    sites = sorted({name for e in entries for name in (e.sender, e.receiver)} - {SERVER})
    seconds = {name: _busy(name, entries).seconds for name in sites}
    slowest = max(seconds, key=lambda name: seconds[name], default="")
    raw = sum(_moved(e for e in counted if name in (e.sender, e.receiver)).raw_bytes for name in sites)
    return Round(
        round=at,
        down=_moved(e for e in counted if e.sender == SERVER),
        up=_moved(e for e in counted if e.receiver == SERVER and e.sender != SERVER),
        between=_moved(e for e in counted if SERVER not in (e.sender, e.receiver)),
        moved=_moved(counted),
        effort=_effort(counted, entries),
        slowest_site=slowest,
        slowest_seconds=seconds.get(slowest, 0.0),
        goodput=rate(raw, sum(seconds.values())),
        loss=loss,
    )


def _site(name: str, run: Run | None, counted: list[Entry], entries: list[Entry]) -> Site:
    counted = [entry for entry in counted if name in (entry.sender, entry.receiver)]
    entries = [entry for entry in entries if name in (entry.sender, entry.receiver)]
    own = run.entries if run is not None else []
    effort = _effort(counted, entries)
    return Site(
        name=name,
        received=_moved(e for e in counted if e.receiver == name),
        sent=_moved(e for e in counted if e.sender == name),
        busy=_busy(name, entries),
        effort=replace(effort, budget_peak_bytes=max((e.record.budget_peak_bytes for e in own), default=0)),
        fabrics=_fabrics(counted),
        wrote_records=bool(own),
        damaged_lines=run.damaged if run is not None else 0,
        entries=tuple(sorted(own, key=lambda entry: entry.record.time - entry.record.seconds)),
    )


def _told(job: Job, reasons: Iterable[tuple[Entry, str]]) -> tuple[Told, ...]:
    """Each reason once, the most frequent one first. The job's ID is left out of the cells' names in it."""
    found: dict[str, list[Entry]] = {}
    for entry, reason in reasons:
        found.setdefault(reason.replace(f".{job.job_id}", ""), []).append(entry)
    told = [
        Told(
            reason=reason or "no reason is given",
            transfers=len(them),
            ways=tuple(sorted({f"{entry.sender} to {entry.receiver}" for entry in them})),
            rounds=tuple(sorted({entry.round for entry in them if entry.round is not None})),
        )
        for reason, them in found.items()
    ]
    return tuple(sorted(told, key=lambda each: (-each.transfers, each.reason)))


def rate(nbytes: int, seconds: float) -> float:
    """Bytes a second; 0 if it took no time."""
    return round(nbytes / seconds) if seconds else 0.0
