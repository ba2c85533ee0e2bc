"""What `doctor` found, as text for people: lines of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from nvflare_rdma.cli.doctor import ROCE_HEADERS, PortReport, Report, roce_packet_bytes
from nvflare_rdma.fabric import DEVICE_FILES
from nvflare_rdma.fabric.verbs import ROCE
from nvflare_rdma.settings import as_time

WIDTH = 100
_SLOWER = (
    "a software device is slower than tcp; it is used only when asked for, by rdma_device={0} or rdma_fabrics=verbs"
)


def to_text(report: Report) -> str:
    """The report for people."""
    sections = (_machine, _settings, _class_list, _checks, _devices, _needs, _fabrics)
    texts = ("\n".join(section(report)) for section in sections)
    return "\n\n".join(text for text in texts if text)


def item(label: str, text: str, indent: int = 2, column: int = 18) -> str:
    """One entry: a label, and its text in a column of its own."""
    start = f"{' ' * indent}{label:<{column - indent}}"
    start += "" if start.endswith(" ") else " "
    # Commands are to be copied: nothing is broken within a word.
    lines = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * column,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return "\n".join(lines) or start.rstrip()


def _machine(report: Report) -> Iterator[str]:
    yield f"nvflare-rdma {report.nvflare_rdma}, {report.system}, user {report.user}"
    yield f"Python {report.python}, {report.executable}"
    yield ", ".join(f"{name} {number or 'not installed'}" for name, number in report.packages.items())
    for problem in report.problems:
        yield item("ERROR:", problem, 0, 7)


def _settings(report: Report) -> Iterator[str]:
    told = "the defaults, because of the error" if report.problems else f"from {report.settings_from}"
    yield from textwrap.wrap(f"Settings, {told}", WIDTH, subsequent_indent="  ", break_long_words=False)
    for name, value in report.settings.items():
        changed = " (set)" if name in report.settings_changed else ""
        yield item(name, f"{_setting(name, value) or '-'}{changed}", column=28)
    yield from _links(report)


def _links(report: Report) -> Iterator[str]:
    if report.links:
        yield item("links of RdmaTransfer", report.links, column=28)


def _setting(name: str, value: Any) -> str:
    """As one writes it in a configuration; "" for none."""
    if name == "rdma_data_ports" and isinstance(value, tuple):
        return "-".join(str(port) for port in dict.fromkeys(value))  # one port is a range from itself to itself
    if name == "rdma_patience":
        return as_time(value).replace(" ", "").replace("min", "m")
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _class_list(report: Report) -> Iterator[str]:
    if (found := report.class_list) is None:
        return
    yield "Jobs that bring no code of their own"
    if found.advice:
        yield item("can't use", f"this package: {found.advice} (`nvflare-rdma enable` does)")
    else:
        yield item("may use", f"this package: {found.file} allows it")


def _devices(report: Report) -> Iterator[str]:
    yield "RDMA devices" if report.ports else "RDMA devices: none"
    for port in report.ports:
        software = "software " if port.software else ""
        used = ", chosen" if port.chosen else ""
        yield f"  {port.device} port {port.port}: {port.state}, {software}{port.transport}, {port.rate}{used}"
        yield from (item(label, text, 4) for label, text in _port_lines(port))


def _port_lines(port: PortReport) -> Iterator[tuple[str, str]]:
    if port.refusal:
        yield "not used", f"it {port.refusal}"
    yield "opened by", port.cannot_open or f"{DEVICE_FILES / port.device_file}, this process may"
    yield "packets", f"of {port.packet_bytes} bytes" if port.packet_bytes else f"unknown: {port.packet_bytes_unknown}"
    for netdev, mtu in port.netdevs.items():
        if mtu is None:
            yield netdev, "not in this network namespace: its GIDs can't be used here"
        elif port.transport == ROCE:
            fits = roce_packet_bytes(mtu)
            advice = "" if fits == 4096 else f"; 4096 need an MTU of {4096 + ROCE_HEADERS} or more, on the way too"
            yield netdev, f"MTU {mtu}: packets of {fits} bytes fit{advice}"
        else:
            yield netdev, f"MTU {mtu}"
    for gid in port.gids:
        chosen = f", {'chosen' if port.chosen else 'would be chosen'}: {gid.chosen}" if gid.chosen else ""
        yield f"GID {gid.index}", f"{gid.address} ({gid.kind}{f' on {gid.netdev}' if gid.netdev else ''}){chosen}"
    if port.no_gid:
        yield "no GID", port.no_gid
    if port.software and not port.refusal:
        yield "note", _SLOWER.format(port.device)


def _needs(report: Report) -> Iterator[str]:
    yield "What RDMA needs"
    limit = "no limit" if report.locked_memory_limit is None else f"up to {report.locked_memory_limit // 1024} KiB"
    enough = f"{limit} for this process; {report.locked_memory_needed // 1024} KiB are needed"
    yield item("locked memory", report.locked_memory_reason or enough)
    core = f", rdma-core {report.rdma_core}" if report.rdma_core else ""
    yield item("pyverbs", report.pyverbs_reason or f"can be loaded{core}")
    yield item("kernel modules", f"loaded: {', '.join(report.modules_loaded) or 'none'}")
    yield item("", f"not loaded: {', '.join(report.modules_missing) or 'none'}")


def _checks(report: Report) -> Iterator[str]:
    yield "This host"
    for check in report.checks:
        advice = f". Fix: {check.advice}" if check.advice else ""
        yield item(f"{check.verdict:<8} {check.name}", f"{check.value}{advice}", 2, 31)


def _fabrics(report: Report) -> Iterator[str]:
    yield f"{'fabric':<8} {'usable':<7} reason"
    for name, fabric in report.fabrics.items():
        text = fabric.reason or fabric.uses
        if not fabric.allowed:
            left_out = f"left out by rdma_fabrics={','.join(report.settings['rdma_fabrics'])}"
            text = f"{left_out}; {text}" if text else left_out
        yield item(f"{name:<8} {'yes' if fabric.usable else 'no'}", text, 0, 17)
