"""What it costs to go through a parent's port: 256 MiB straight and through the parent, over the same wire.

    python benchmarks/through_parent.py [--mib 256] [--runs 3] [--rate 1000] [--delay 5] [--rails 2]

Two hosts (network namespaces) with a wire between them (tests/wan): on one, a parent and a server's job process; on
the other, a site. Links with certificates of one authority (TLS, sealed chunks). Each way is warmed up once; then they
take turns. It needs what tests/wan/wire.py needs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measuring import MIB, machine
from nvflare.fuel.f3.drivers.net_utils import get_ssl_context

from nvflare_rdma.channel import Door, Sink, Source
from nvflare_rdma.fabric import TcpFabric, factories, listen_tcp, probe
from nvflare_rdma.runtime import Runtime, Shared, make_context
from nvflare_rdma.settings import Settings
from nvflare_rdma.transfer import Junction, MeetingPlace, PeerLinks, RouteKey
from tests.support.certificates import Authority
from tests.wan.wire import CENTRE, Link, Star, go_apart, is_apart

WAYS = ("straight", "parent")
DEADLINE = 600.0


class Whole(Sink):
    """A message that lands in memory."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self._memory, self.over = nbytes, memoryview(bytearray(nbytes)), threading.Event()

    @property
    def buffer(self) -> memoryview | None:
        return self._memory

    def done(self) -> None:
        self.over.set()

    def failed(self, reason: str) -> None:
        raise SystemExit(reason)


class Zeros(Source):
    """Nothing but zeros, which are as long on the wire as anything else."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self._memory = nbytes, memoryview(bytearray(nbytes))

    def read(self, offset: int, length: int, take: Any) -> memoryview:
        return self._memory[offset : offset + length]


def make_links(name: str, files: dict[str, str], rails: int, place: MeetingPlace | None = None) -> PeerLinks:
    settings = Settings(rdma_fabrics=("tcp",), rdma_rails=rails)
    available = probe(settings.fabric_options)
    context = make_context(settings, available)
    runtime = Runtime(settings, context, factories(settings.fabric_options, available), Shared())
    return PeerLinks(
        name,
        runtime,
        lambda server_side: get_ssl_context({**files, "secure": True}, server_side),
        lambda peer, certificate: None,
        (CENTRE, 0),
        None if place is None else (0, 0),
        meet=None if place is None else lambda parent: place,
    )


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def lines() -> Any:
    for line in sys.stdin:
        yield json.loads(line)


def parent(_: dict[str, Any]) -> None:
    junction = Junction("server", "the server's data port")
    door = Door(listen_tcp("", 0), None, TcpFabric(1), junction.refuse, "the server's data port")
    door.takers = dict(junction.takers)
    threading.Thread(target=door.serve, daemon=True).start()
    key = junction.open("server.job")
    say([key.id.hex(), key.secret.hex(), door.address[1]])
    for _ in lines():
        status = Path("/proc/self/status").read_text()
        used = os.times()
        rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        say({"rss": rss * 1024, "cpu": used.user + used.system})


def server(given: dict[str, Any]) -> None:
    route, secret, port = given["route"]
    key = RouteKey(bytes.fromhex(route), bytes.fromhex(secret))
    links = make_links("server.job", given["files"], given["rails"], MeetingPlace(key, (CENTRE, port), [], port))
    source = Zeros(given["mib"] * MIB)
    for command in lines():
        if "invite" in command:
            made = links.invite(command["invite"])
            ways = [{**way, "token": way["token"].hex()} for way in made["through"]]
            say({**made, "ticket": made["ticket"].hex(), "through": ways})
        else:
            link = links.await_open(command["to"], DEADLINE)
            assert link is not None
            link.offer(source, command["label"]).wait(DEADLINE)


def site(given: dict[str, Any]) -> None:
    every = {way: make_links(f"site-1.{way}", given["files"], given["rails"]) for way in WAYS}
    for command in lines():
        links = every[command["way"]]
        if "invitation" in command:
            invitation = command["invitation"]
            invitation["ticket"] = bytes.fromhex(invitation["ticket"])
            ways = [{**way, "token": bytes.fromhex(way["token"])} for way in invitation["through"]]
            link = links.dial(
                "server.job",
                {**invitation, "through": [], "hosts": [CENTRE]}
                if command["way"] == "straight"
                else {**invitation, "through": ways, "port": 0},
            )
            say(link.way)
        else:
            sink = Whole(given["mib"] * MIB)
            say(links.expected.expect("server.job", [sink]))
            assert sink.over.wait(DEADLINE)
            say("over")


class Peer:
    """A process on one of the hosts, which does as it is told."""

    def __init__(self, star: Star, host: str, role: str, **given: Any) -> None:
        command = star.on(host, sys.executable, __file__, "--role", role, "--given", json.dumps(given))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)

    def hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    star = Star(folder / "star", "server")
    star.join("site", Link(rate=arguments.rate, delay=arguments.delay))
    authority = Authority(folder / "pki")
    common = {"rails": arguments.rails, "mib": arguments.mib}
    joining = Peer(star, "server", "parent")
    route = joining.hear()
    job = Peer(star, "server", "server", route=route, files=authority.issue("server", "server"), **common)
    far = Peer(star, "site", "site", files=authority.issue("client", "site-1"), **common)
    for way in WAYS:
        job.tell(invite=f"site-1.{way}")
        far.tell(way=way, invitation=job.hear())
        print(f"{way}: {far.hear()}")

    def once(way: str) -> float:
        far.tell(way=way)
        label = far.hear()
        began = time.monotonic()
        job.tell(to=f"site-1.{way}", label=label)
        assert far.hear() == "over"
        return time.monotonic() - began

    def of_parent() -> Any:
        joining.tell()
        return joining.hear()

    for way in WAYS:
        once(way)
    before, times = of_parent(), {way: [] for way in WAYS}
    for _ in range(arguments.runs):
        for way in WAYS:
            times[way].append(once(way))
    after = of_parent()
    medians = {way: statistics.median(values) for way, values in times.items()}
    print(f"{machine()}; {arguments.rate:g} Mbit/s, {2 * arguments.delay:g} ms, {arguments.rails} rails")
    for way, median in medians.items():
        rate = arguments.mib * MIB * 8 / median / 1e6
        print(f"{way}: {median:.2f} s ({', '.join(f'{value:.2f}' for value in times[way])}), {rate:.0f} Mbit/s")
    print(f"parent / straight: {medians['parent'] / medians['straight']:.2f}")
    print(
        f"the parent's memory: {before['rss'] / MIB:.1f} MiB before, {after['rss'] / MIB:.1f} MiB after; "
        f"{(after['cpu'] - before['cpu']) / arguments.runs:.2f} s of a processor for each {arguments.mib} MiB"
    )
    star.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--delay", type=float, default=5.0)
    parser.add_argument("--rails", type=int, default=2)
    parser.add_argument("--role", choices=("parent", "server", "site"))
    parser.add_argument("--given", type=json.loads)
    arguments = parser.parse_args()
    if arguments.role:
        {"parent": parent, "server": server, "site": site}[arguments.role](arguments.given)
    elif not is_apart():
        go_apart(sys.executable, *sys.argv)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, Path(folder))


if __name__ == "__main__":
    main()
