"""What verbs cost this machine: registration beside copies, and the CPU of a transfer beside tcp.

    python tests/guest/guest.py -- python benchmarks/verbs_costs.py      in the test guest, over its wire
    python benchmarks/verbs_costs.py --devices mlx5_0,mlx5_1 --hosts 192.0.2.1,192.0.2.2     where there are devices

Three tables. The first: to register memory as the source of a write and to deregister it, to expose it to a peer and
to end that, to find it registered, and to copy it to memory that is registered. The second: to post work requests one
by one and as a chain. The third: CPU seconds and context switches of both ends for messages over the fabric tcp and
over verbs, with the source copied to pool slots, registered in place for each chunk, and registered in place once. The
software devices rxe and siw work in the kernel, so what the two processes use is not all: the machine's use is beside.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from channel_peers import serve
from measuring import MIB, Peer, command_line, free_port, machine, versions
from rich import box
from rich.console import Console
from rich.table import Table

KIB = 1024
SIZES = [4 * KIB, 64 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB, 16 * MIB]
CHAINS = [1, 4, 16]
NEVER = 1 << 40
#: What is measured -> how: fabric, from how many bytes on the source is registered in place, whether it is an array
#: (whose registration is kept).
TRANSFERS: dict[str, dict[str, Any]] = {
    "tcp": {"fabric": "tcp", "in_place": 0, "array": True},
    "verbs, pool slots": {"fabric": "verbs", "in_place": NEVER, "array": True},
    "verbs, in place each time": {"fabric": "verbs", "in_place": 0, "array": False},
    "verbs, in place once": {"fabric": "verbs", "in_place": 0, "array": True},
}
console = Console(width=170, color_system=None)


def median_of(measure: Callable[[], float], repeats: int) -> float:
    return statistics.median(measure() for _ in range(repeats))


def timed(step: Callable[[], object], at_least: float = 0.05) -> float:
    """Seconds of one ``step``, of as many as fill the time."""
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < at_least or not count:
        step()
        count += 1
    return spent / count


def pages(nbytes: int, huge: bool) -> memoryview:
    """Memory that is touched, in huge pages if the kernel has them, or in small ones."""
    from nvflare_rdma.fabric.shm import address_of

    memory = mmap.mmap(-1, nbytes + 2 * MIB)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    start = -address_of(memoryview(memory)) % (2 * MIB)
    view = memoryview(memory)[start : start + nbytes]
    np.frombuffer(view, np.uint8)[:] = 1
    return view


def registration(device: str, repeats: int) -> None:
    from nvflare_rdma.fabric import VerbsOptions
    from nvflare_rdma.fabric.shm import address_of
    from nvflare_rdma.fabric.verbs import RegistrationCache, choose_gid, choose_ports, list_ports
    from nvflare_rdma.fabric.verbs.ports import Access, Port

    options = VerbsOptions((device,))
    info = choose_ports(list_ports(), options)[0]
    port = Port(info, choose_gid(info, options, None, "")[0])
    cache = RegistrationCache(64 * MIB)

    def register(view: memoryview, access: Access) -> None:
        port.register(address_of(view), len(view), access).close()

    def find(array: np.ndarray) -> None:
        cache.release(cache.acquire(port, lambda at, size: port.register(at, size, Access.SOURCE), array.data, bool))

    table = Table(title=f"{info}: microseconds, medians of {repeats}", title_justify="left", box=box.MARKDOWN)
    table.add_column("KiB", justify="right")
    for heading in ("source, 4 KiB pages", "source, huge pages", "exposed, 4 KiB pages", "exposed, huge pages"):
        table.add_column(heading, justify="right")
    table.add_column("found registered", justify="right")
    table.add_column("copy", justify="right")
    for size in SIZES:
        small, large, array, slot = pages(size, False), pages(size, True), np.ones(size, np.uint8), pages(size, True)
        steps: list[Callable[[], object]] = [
            *(lambda v=view: register(v, Access.SOURCE) for view in (small, large)),
            *(lambda v=view: register(v, Access.EXPOSED) for view in (small, large)),
            lambda a=array: find(a),
            lambda to=slot, of=small: to.__setitem__(slice(None), of),
        ]
        micros = [median_of(lambda step=step: timed(step), repeats) * 1e6 for step in steps]
        table.add_row(str(size // KIB), *(f"{value:.0f}" for value in micros))
    console.print(table)
    cache.drop(port)
    port.close()


def posting(devices: list[str], repeats: int) -> None:
    """Writes of 64 bytes, so that what a request costs is seen and not what it carries."""
    from nvflare_rdma.fabric import VerbsOptions
    from nvflare_rdma.fabric.shm import address_of
    from nvflare_rdma.fabric.verbs import choose_gid, choose_ports, list_ports
    from nvflare_rdma.fabric.verbs.ports import Access, Port
    from nvflare_rdma.fabric.verbs.queue_pair import QueuePair, Work
    from nvflare_rdma.fabric.verbs.registration_cache import Segment

    ports, pairs, memory = [], [], pages(2 * MIB, True)
    for device in devices:
        options = VerbsOptions((device,))
        info = choose_ports(list_ports(), options)[0]
        ports.append(Port(info, choose_gid(info, options, None, "")[0]))
        pairs.append(QueuePair(ports[-1], 128, 8, 16))
        pairs[-1].prepare()
    for i in (0, 1):
        other, at = pairs[1 - i], ports[1 - i]
        pairs[i].connect(at.gid, at.lid, at.mtu, other.number, other.first_packet, options)
    target = ports[0].register(address_of(memory), len(memory), Access.EXPOSED)
    source = ports[1].register(address_of(memory) + MIB, 64, Access.SOURCE)
    work = Work([Segment(address_of(memory) + MIB, 64, source.lkey)], (address_of(memory), target.rkey))

    def write(chain: int) -> tuple[float, float]:
        """Microseconds for each of 16 requests: to post them, and until they are done."""
        start = time.perf_counter()
        for _ in range(16 // chain):
            pairs[1].post([work] * chain, 1)
        posted, left = time.perf_counter(), 16 // chain
        while left:
            left -= len(pairs[1].completions())
            if time.perf_counter() - posted > 10:
                raise SystemExit("the writes were not completed within 10 s")
        return (posted - start) / 16 * 1e6, (time.perf_counter() - start) / 16 * 1e6

    title = f"Writes of 64 bytes from {devices[1]} to {devices[0]}: microseconds each, medians of {repeats * 5}"
    table = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for heading in ("requests in a chain", "to post", "until completed"):
        table.add_column(heading, justify="right")
    for chain in CHAINS:
        runs = [write(chain) for _ in range(repeats * 5)]
        post, done = (statistics.median(run[i] for run in runs) for i in (0, 1))
        table.add_row(str(chain), f"{post:.1f}", f"{done:.1f}")
    console.print(table)
    for each in (*pairs, target, source, *ports):
        each.close()


def busy() -> float:
    """Seconds that the machine's CPUs have worked."""
    with open("/proc/stat") as file:
        ticks = [int(field) for field in file.readline().split()[1:]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def run_transfer(options: dict[str, Any]) -> dict[str, float]:
    """One warm transfer of a fresh pair of processes; what arrives is compared before."""
    text = json.dumps(options | {"port": free_port()})
    receiver = Peer(["--peer", "link", "receive", text], {}, __file__)
    receiver.answer()  # it listens
    sender = Peer(["--peer", "link", "send", text], {}, __file__)
    sender.answer()
    receiver.answer()
    peers = sender, receiver
    try:
        receiver.tell("receive_one")
        if sender.ask("send_one") != receiver.answer():
            raise SystemExit(f"what arrived differs from what was sent: {options}")
        for peer in peers:
            peer.ask("idle")
        before = busy()
        receiver.tell("receive")
        start = sender.ask("send")["at"]
        seconds = receiver.answer()["at"] - start
        result = {"seconds": seconds, "machine": busy() - before}
        for name, peer in zip(("sender", "receiver"), peers, strict=True):
            result |= {f"{name} {key}": value for key, value in peer.ask("used").items()}
        return result
    finally:
        for peer in peers:
            peer.close()


def transfers(args: argparse.Namespace, devices: list[str]) -> None:
    base = {"total": args.mib * MIB, "message": min(32, args.mib) * MIB, "rails": args.rails, "chunk": MIB}
    base |= {"sealed": False, "devices": devices, "hosts": args.hosts.split(",")}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in TRANSFERS}
    for _ in range(args.repeats):
        for name, how in TRANSFERS.items():
            runs[name].append(run_transfer(base | how))
    title = (
        f"{args.mib} MiB in messages of 32 MiB and chunks of 1 MiB, {args.rails} rails, clear, over "
        f"{' to '.join(reversed(base['hosts']))}: medians of {args.repeats}"
    )
    table = Table(title=title, title_justify="left", box=box.MARKDOWN)
    table.add_column("")
    for heading in ("MB/s", "CPU s/GiB: sender", "receiver", "machine", "of tcp", "switches/GiB: sender", "receiver"):
        table.add_column(heading, justify="right")
    gib, tcp = args.mib / 1024, 0.0
    for name, results in runs.items():
        m = {key: statistics.median(run[key] for run in results) for key in results[0]}
        tcp = tcp or m["machine"]
        table.add_row(
            *(name, f"{args.mib * MIB / m['seconds'] / 1e6:.0f}"),
            *(f"{m[key] / gib:.2f}" for key in ("sender cpu", "receiver cpu", "machine")),
            f"{m['machine'] / tcp:.2f}",
            *(f"{m[f'{end} switches'] / gib:.0f}" for end in ("sender", "receiver")),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", default="rxa,rxb", help="the receiver's and the sender's")
    parser.add_argument("--hosts", default="10.8.0.1,10.8.0.2", help="addresses of these")
    parser.add_argument("--mib", type=int, default=128, help="of each transfer")
    parser.add_argument("--rails", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        serve(args.peer[0], args.peer[1], json.loads(args.peer[2]))
        return
    devices = args.devices.split(",")
    console.print(f"$ {command_line()}\n{machine()}", highlight=False)
    console.print(versions("nvflare-rdma", "numpy"), highlight=False)
    registration(devices[0], args.repeats)
    posting(devices, args.repeats)
    transfers(args, devices)


if __name__ == "__main__":
    main()
