"""What a check of another host has found, as text for people."""

from __future__ import annotations

from collections.abc import Iterator

from nvflare_rdma.cli.doctor_text import item
from nvflare_rdma.cli.peer_check import REACHED, REFUSED, FabricCheck, PeerReport, PortCheck, as_ranges
from nvflare_rdma.cli.peer_link import Goodput


def to_text(report: PeerReport) -> str:
    """The report for people."""
    sections = (_peer, _fabrics, _ports, _verdict)
    return "\n\n".join(text for section in sections if (text := "\n".join(section(report))))


def _peer(report: PeerReport) -> Iterator[str]:
    at = "" if report.peer.startswith(f"{report.address}:") else f" at {report.address}"
    yield f"{report.peer} is reached{at} in {_time(report.connect_seconds)}"
    if report.secure:
        yield item("TLS", f"mutual: this side is {report.site!r}, the peer is {report.peer_site!r}, of one authority")
    else:
        yield item(
            "CLEAR", "nothing is encrypted and nobody is known: name the site's start-up kit (--kit) on both sides"
        )
    if report.versions == report.peer_versions:
        yield item("versions", f"the same on both sides: {_versions(report.versions)}")
    else:
        yield item("versions", f"here {_versions(report.versions)}")
        yield item("", f"peer {_versions(report.peer_versions)}")
    yield item("round trip", f"{_time(report.round_trip_seconds)} from a message to its answer, the median")
    fabric = "no rail: the control stream" if report.fabric == "control" else report.way
    yield item("a job's link", f"{fabric}{f' ({report.passed_over})' if report.passed_over else ''}")
    if report.peer_passed_over and report.peer_passed_over != report.passed_over:
        yield item("", f"the peer says: {report.peer_passed_over}")


def _fabrics(report: PeerReport) -> Iterator[str]:
    yield f"{'fabric':<8} {'usable':<7} {'to the peer':<26} from the peer"
    for name, found in report.fabrics.items():
        yield _fabric(name, found)


def _fabric(name: str, found: FabricCheck) -> str:
    if found.usable:
        return f"{name:<8} {'yes':<7} {_rate(found.to_peer):<26} {_rate(found.from_peer)}".rstrip()
    return item(f"{name:<8} no", found.reason, 0, 17)


def _ports(report: PeerReport) -> Iterator[str]:
    yield "Ports of the peer"
    groups: dict[tuple[str, str], list[int]] = {}
    for port in report.ports:
        groups.setdefault((port.what, _state(port)), []).append(port.port)
    for (what, state), ports in groups.items():
        yield item(as_ranges(ports), f"{state}: {what}", 2, 18)
    if report.peer_data_ports == "auto" and any("any port" in port.what for port in report.ports):
        text = (
            "its jobs listen at any port, which a firewall can't know: set a port, or a range, as rdma_data_ports there"
        )
        yield item("note", text)


def _state(port: PortCheck) -> str:
    if port.state == REFUSED and not port.open:
        return "refused, and nobody need listen there now"
    if port.state == REACHED and not port.open:
        return "reached, by whoever listens there"
    return port.state


def _verdict(report: PeerReport) -> Iterator[str]:
    if not report.problems:
        yield "All is well."
    for problem in report.problems:
        yield item("PROBLEM:", problem, 0, 9)


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _rate(found: Goodput | None) -> str:
    if found is None:
        return ""
    rate = found.bytes_per_second
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= unit:
            return f"{rate / unit:.3g} {name}B/s ({_bits(rate * 8)})"
    return f"{rate:.3g} B/s"


def _bits(rate: float) -> str:
    unit, name = (1e9, "G") if rate >= 1e9 else (1e6, "M") if rate >= 1e6 else (1e3, "k")
    return f"{rate / unit:.3g} {name}bit/s"
