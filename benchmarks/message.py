"""One FLARE message, echoed between two processes: rdma beside FLARE's own tcp and grpc drivers, in one run.

    python benchmarks/message.py [--mib 256] [--repeats 5]

For each driver a server process echoes and a client process asks; the drivers take turns in every repeat, so that
a noisy moment hits all of them. Prints medians: seconds per echo, GB/s (both directions counted), CPU seconds and
peak RSS of both processes together, and ratios to FLARE's tcp. Every echo is compared byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

from measuring import free_port

from nvflare_rdma.cli import driver_path

DRIVERS = ("tcp", "grpc", "rdma")


def usage() -> dict[str, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu": used.ru_utime + used.ru_stime, "rss": used.ru_maxrss * 1024}


def peer(role: str, url: str, nbytes: int) -> None:
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell
    from nvflare.fuel.f3.cellnet.utils import new_cell_message

    cell = CoreCell(fqcn="server" if role == "serve" else "site-1", root_url=url, secure=False, credentials={})
    if role == "serve":
        cell.register_request_cb("bench", "echo", lambda request: new_cell_message({}, request.payload))
        cell.start()
        sys.stdin.read()
        result: dict[str, object] = {}
    else:
        cell.start()
        deadline = time.monotonic() + 20
        while not cell.is_cell_connected("server"):
            if time.monotonic() > deadline:
                raise SystemExit(f"no connection over {url}")
            time.sleep(0.05)
        data = os.urandom(nbytes)
        start = time.perf_counter()
        reply = cell.send_request("bench", "echo", "server", new_cell_message({}, data), timeout=120)
        seconds = time.perf_counter() - start
        result = {"seconds": seconds, "equal": bool(reply.payload == data)}
    cell.stop()
    print(json.dumps(result | usage()))


def echo(driver: str, nbytes: int) -> dict[str, float]:
    url = f"{driver}://127.0.0.1:{free_port()}"
    env = dict(os.environ, NVFLARE_COMM_DRIVER_PATH=driver_path())
    command = [sys.executable, __file__, "--peer"]
    with subprocess.Popen(
        [*command, "serve", url, str(nbytes)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            client = subprocess.run(
                [*command, "ask", url, str(nbytes)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=180,
            )
            out, _ = server.communicate(timeout=60)
        except BaseException:
            server.kill()
            raise
    asked, served = json.loads(client.stdout), json.loads(out)
    if not asked["equal"]:
        raise SystemExit(f"{driver}: the echo differs from what was sent")
    return {"seconds": asked["seconds"], "cpu": asked["cpu"] + served["cpu"], "rss": asked["rss"] + served["rss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(args.peer[0], args.peer[1], int(args.peer[2]))
        return
    nbytes = args.mib << 20
    runs: dict[str, list[dict[str, float]]] = {driver: [] for driver in DRIVERS}
    for _ in range(args.repeats):
        for driver in DRIVERS:
            runs[driver].append(echo(driver, nbytes))
    median = {d: {k: statistics.median(r[k] for r in runs[d]) for k in runs[d][0]} for d in DRIVERS}
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{args.mib} MiB echoed once, medians of {args.repeats}, {machine}")
    print(f"{'driver':<8}{'seconds':>9}{'GB/s':>7}{'CPU s':>7}{'RSS MiB':>9}   to tcp: time  CPU  RSS")
    for driver, m in median.items():
        ratio = [m[k] / median["tcp"][k] for k in ("seconds", "cpu", "rss")]
        print(
            f"{driver:<8}{m['seconds']:>9.2f}{2 * nbytes / m['seconds'] / 1e9:>7.2f}{m['cpu']:>7.1f}"
            f"{m['rss'] / 2**20:>9.0f}{'':>11}{ratio[0]:.2f} {ratio[1]:.2f} {ratio[2]:.2f}"
        )


if __name__ == "__main__":
    main()
