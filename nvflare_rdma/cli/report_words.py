"""Sentences and units of a report, for its page and its text."""

from __future__ import annotations

from nvflare_rdma.cli.report_figures import Moved, Report, Round, Site, Told, rate
from nvflare_rdma.cli.report_records import SERVER

_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
_KINDS = {"tensors": "models", "container": "containers", "file": "files"}
#: Less than this is headers, or a tensor or two that were not worth it.
_ENCODED = 1.01
_SERVERS_RECORDS = "The server's come with `nvflare job download`."


def amount(nbytes: float) -> str:
    """Bytes with three digits, as `1.20 GB`."""
    for unit, size in _UNITS:
        if nbytes >= size:
            value = nbytes / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{nbytes:.0f} B"


def speed(bytes_a_second: float) -> str:
    """A goodput, as `56.1 MB/s`; a dash if there is none."""
    return f"{amount(bytes_a_second)}/s" if bytes_a_second else "-"


def seconds(value: float) -> str:
    """A time, as `0.45 s`, `12.3 s` or `2 min 9 s`."""
    if value < 99.95:
        return f"{value:.{2 if value < 9.995 else 1}f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def fold(moved: Moved) -> str:
    """How many times fewer bytes travelled, as `7.1x`; a dash where they travelled as they are."""
    ratio = moved.raw_bytes / moved.wire_bytes if moved.wire_bytes else 0.0
    return f"{ratio:.{1 if ratio < 99.95 else 0}f}x" if ratio >= _ENCODED else "-"


def number(count: int, thing: str) -> str:
    """A number of things, as `1 round` or `2 rounds`."""
    return f"{count:,} {thing}" + "s" * (count != 1)


def round_name(each: Round) -> str:
    """A round's number; a dash for what is outside of rounds."""
    return "-" if each.round is None else str(each.round)


def which_rounds(told: Told) -> str:
    """The rounds in which a reason was given, as `rounds 0, 3`."""
    some = ", ".join(map(str, told.rounds[:8])) + ", ..." * (len(told.rounds) > 8)
    return f"round{'s' * (len(told.rounds) > 1)} {some}"


def goodputs(site: Site) -> tuple[float, float]:
    """What a site received, and what it sent, in bytes a second."""
    return (
        rate(site.received.raw_bytes, site.busy.received_seconds),
        rate(site.sent.raw_bytes, site.busy.sent_seconds),
    )


def fabric_name(fabric: str) -> str:
    """A fabric, as in a sentence."""
    return {"": "with the first answer", "control": "over the control stream"}.get(fabric, f"over {fabric}")


def title(report: Report) -> str:
    """Which job it is."""
    name = f"{report.name}, " if report.name and report.name != report.job else ""
    status = f", {report.status}" if report.status else ""
    return f"Transfers of job {name}{report.job}{status}"


def headline(report: Report) -> str:
    """The whole job in one sentence."""
    things = " and ".join(_KINDS.get(kind, kind) for kind in report.kinds) or "models"
    moved, effort, sites = report.moved, report.effort, report.clients
    if not moved.transfers:
        how = f"nothing has arrived, {number(effort.failed, 'attempt')} failed"
    elif fold(moved) != "-":
        how = f"{amount(moved.raw_bytes)} of {things} travelled as {amount(moved.wire_bytes)}"
    else:
        how = f"{amount(moved.raw_bytes)} of {things} travelled, without encoding"
    parts = [f"{number(report.numbered, 'round')}, {number(len(sites), 'site')}: {how}"]
    if moved.transfers:
        parts.append(_ways(report))
    if moved.transfers and effort.failed:
        parts.append(f"{number(effort.failed, 'attempt')} failed on the way")
    slowest = max(sites, key=lambda site: site.busy.seconds, default=None)
    if slowest is not None and len(sites) > 1 and moved.transfers:
        parts.append(f"the slowest site was {slowest.name} ({seconds(slowest.busy.seconds)})")
    return "; ".join(parts) + "."


def _ways(report: Report) -> str:
    effort = report.effort
    if not effort.fallback:
        fabrics = [name for name in report.fabrics if name not in ("", "control")]
        return "all direct" + (f", over {' and '.join(fabrics)}" if fabrics else "")
    if not effort.direct:
        return "all of it on FLARE's own path"
    of_all = f"{effort.fallback:,} of {number(report.moved.transfers, 'transfer')}"
    return f"{of_all} took FLARE's own path"


def notes(report: Report) -> list[str]:
    """What the reader has to know about the figures: what is missing, or was not asked for."""
    found = []
    if report.other_jobs:
        ids = ", ".join(report.other_jobs[:5]) + ", ..." * (len(report.other_jobs) > 5)
        found.append(f"{number(len(report.other_jobs), 'other job')} with records here, for --job: {ids}.")
    silent = [site.name for site in report.sites if not site.wrote_records]
    if silent:
        names = ", ".join(silent[:10]) + ", ..." * (len(silent) > 10)
        theirs = "it" if len(silent) == 1 else "them"
        found.append(
            f"No records of {names} are here: what others have written about {theirs} counts. "
            f"{_SERVERS_RECORDS if SERVER in silent else 'Each site has its own in its workspace.'}"
        )
    if report.damaged_lines:
        where = ", ".join(site.name for site in report.sites if site.damaged_lines)
        found.append(
            f"{number(report.damaged_lines, 'line')} of records {'is' if report.damaged_lines == 1 else 'are'} damaged "
            f"or half-written and left out{f' ({where})' if where else ''}: the job still runs, or a disk was full."
        )
    if report.unreadable:
        more = f", and {len(report.unreadable) - 1} more" if report.unreadable[1:] else ""
        found.append(f"Records may be missing: can't read {report.unreadable[0]}{more}.")
    if report.lost_bytes:
        found.append(f"{amount(report.lost_bytes)} more travelled for attempts that failed.")
    return found
