"""The page of a report: one file that opens from disk, and asks nobody for anything.

Its policy (Content-Security-Policy) allows its own style sheet, by its digest, and nothing else. There is no script.
Elements are made by `report_markup`, which escapes what they are given, so there is no template engine: Jinja would
come with torch only.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from datetime import datetime
from hashlib import sha256

from nvflare_rdma.cli.report_figures import Report, Told
from nvflare_rdma.cli.report_markup import Html, element, join
from nvflare_rdma.cli.report_style import STYLE
from nvflare_rdma.cli.report_svg import hatches, legend, line_chart, size_bar, span_of, timeline
from nvflare_rdma.cli.report_words import (
    amount,
    fabric_name,
    fold,
    goodputs,
    headline,
    notes,
    number,
    round_name,
    seconds,
    speed,
    title,
)
from nvflare_rdma.version import __version__

#: So many sites have a timeline, the slowest ones.
_TIMELINES = 40
#: Columns of tables, where there is something to tell.
_EFFORTS = [("FLARE's path", "fallback"), ("failed", "failed"), ("sent again", "resent_chunks")]
#: What the figures are made of; more is in docs/report.md.
_HOW_IT_COUNTS = (
    "A transfer has a record at each end and counts once: by its receiver's, unless its sender has more of them. "
    "Times are how long a site had at least one transfer under way, by its own clock, and goodput is raw bytes in such "
    "a second. Raw is what the models take in memory; on the wire is what travelled of them, without headers and "
    "without what was sent again."
)
_CLOCKS = (
    "Each site has its own clock and begins at 0 with its first transfer: compare how long things took, not when they "
    "were, from one site to another."
)


def page(report: Report) -> str:
    """The whole page."""
    digest = b64encode(sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = (
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title(report)),
        element("style", Html(STYLE)),
    )
    main = join(part for section in (_rounds, _loss, _sites, _reasons, _timelines) for part in section(report))
    body = hatches(), _header(report), element("main", main), _footer(report)
    return f"<!doctype html>\n{element('html', element('head', *head), element('body', *body), lang='en')}\n"


def _header(report: Report) -> Html:
    moved, effort = report.moved, report.effort
    bad = "bad" if effort.failed else None
    fewer = "without encoding" if fold(moved) == "-" else f"{fold(moved)} fewer"
    slowest = max(report.clients, key=lambda site: site.busy.seconds, default=None)
    cards: list[tuple[str, str, str, str | None]] = [
        ("Raw", amount(moved.raw_bytes), f"in {number(moved.transfers, 'transfer')}", None),
        ("On the wire", amount(moved.wire_bytes), fewer, None),
        ("Direct", f"{effort.direct:,}", ", ".join(map(fabric_name, report.fabrics)) or "none", None),
        ("FLARE's own path", f"{effort.fallback:,}", "see the reasons" if effort.fallback else "no fallback", None),
        ("Failed attempts", f"{effort.failed:,}", "see the reasons" if effort.failed else "none", bad),
        ("Chunks sent again", f"{effort.resent_chunks:,}", "lost with a rail, or damaged", None),
        ("Budget peak", amount(effort.budget_peak_bytes), "of the busiest process", None),
    ]
    if slowest is not None:
        cards.append(("Slowest site", seconds(slowest.busy.seconds), slowest.name, None))
    boxes = [
        element("div", element("dt", what), element("dd", figure, element("small", more), class_=class_))
        for what, figure, more, class_ in cards
    ]
    told = [element("p", note, class_="note") for note in notes(report)]
    said = element("p", title(report)), element("h1", headline(report)), element("p", f"From {report.source}")
    return element("header", *said, element("dl", *boxes), *told)


def _table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[object]], what: str) -> Html:
    """A table that scrolls by itself where it is too wide. `heads` are names and classes of the columns; the first
    cell of each row is its name."""
    head = element("tr", *(element("th", name, scope="col", class_=class_ or None) for name, class_ in heads))
    body = []
    for first, *others in rows:
        cells = [element("th", first, scope="row", class_=heads[0][1] or None)]
        cells += [element("td", cell, class_=heads[n][1] or None) for n, cell in enumerate(others, 1)]
        body.append(element("tr", *cells))
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", table, class_="scroll", role="region", aria_label=what, tabindex=0)


def _rounds(report: Report) -> Iterator[Html]:
    """What never happened has no column."""
    largest = max(each.moved.raw_bytes for each in report.rounds)
    ways = [("to sites", "down"), ("from sites", "up"), ("site to site", "between")]
    ways = [(name, field) for name, field in ways if any(getattr(r, field).transfers for r in report.rounds)]
    efforts = [(name, field) for name, field in _EFFORTS if any(getattr(r.effort, field) for r in report.rounds)]
    losses = [(report.loss_name, "")] if report.loss_name else []
    heads = [("round", ""), *((f"{name}, {kind}", "") for name, _ in ways for kind in ("raw", "wire"))]
    heads += [("raw, and on the wire", "left bar"), ("slowest site", "name"), ("time", ""), ("goodput", "")]
    heads += [*((name, "") for name, _ in efforts), *losses]
    rows = []
    for each in report.rounds:
        row: list[object] = [round_name(each)]
        for _, field in ways:
            row += [amount(getattr(each, field).raw_bytes), amount(getattr(each, field).wire_bytes)]
        row += [size_bar(each.moved, largest), each.slowest_site or "-"]
        row += [seconds(each.slowest_seconds), speed(each.goodput)]
        row += [f"{getattr(each.effort, field):,}" for _, field in efforts]
        row += ["-" if each.loss is None else f"{each.loss:.4g}"] if losses else []
        rows.append(row)
    yield element("h2", "Rounds")
    yield _table(heads, rows, "Rounds")
    if any(each.round is None for each in report.rounds):
        yield element("p", "The line without a number is what was moved outside of rounds.", class_="soft")


def _loss(report: Report) -> Iterator[Html]:
    values = {each.round: each.loss for each in report.rounds if each.round is not None and each.loss is not None}
    if len(values) > 1:
        chart = line_chart(values, report.loss_name)
        yield element("h2", report.loss_name)
        yield element("figure", chart, element("p", "As FLARE has averaged it over the sites.", class_="soft"))


def _sites(report: Report) -> Iterator[Html]:
    largest = max(max(site.received.raw_bytes, site.sent.raw_bytes) for site in report.sites)
    heads = [("site", "name"), ("received", ""), ("wire", ""), ("", "left bar"), ("goodput", "")]
    heads += [("sent", ""), ("wire", ""), ("", "left bar"), ("goodput", ""), ("time", ""), ("busy", "")]
    efforts = [(name, field) for name, field in _EFFORTS if any(getattr(s.effort, field) for s in report.sites)]
    heads += [("direct", "left"), *((name, "") for name, _ in efforts), ("budget peak", "")]
    rows = []
    for site in report.sites:
        rates, span = goodputs(site), span_of(site)
        row: list[object] = [site.name]
        for moved, rate in zip((site.received, site.sent), rates, strict=True):
            row += [amount(moved.raw_bytes), amount(moved.wire_bytes), size_bar(moved, largest), speed(rate)]
        row += [seconds(site.busy.seconds), f"{site.busy.seconds / span:.0%}" if span else "-"]
        row.append(", ".join(f"{count:,} {fabric_name(name)}" for name, count in site.fabrics.items()) or "-")
        row += [f"{getattr(site.effort, field):,}" for _, field in efforts]
        row.append(amount(site.effort.budget_peak_bytes) if site.wrote_records else "-")
        rows.append(row)
    yield element("h2", "Sites")
    yield _table(heads, rows, "Sites")
    told = "Busy is the share of the time from a site's first transfer to its last one in which something was moved."
    yield element("p", told, class_="soft")


def _reasons(report: Report) -> Iterator[Html]:
    yield from _told("Why FLARE's own path was taken", report.fallbacks)
    yield from _told("What failed", report.failures)


def _told(what: str, told: Sequence[Told]) -> Iterator[Html]:
    if not told:
        return
    rows = []
    for each in told:
        rounds = ", ".join(map(str, each.rounds[:12])) + ", ..." * (len(each.rounds) > 12)
        ways = ", ".join(each.ways[:8]) + ", ..." * (len(each.ways) > 8)
        rows.append((f"{each.transfers:,}", ways, rounds or "-", each.reason))
    yield element("h2", what)
    yield _table([("transfers", ""), ("from and to", "name"), ("rounds", "name"), ("reason", "why")], rows, what)


def _timelines(report: Report) -> Iterator[Html]:
    sites = [site for site in report.sites if site.wrote_records]
    shown = {site.name for site in sorted(sites, key=lambda site: -site.busy.seconds)[:_TIMELINES]}
    scale = max(map(span_of, sites), default=0.0)
    yield element("h2", "Timelines")
    yield element("p", _CLOCKS, class_="soft")
    yield legend()
    for site in sites:
        if site.name in shown:
            told = element("span", f" {number(len(site.entries), 'record')}, {seconds(span_of(site))}")
            yield element("figure", element("h3", site.name, told), timeline(site, scale))
    if len(shown) < len(sites):
        yield element("p", f"These are the {len(shown)} slowest of {len(sites)} sites.", class_="soft")


def _footer(report: Report) -> Html:
    now = datetime.now().astimezone().isoformat(" ", "minutes")
    return element("footer", element("p", _HOW_IT_COUNTS), element("p", f"nvflare-rdma {__version__}, {now}"))
