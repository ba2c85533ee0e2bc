"""The packets of one direct transfer on a long wire: who sends what when, in round trips.

    python benchmarks/wan_timeline.py [--kib 4096,200] [--tensors 4] [--rtt 200] [--warm 1] [--only direct,grpc,...]
                                      [--brief]

One site gets a model and sends one (`wan_rounds.py`), over a wire so long that what processes do between two packets
does not matter, and of 1 Gbit/s without losses. ``--warm``: so many transfers each way come before, which open the
link and widen TCP's windows. Packets without payload (acknowledgements of TCP) are left out; those that follow one
another on one connection, within a tenth of a round trip, are one line. ``FLARE`` is what goes over FLARE's own
connection, ``data`` what goes over this package's. A line's time is when its first packet came to the wire.

The line above each timeline splits its round trips. One is the application's own request, which brings the reference to
the model, or asks for it. *The bytes* begin with the first full packets and end with the last: at this rate and RTT
that is TCP's slow start after the connection was idle. The rest are the transfer's requests. ``--brief`` prints that
line only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wan_rounds
from measuring import Peer, asked, command_line
from wan_rounds import CENTRE, CONFIGURATIONS, PORT, SERVER, Link, Star, go_apart, is_apart

SITE = "site-1"


class Side(wan_rounds.Side):
    """With a model of a few tensors of one size."""

    def __init__(self, role: str, url: str, shape: tuple[int, int], direct: bool, codec: str) -> None:
        import torch

        super().__init__(role, url, 0, direct, codec)
        if self._is_server:
            tensors, kib = shape
            self._model = {f"w{number}": torch.rand(kib * 256 // tensors) for number in range(tensors)}


@dataclass
class Burst:
    """Packets with payload that follow one another on one connection."""

    direction: int
    ports: frozenset[int]
    start: int
    end: int
    packets: int = 0
    payload: int = 0


def bursts(packets: Any, rtt: float) -> Iterator[Burst]:
    """In the order in which they begin."""
    found: list[Burst] = []
    last: dict[tuple[int, frozenset[int]], Burst] = {}
    for packet in packets:
        if not packet.payload or packet.fate != "carried":
            continue
        key = packet.direction, frozenset((packet.source, packet.target))
        burst = last.get(key)
        if burst is None or packet.came - burst.end > rtt * 1e5:
            burst = last[key] = Burst(*key, packet.came, packet.came)
            found.append(burst)
        burst.end = packet.came
        burst.packets += 1
        burst.payload += packet.payload
    yield from sorted(found, key=lambda one: one.start)


def span_of_bytes(found: list[Burst], rtt: float) -> float:
    """From the first burst of full packets to the end of the last, in round trips."""
    full = [one for one in found if one.packets >= 8 and one.payload > 1000 * one.packets]
    return (max(one.end for one in full) - min(one.start for one in full)) / 1e6 / rtt if full else 0.0


def show(title: str, seconds: float, found: list[Burst], rtt: float, brief: bool) -> None:
    whole, carried = seconds * 1000 / rtt, span_of_bytes(found, rtt)
    print(f"{title}: {whole:.1f} round trips = 1 of the application + {whole - 1 - carried:.1f} of requests", end="")
    print(f" + {carried:.1f} of the bytes")
    if brief:
        return
    print()
    print(f"{'at':>7} {'until':>6}  {'who':<8} {'over':<12} {'packets':>8} {'bytes':>9}")
    for one in found:
        begin, end = ((when - found[0].start) / 1e6 / rtt for when in (one.start, one.end))
        who = "site" if one.direction else "server"
        other = min(one.ports - {PORT})
        over = "FLARE" if PORT in one.ports else f"data {max(one.ports)}"
        print(f"{begin:>7.2f} {end:>6.2f}  {who:<8} {over if over != 'FLARE' else f'FLARE {other}':<12}", end="")
        print(f" {one.packets:>8} {one.payload:>9}")


def run(configuration: str, kib: int, args: argparse.Namespace) -> None:
    way = CONFIGURATIONS[configuration]
    scheme, flags = way.scheme, [str(int(way.direct)), way.codec]
    arguments = [f"{scheme}://{CENTRE}:{PORT}", str(args.tensors), str(kib), *flags]
    environment = {"NVFLARE_RDMA_FABRICS": "tcp"} if way.direct else {}
    with tempfile.TemporaryDirectory() as temporary:
        star = Star(Path(temporary), SERVER)
        wire = star.join(SITE, Link(rate=1000, delay=args.rtt / 2), Path(temporary) / "trace")
        peers = [Peer(["--peer", n, *arguments], environment, __file__, star.on(n)) for n in (SERVER, SITE)]
        try:
            for peer in peers:
                peer.answer()
            for _ in range(args.warm):
                for way in ("down", "up"):
                    peers[1].ask(way)
            for way in ("down", "up"):
                before = sum(1 for _ in wire.packets())
                seconds = peers[1].ask(way)["seconds"]
                packets = list(wire.packets())[before:]
                title = f"{configuration}, {kib} KiB in {args.tensors} tensors, {way}"
                show(title, seconds, list(bursts(packets, args.rtt)), args.rtt, args.brief)
        finally:
            for peer in peers:
                peer.close()
            star.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kib", default="4096,200", help="of the models (default: %(default)s)")
    parser.add_argument("--brief", action="store_true", help="how many round trips, and not what happened when")
    parser.add_argument("--tensors", type=int, default=4)
    parser.add_argument("--rtt", type=float, default=200.0, metavar="MS")
    parser.add_argument("--warm", type=int, default=1, help="transfers that come before (default: %(default)s)")
    parser.add_argument("--only", default="direct", help="of " + ",".join(CONFIGURATIONS))
    parser.add_argument("--peer", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        role, url, tensors, kib, direct, codec = args.peer
        Side(role, url, (int(tensors), int(kib)), direct == "1", codec).serve()
        return
    if not is_apart():
        go_apart(sys.executable, *sys.argv)
    print(f"$ {command_line()}")
    for configuration in asked(parser, args.only, CONFIGURATIONS):
        for kib in map(int, args.kib.split(",")):
            run(configuration, kib, args)


if __name__ == "__main__":
    main()
