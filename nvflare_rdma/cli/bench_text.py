"""What a bench has found: a table for people, data for programs, and a picture."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nvflare_rdma.cli.bench_link import EXACT
from nvflare_rdma.cli.bench_report import MIB, RAW, BenchReport, Figure
from nvflare_rdma.cli.link_model import HEADERS, Line, Message, seconds_of
from nvflare_rdma.cli.report_markup import Html, element
from nvflare_rdma.cli.units import as_rate

_LEAST_WIDTH = 80
#: Of the picture, in pixels: a row, what is written beside the bars, and the bars.
_ROW, _LABEL, _BARS = 18, 250, 420
_COLOURS = {True: "#76b900", False: "#4a90c2"}


def line_of(report: BenchReport) -> Line | None:
    """The line between the two hosts as `plan` takes it: the best rate of the largest size that went over it as it is,
    with the headers that went with it, and the round trip. None within one host, where there is no line."""
    over = [each for each in report.figures if each.fabric in (RAW, "tcp") and each.codec == EXACT]
    if report.same_host or not over:
        return None
    largest = max(each.size_bytes for each in over)
    best = max(min(each.to_peer, each.from_peer) for each in over if each.size_bytes == largest)
    return Line(best * (1 + HEADERS) * 8, report.round_trip_seconds)


def planned_seconds(figure: Figure, line: Line) -> float:
    """What `plan` says that moving a tensor of this size takes over such a line, one way and to one site."""
    return seconds_of(Message(1, figure.size_bytes, figure.size_bytes), line, 1).total


def to_data(report: BenchReport) -> dict[str, Any]:
    """The report in JSON's types."""
    line = line_of(report)
    told = asdict(report)
    told["line"] = None if line is None else {"rate_bits_per_second": line.rate, "round_trip_seconds": line.round_trip}
    for each, figure in zip(told["figures"], report.figures, strict=True):
        each["of_raw"] = _of_raw(figure, report.figures)
        known = line is not None and figure.fabric == "tcp" and figure.codec == EXACT
        each["planned_seconds"] = planned_seconds(figure, line) if known and line is not None else None
    return told


def to_text(report: BenchReport) -> str:
    """The report for people."""
    width = max(shutil.get_terminal_size((80, 24)).columns, _LEAST_WIDTH)
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as text:
        for line in _head(report):
            console.print(line)
        if report.figures:
            console.print(_table(report.figures))
        for line in _notes(report):
            console.print(line)
    return "\n".join(line.rstrip() for line in text.get().strip("\n").splitlines())


def _head(report: BenchReport) -> Iterator[str]:
    who = f"{report.site or 'this process'} and {report.peer_site or 'another one'}"
    where = "on this host" if report.same_host else f"at {report.peer}"
    secured = "TLS, and sealed over the network" if report.secure else "CLEAR: nothing is encrypted (no --kit)"
    yield f"{who} {where}; {secured}; round trip {1e3 * report.round_trip_seconds:.3g} ms"
    yield "Rates are to the peer and from it; CPU seconds and peak memory are of this process and of the peer's."
    if report.versions != report.peer_versions:
        yield f"versions differ: here {_versions(report.versions)}; there {_versions(report.peer_versions)}"


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _table(figures: Sequence[Figure]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    chunks = any(each.chunk_bytes for each in figures)
    codecs = any(each.codec != EXACT for each in figures)
    table.add_column("over", no_wrap=True)
    if chunks:
        table.add_column("chunk\nKiB", justify="right", no_wrap=True)
    if codecs:
        table.add_column("codec", no_wrap=True)
    for header in ("MiB", "MB/s\nto", "MB/s\nfrom", "of\nraw", "CPU s/GB\nboth ends", "peak MB\nboth ends"):
        table.add_column(header, justify="right", no_wrap=True)
    for each in figures:
        cells = [f"{each.fabric.split()[0]}{f' x{each.rails}' if each.fabric in ('tcp', RAW) else ''}"]
        if chunks:
            cells.append(f"{each.chunk_bytes // 1024}" if each.chunk_bytes else "")
        if codecs:
            cells.append(each.codec)
        of_raw = _of_raw(each, figures)
        cells += [f"{each.size_bytes // MIB}", _rate(each.to_peer), _rate(each.from_peer)]
        cells.append("" if each.fabric == RAW or of_raw is None else f"{of_raw:.0%}")
        cells.append(f"{each.cpu_seconds:.2f} {each.peer_cpu_seconds:.2f}")
        cells.append(f"{each.peak_bytes / 1e6:.0f} {each.peer_peak_bytes / 1e6:.0f}")
        table.add_row(*cells)
    return table


def _rate(value: float) -> str:
    return f"{value / 1e6:,.0f}" if value >= 1e8 else f"{value / 1e6:.3g}"


def _of_raw(figure: Figure, figures: Sequence[Figure]) -> float | None:
    """The rate as a share of the best that plain TCP has reached for this size; None if nothing is known of that."""
    raw = [each.rate for each in figures if each.fabric == RAW and each.size_bytes == figure.size_bytes]
    return figure.rate / max(raw) if raw else None


def _notes(report: BenchReport) -> Iterator[str]:
    for each in report.left_out:
        yield f"not measured: {each}"
    if report.broke_off:
        yield f"The bench broke off, and nothing more was measured: {report.broke_off}"
    if (line := line_of(report)) is None:
        return
    yield f"For `nvflare-rdma plan`: --site NAME={line.rate / 1e6:.3g}Mbit,{1e3 * line.round_trip:.3g}ms"
    exact = [each for each in report.figures if each.fabric == "tcp" and each.codec == EXACT]
    if exact:
        largest = max(exact, key=lambda each: each.size_bytes)
        planned, found = planned_seconds(largest, line), largest.size_bytes / largest.rate
        yield (
            f"It says {planned:.3g} s for {largest.size_bytes // MIB} MiB each way over such a line "
            f"({as_rate(float(f'{line.rate:.3g}'))}); measured {found:.3g} s ({planned / found - 1:+.0%})."
        )


def to_svg(report: BenchReport) -> str:
    """A bar for each direction of each figure."""
    most = max((max(each.to_peer, each.from_peer) for each in report.figures), default=1.0)
    drawn: list[Html] = [
        element("text", "MB/s to the peer", x=_LABEL, y=13, fill=_COLOURS[True], font_weight="bold"),
        element("text", "MB/s from it", x=_LABEL + 130, y=13, fill=_COLOURS[False], font_weight="bold"),
    ]
    top = 22
    for each in report.figures:
        drawn.append(element("text", _label(each), x=_LABEL - 8, y=top + _ROW - 4, text_anchor="end"))
        for to_peer, rate in ((True, each.to_peer), (False, each.from_peer)):
            width = max(_BARS * rate / most, 1.0)
            drawn.append(
                element("rect", x=_LABEL, y=top, width=f"{width:.1f}", height=_ROW - 4, fill=_COLOURS[to_peer])
            )
            drawn.append(element("text", _rate(rate), x=f"{_LABEL + width + 5:.1f}", y=top + _ROW - 6))
            top += _ROW - 2
        top += 6
    wide = _LABEL + _BARS + 70
    box = {"viewBox": f"0 0 {wide} {top}", "width": wide, "height": top, "font_family": "sans-serif", "font_size": 12}
    ground = element("rect", width="100%", height="100%", fill="white")
    title = element("title", f"Goodput between {report.site or 'this host'} and {report.peer_site or report.peer}")
    return element("svg", title, ground, *drawn, xmlns="http://www.w3.org/2000/svg", **box)


def _label(figure: Figure) -> str:
    parts = [figure.fabric, f"{figure.rails} rails" if figure.fabric == "tcp" else ""]
    parts.append(f"{figure.rails} connections" if figure.fabric == RAW and figure.rails > 1 else "")
    parts.append(f"{figure.chunk_bytes // 1024} KiB" if figure.chunk_bytes else "")
    parts.append(figure.codec if figure.codec != EXACT else "")
    return ", ".join([part for part in parts if part] + [f"{figure.size_bytes // MIB} MiB"])
