"""A parent's port in a process of its own: prints its port and a route's key, then its memory for each line it is sent.

python junction_process.py {splice | copy}
"""

from __future__ import annotations

import json
import sys
import threading

from nvflare_rdma.channel import Door
from nvflare_rdma.fabric import TcpFabric, listen_tcp
from nvflare_rdma.transfer.junction import Junction
from tests.support.link_process import resources


def main(how: str) -> None:
    junction = Junction("server", "the server's data port", how == "splice")
    door = Door(listen_tcp("", 0), None, TcpFabric(1), junction.refuse, "the server's data port")
    door.takers = dict(junction.takers)
    threading.Thread(target=door.serve, daemon=True).start()
    key = junction.open("server.job")
    print(json.dumps([door.address[1], key.id.hex(), key.secret.hex()]), flush=True)
    for _ in sys.stdin:
        print(resources()["rss"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
