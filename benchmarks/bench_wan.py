"""`nvflare-rdma bench` between two hosts that an emulated line joins, and what `plan` says of that line.

    python benchmarks/bench_wan.py [--rate 100] [--rtt 40] [--loss 0] -- [what bench takes]

The hosts are network namespaces (tests/wan/wire.py). Nothing of this machine's network is changed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.wan.wire import Link, Star, go_apart, is_apart  # noqa: E402

BENCH = [sys.executable, "-m", "nvflare_rdma.cli", "bench"]
PORT = 8004


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s")
    parser.add_argument("--rtt", type=float, default=40.0, help="ms")
    parser.add_argument("--loss", type=float, default=0.0, help="%% of the packets")
    parser.add_argument("options", nargs="*", help="what bench takes")
    args = parser.parse_args()
    if not is_apart():
        go_apart(sys.executable, *sys.argv)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        star = Star(Path(folder), "server")
        stack.callback(star.close)
        star.join("site", Link(rate=args.rate, delay=args.rtt / 2, loss=args.loss))
        where = star.address("server")
        listen = star.on("server", *BENCH, "--listen", f"{where}:{PORT}", "--runs", "1")
        with subprocess.Popen(listen, stderr=subprocess.PIPE, text=True, cwd=ROOT) as listener:
            assert listener.stderr is not None
            while "listens at" not in (line := listener.stderr.readline()):
                if not line:
                    raise SystemExit("the listener has ended")
            connect = star.on("site", *BENCH, "--connect", f"{where}:{PORT}", *args.options)
            code = subprocess.run(connect, cwd=ROOT, check=False).returncode
            if code:
                listener.terminate()
            listener.communicate(timeout=60)
    return code


if __name__ == "__main__":
    sys.exit(main())
