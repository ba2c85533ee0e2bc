"""Bars and timelines of a report's page, as SVG without a view box: places are in per cent, so that texts and hatches
keep their size on a phone and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from nvflare_rdma.cli.report_figures import Moved, Site
from nvflare_rdma.cli.report_markup import Html, element
from nvflare_rdma.cli.report_records import Entry
from nvflare_rdma.cli.report_words import amount, fabric_name, seconds

#: Pixels: of a bar in a timeline, of a line of text, and between things.
_BAR, _TEXT, _GAP = 9, 14, 3
#: So many transfers at once are drawn beside each other; further ones are drawn over the last of them.
_LANES = 6
#: Bars that together are narrower than this share of the width become one.
_NARROW = 0.004
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
_WORDS = {"direct": "direct", "flare": "on FLARE's own path", "failed": "failed"}


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _rect(at: float, top: float, width: float, height: float, class_: str, *content: Html) -> Html:
    places = {"x": _percent(at), "y": top, "width": _percent(width), "height": height}
    return element("rect", *content, **places, class_=class_)


def _text(at: float, baseline: float, text: str) -> Html:
    return element("text", text, x=_percent(at), y=baseline)


def size_bar(moved: Moved, largest: int) -> Html:
    """A bar of raw bytes, with what travelled of them in a stronger colour."""
    raw, wire = (min(nbytes / largest, 1.0) if largest else 0.0 for nbytes in (moved.raw_bytes, moved.wire_bytes))
    label = f"{amount(moved.raw_bytes)} raw, {amount(moved.wire_bytes)} on the wire"
    bars = _rect(0, 1, raw, 8, "raw"), _rect(0, 1, wire, 8, "wire")
    return element("svg", *bars, class_="size", width="100%", height=10, role="img", aria_label=label)


def hatches() -> Html:
    """What bars of fallbacks and failures are filled with, besides their colours."""
    line = element("path", d="M0 0V6", class_="stripe")
    cross = element("path", d="M0 0V6M0 0H6", class_="cross")
    box = {"width": 6, "height": 6, "patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
    ground = [element("rect", width=6, height=6, class_=f"ground-{kind}") for kind in ("flare", "failed")]
    patterns = (
        element("pattern", ground[0], line, id="flare", **box),
        element("pattern", ground[1], cross, id="failed", **box),
    )
    return element("svg", element("defs", *patterns), width=0, height=0, class_="hidden", aria_hidden="true")


def legend() -> Html:
    """What the bars of the timelines mean."""
    keys = []
    for kind, words in _WORDS.items():
        swatch = element("svg", _rect(0, 0, 1, _BAR, kind), width=18, height=_BAR, aria_hidden="true")
        keys.append(element("span", swatch, words, class_="key"))
    return element("p", *keys, class_="legend")


@dataclass
class _Span:
    """A bar of a timeline; times are in seconds since the beginning of the site's first transfer."""

    begin: float
    end: float
    kind: str
    label: str
    transfers: int = 1


def span_of(site: Site) -> float:
    """Seconds from the beginning of a site's first transfer to the end of its last one."""
    records = [entry.record for entry in site.entries]
    return max((r.time for r in records), default=0.0) - min((r.time - r.seconds for r in records), default=0.0)


def timeline(site: Site, scale: float) -> Html:
    """What a site received and sent, and when, by its own clock. `scale` seconds fill the width."""
    began = min(entry.record.time - entry.record.seconds for entry in site.entries)
    scale = scale or 1.0
    top: float = _TEXT + _GAP
    drawn: list[Html] = []
    for direction in ("received", "sent"):
        lanes = _lanes((e for e in site.entries if e.record.direction == direction), began, scale * _NARROW)
        if not lanes:
            continue
        drawn.append(_text(0, top + _TEXT - 4, direction))
        top += _TEXT
        for lane in lanes:
            drawn += [_bar(span, top, scale) for span in lane]
            top += _BAR + _GAP
        top += _GAP
    shades = _rounds(site.entries, began, scale, top)
    content = *shades, *_axis(scale, top), *drawn
    label = f"Timeline of {site.name}: {len(site.entries)} transfers in {seconds(span_of(site))}"
    return element("svg", *content, class_="timeline", width="100%", height=top + _TEXT, role="img", aria_label=label)


def _bar(span: _Span, top: float, scale: float) -> Html:
    label = span.label if span.transfers == 1 else f"{span.transfers} transfers, {_WORDS[span.kind]}"
    width = max((span.end - span.begin) / scale, _NARROW / 3)
    return _rect(span.begin / scale, top, width, _BAR, span.kind, element("title", label))


def _lanes(entries: Iterable[Entry], began: float, narrow: float) -> list[list[_Span]]:
    """Bars side by side where transfers were under way at the same time."""
    lanes: list[list[_Span]] = []
    for entry in entries:  # in the order in which they began
        record = entry.record
        kind = "failed" if record.failed else "flare" if record.path == "flare" else "direct"
        span = _Span(record.time - record.seconds - began, record.time - began, kind, _label(entry))
        free = next((lane for lane in lanes if lane[-1].end <= span.begin), None)
        if free is None and len(lanes) < _LANES:
            lanes.append([span])
            continue
        lane = lanes[-1] if free is None else free
        last = lane[-1]
        if last.kind == kind and max(span.end, last.end) - last.begin <= narrow:
            last.end, last.transfers = max(span.end, last.end), last.transfers + 1
        else:
            lane.append(span)
    return lanes


def _label(entry: Entry) -> str:
    record = entry.record
    at = "outside of rounds" if entry.round is None else f"round {entry.round}"
    way = "from" if record.direction == "received" else "to"
    if record.failed:
        return f"{at}: {way} {entry.other} {record.outcome}, after {seconds(record.seconds)}"
    how = "on FLARE's own path" if record.path == "flare" else fabric_name(record.fabric)
    size = f"{amount(record.raw_bytes)} ({amount(record.wire_bytes)} on the wire)"
    return f"{at}: {record.direction} {size} {way} {entry.other} in {seconds(record.seconds)} {how}"


def _rounds(entries: Iterable[Entry], began: float, scale: float, height: float) -> list[Html]:
    """Each round as a ground of its own, with its number where there is room."""
    times: dict[int, tuple[float, float]] = {}
    for entry in entries:
        if entry.round is not None:
            begin, end = entry.record.time - entry.record.seconds - began, entry.record.time - began
            known = times.get(entry.round, (begin, end))
            times[entry.round] = min(begin, known[0]), max(end, known[1])
    drawn, written = [], -1.0
    for at, (begin, end) in sorted(times.items()):
        place = begin / scale
        drawn.append(_rect(place, 0, max((end - begin) / scale, 0.001), height, f"round-{at % 2}"))
        if place >= written and place < 0.93:
            drawn.append(_text(place, _TEXT - 4, f"round {at}"))
            written = place + 0.09
    return drawn


def _axis(scale: float, top: float) -> list[Html]:
    """Ticks with their times."""
    step = _step(scale)
    drawn = []
    for n in range(int(scale / step) + 1):
        at = _percent(n * step / scale)
        drawn.append(element("line", x1=at, x2=at, y1=_TEXT, y2=top, class_="tick"))
        if n * step / scale < 0.93:
            drawn.append(_text(n * step / scale, top + _TEXT - 3, _tick(n * step, step)))
    return drawn


def _step(scale: float) -> float:
    """Seconds between two ticks, of which there are five or so."""
    if scale < 4:
        return next((s for s in (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if scale / s <= 6), 1.0)
    return next((float(s) for s in _STEPS if scale / s <= 6), 86400.0 * max(round(scale / 86400 / 5), 1))


def _tick(value: float, step: float) -> str:
    if step < 1:
        return f"{value:.{3 if step < 0.01 else 2 if step < 0.1 else 1}f} s"
    whole = round(value)
    if step < 60:
        return f"{whole} s"
    return f"{whole // 60} min" if step < 3600 else f"{whole / 3600:g} h"


def line_chart(values: Mapping[int, float], name: str) -> Html:
    """A line through a value of each round."""
    low, high = min(values.values()), max(values.values())
    first, last = min(values), max(values)
    points = [
        (0.02 + 0.9 * (at - first) / ((last - first) or 1), 0.88 - 0.74 * (value - low) / ((high - low) or 1))
        for at, value in sorted(values.items())
    ]
    drawn = []
    for a, b in pairwise(points):
        ends = {"x1": _percent(a[0]), "y1": _percent(a[1]), "x2": _percent(b[0]), "y2": _percent(b[1])}
        drawn.append(element("line", class_="loss", **ends))
    if len(points) <= 60:
        drawn += [element("circle", cx=_percent(x), cy=_percent(y), r=2.5, class_="loss") for x, y in points]
    for at, (x, y) in ((first, points[0]), (last, points[-1])):
        drawn.append(element("text", f"{values[at]:.4g}", x=_percent(x + 0.015), y=_percent(y - 0.05)))
    label = f"{name}: from {values[first]:.4g} in round {first} to {values[last]:.4g} in round {last}"
    return element("svg", *drawn, class_="chart", width="100%", height=120, role="img", aria_label=label)
