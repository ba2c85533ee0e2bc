"""Eight honest sites, alone and beside a hostile one that takes all it can get.

    python benchmarks/shares.py [--mib 16] [--rounds 5] [--sites 8] [--fabric tcp]

A server's process, one that is all honest sites, and one that is the hostile site: links with certificates of one
authority (TLS, sealed chunks), 4-bit values. In a round every honest site gets the server's model, all at once, and
then the server gets a model from every site. Requests and answers travel over pipes and are answered by 64 threads that
all sites share, as FLARE's are.

The hostile site has a certificate and tickets of its own. It does all of this at once, in several threads, for as long
as the honest ones are measured:

    silence        opens connections to the server's door and says nothing, or 8 bytes
    invitations    asks for one after the other
    links          opens as many as it gets
    grants         asks for the server's model, grants chunks of 64 MiB and takes nothing of what comes
    offers         is asked for a model, and offers 1 GiB of which nothing comes
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
from measuring import MIB, command_line, machine, versions
from nvflare.fuel.f3.drivers.net_utils import get_ssl_context
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nvflare_rdma.channel import Sink, Source
from nvflare_rdma.codecs import get_codec, marked
from nvflare_rdma.errors import TlsError
from nvflare_rdma.fabric import factories, probe
from nvflare_rdma.runtime import Runtime, Shared, make_context
from nvflare_rdma.settings import Settings
from nvflare_rdma.transfer import Meters, PeerLinks, Service, TensorContent, in_memory, pull, unpack_manifest
from tests.support.certificates import Authority

HOSTILE = "hostile"
ANY_PORT, THREADS = (0, 0), 64
LAND = in_memory(lambda nbytes: memoryview(bytearray(nbytes)))
console = Console(width=120)


def identify(peer: str, certificate: Any) -> None:
    names = {name: value for part in certificate["subject"] for name, value in part}
    if names["commonName"] != peer:
        raise TlsError(f"{names['commonName']} is not {peer}")


def make_links(
    name: str, files: dict[str, str], fabric: str, ports: tuple[int, int] | None, **settings: Any
) -> PeerLinks:
    made = Settings(rdma_fabrics=(fabric,), **settings)
    available = probe(made.fabric_options)
    context = make_context(made, available)
    if name == HOSTILE:
        context = replace(context, chunk_bytes=64 * MIB, depth=64, controller="fixed")
    runtime = Runtime(made, context, factories(made.fabric_options, available), Shared())
    tls = lambda server_side: get_ssl_context({**files, "secure": True}, server_side)  # noqa: E731
    return PeerLinks(name, runtime, tls, identify, ("127.0.0.1", 0), ports)


def model(mib: int, seed: int) -> dict[str, Any]:
    values = np.random.default_rng(seed).standard_normal((mib, MIB // 4), dtype=np.float32)
    return {f"layer.{i}": marked(values[i], get_codec("normfloat4")) for i in range(mib)}


# -- requests: (who asks, which service, request) -> answer ------------------------------------------------


def ask_over(connection: Connection, lock: threading.Lock, name: str, service: str) -> Callable[[dict[str, Any]], Any]:
    def ask(request: dict[str, Any]) -> Any:
        with lock:
            connection.send((name, service, request))
            return connection.recv()

    return ask


def answering(listener: Listener, answer: Callable[[str, str, dict[str, Any]], Any]) -> None:
    """Take requests of all peers, and have them answered by threads that they share."""
    pool = ThreadPoolExecutor(THREADS)

    def serve(connection: Connection) -> None:
        try:
            while True:
                connection.send(pool.submit(answer, *connection.recv()).result())
        except (EOFError, OSError):
            pass

    while True:
        threading.Thread(target=serve, args=(listener.accept(),), daemon=True).start()


# -- the three processes -----------------------------------------------------------------------------------


class Host:
    """What each of the processes has: a listener for requests, and services by name."""

    def __init__(self) -> None:
        self.services: dict[str, Service] = {}
        self.listener = Listener(("127.0.0.1", 0), backlog=128)  # else the kernel has some come back after a second
        threading.Thread(target=answering, args=(self.listener, self._answer), daemon=True).start()

    def _answer(self, who: str, service: str, request: dict[str, Any]) -> Any:
        return self.services[service].answer(request, who)

    def ask(self, address: Any, name: str, service: str) -> Callable[[dict[str, Any]], Any]:
        return ask_over(Client(address), threading.Lock(), name, service)


def server(control: Connection, files: dict[str, str], mib: int, fabric: str) -> None:
    host, links = Host(), make_links("server", files, fabric, ANY_PORT)
    host.services["model"] = Service(TensorContent(model(mib, 0)), lambda: links, meters=Meters("server"))
    control.send(host.listener.address)
    stuck: list[threading.Thread] = []
    while (told := control.recv()) is not None:
        name, address = told

        def take(name: str = name, address: Any = address) -> None:
            pull(links, name, host.ask(address, "server", name), LAND)

        if name == HOSTILE:  # nobody waits for it
            stuck.append(threading.Thread(target=take, daemon=True))
            stuck[-1].start()
        else:
            take()
        control.send("done")


def honest(control: Connection, files: dict[str, dict[str, str]], mib: int, fabric: str) -> None:
    host = Host()
    sites = {name: make_links(name, its, fabric, None) for name, its in files.items()}
    for number, (name, links) in enumerate(sites.items()):
        content = TensorContent(model(mib, number + 1))
        host.services[name] = Service(content, lambda links=links: links, meters=Meters(name))
    control.send(host.listener.address)
    while (address := control.recv()) is not None:
        began = time.perf_counter()

        def get(name: str, links: PeerLinks, address: Any = address) -> None:
            pull(
                links,
                "server",
                host.ask(address, name, "model"),
                LAND,
            )

        with ThreadPoolExecutor(len(sites)) as pool:
            list(pool.map(get, sites, sites.values()))
        control.send(time.perf_counter() - began)


class Nothing(Source):
    """A message of which nothing comes."""

    ready = False

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def read(self, offset: int, length: int, take: Any) -> memoryview:
        threading.Event().wait()
        raise AssertionError


class Full(Sink):
    """Takes the first chunk and never comes back."""

    def __init__(self, nbytes: int, unit: int) -> None:
        self.nbytes, self.unit = nbytes, unit

    def put(self, offset: int, chunk: memoryview) -> None:
        threading.Event().wait()

    def done(self) -> None:
        pass

    def failed(self, reason: str) -> None:
        pass


class Endless(TensorContent):
    def source(self, item: Any) -> Source:
        return Nothing(item.sent_nbytes)


def hostile(control: Connection, files: dict[str, str], fabric: str) -> None:
    host = Host()
    links = make_links(HOSTILE, files, fabric, None, rdma_memory_budget_bytes=4 << 30, rdma_chunk_bytes=64 * MIB)
    zeros = np.broadcast_to(np.float32(0.0), (256, MIB))
    large = {f"layer.{i}": marked(np.array(zeros[i]), get_codec("normfloat4")) for i in range(16)}
    host.services[HOSTILE] = Service(Endless(large), lambda: links, meters=Meters(HOSTILE))
    control.send(host.listener.address)
    if (address := control.recv()) is None:
        return
    counts = dict.fromkeys(("silence", "invitations", "links", "grants"), 0)
    over, refused = threading.Event(), dict[str, str]()

    def again(what: str, action: Callable[[], None], pause: float) -> None:
        while not over.wait(pause):
            try:
                action()
                counts[what] += 1
            except Exception as error:  # noqa: BLE001 - it is refused, and goes on
                refused[what] = str(error)
                over.wait(0.1)

    ask = host.ask(address, HOSTILE, "model")
    port = ask({"do": "describe"})["invitation"]["port"]
    silent: list[socket.socket] = []

    def say_nothing() -> None:
        silent.append(socket.create_connection(("127.0.0.1", port), 5.0))
        if len(silent) % 2:
            silent[-1].sendall(b"NVFRAIL1")
        if len(silent) > 1000:
            silent.pop(0).close()

    asks = [host.ask(address, HOSTILE, "model") for _ in range(4)]

    def open_link() -> None:
        links.dial("server", asks[1]({"do": "describe"})["invitation"])

    def grant() -> None:
        described = asks[2]({"do": "describe", "channel": True})
        if links.find("server") is None:
            links.dial("server", described["invitation"])
        items = unpack_manifest(described["manifest"])
        sinks = [Full(item.sent_nbytes, item.cut.unit) for item in items]
        first = links.expected.expect("server", sinks)
        said = asks[2]({"do": "send", "first": first, "items": list(range(len(items))), "invitation": None})
        if "refused" in said:
            raise RuntimeError(said["refused"])

    for what, action, pause in (
        ("silence", say_nothing, 0.01),
        ("invitations", lambda: asks[0]({"do": "describe"}) and None, 0.01),
        ("links", open_link, 0.1),
        ("grants", grant, 0.5),
    ):
        threading.Thread(target=again, args=(what, action, pause), daemon=True).start()
    began = time.monotonic()
    while not all(counts.values()) and time.monotonic() - began < 60.0:  # all of it is under way
        over.wait(0.1)
    control.send("begun")
    control.recv()
    over.set()
    control.send((counts, refused))


def measure(argv: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        names = [f"site-{n + 1}" for n in range(argv.sites)]
        files = {name: authority.issue("client", name) for name in names}
        ends: dict[str, Connection] = {}
        processes = []
        for name, target, arguments in (
            ("server", server, (authority.issue("server", "server"), argv.mib, argv.fabric)),
            ("honest", honest, (files, argv.mib, argv.fabric)),
            (HOSTILE, hostile, (authority.issue("client", HOSTILE), argv.fabric)),
        ):
            ends[name], theirs = spawn.Pipe()
            processes.append(spawn.Process(target=target, args=(theirs, *arguments), daemon=True))
            processes[-1].start()
        addresses = {name: end.recv() for name, end in ends.items()}

        def round_of_all() -> tuple[float, float]:
            ends["honest"].send(addresses["server"])
            down = ends["honest"].recv()
            began = time.perf_counter()
            for name in names:
                ends["server"].send((name, addresses["honest"]))
                assert ends["server"].recv() == "done"
            return down, time.perf_counter() - began

        round_of_all()
        alone = [round_of_all() for _ in range(argv.rounds)]
        ends[HOSTILE].send(addresses["server"])
        assert ends[HOSTILE].recv() == "begun"
        ends["server"].send((HOSTILE, addresses[HOSTILE]))
        ends["server"].recv()
        beside = [round_of_all() for _ in range(argv.rounds)]
        ends[HOSTILE].send(None)
        counts, refused = ends[HOSTILE].recv()
        for process in processes:
            process.kill()
            process.join()
    what = f"{argv.sites} sites, {argv.mib} MiB each, {argv.fabric}"
    table = Table(title=f"{what}, medians (most) of {argv.rounds} rounds, s")
    for column in ("", "alone", "beside the hostile site", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for index, way in enumerate(("down, all at once", "up, one after the other")):
        first, second = ([times[index] for times in each] for each in (alone, beside))
        ratio = statistics.median(second) / statistics.median(first)
        cells = (f"{statistics.median(each):.2f} ({max(each):.2f})" for each in (first, second))
        table.add_row(way, *cells, f"{ratio:.2f}")
    console.print(table)
    console.print("the hostile site did: " + ", ".join(f"{what} {count}" for what, count in counts.items()))
    for what, reason in refused.items():
        console.print(f"refused at last: {what}: {reason}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--fabric", default="tcp")
    arguments = parser.parse_args()
    for line in (command_line(), machine(), versions()):
        console.print(line)
    measure(arguments)
