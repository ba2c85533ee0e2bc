"""One FLARE cell in a process of its own, for the driver tests: ``serve`` echoes, ``ask`` sends and compares,
``ask_twice`` lives through a server that is replaced.

    python echo_peer.py serve URL '{"credentials": {...}}'
    python echo_peer.py ask URL '{"sizes": [...], "credentials": {...}}'

Prints one JSON object. Logs go to stderr.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time

from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import new_cell_message

CONNECT_DEADLINE = 20.0
#: Longer where the machine is slower than others: see `tests/guest/speed.py`.
ANSWER_DEADLINE = 90.0 * int(os.environ.get("RDMA_TEST_PATIENCE", "1"))


def pattern(size: int) -> bytes:
    """``size`` bytes in which no two 64-byte blocks are alike."""
    return hashlib.shake_128(str(size).encode()).digest(size)


def make_cell(fqcn: str, url: str, options: dict) -> CoreCell:
    credentials = options.get("credentials", {})
    secure = options.get("secure", bool(credentials))
    return CoreCell(fqcn=fqcn, root_url=url, secure=secure, credentials=credentials)


def serve(url: str, options: dict) -> None:
    cell = make_cell("server", url, options)
    cell.register_request_cb("test", "echo", lambda request: new_cell_message({}, request.payload))
    cell.start()
    sys.stdin.read()  # until the test closes it
    cell.stop()


def ask(url: str, options: dict) -> None:
    cell = make_cell("site-1", url, options)
    cell.start()
    result: dict = {"connected": False, "echoes": []}
    deadline = time.monotonic() + options.get("connect_deadline", CONNECT_DEADLINE)
    while time.monotonic() < deadline and not result["connected"]:
        result["connected"] = cell.is_cell_connected("server")
        if not result["connected"]:
            time.sleep(0.05)  # FLARE has no event for this
    if result["connected"]:
        endpoint = cell.agents["server"].endpoint
        result["peer_cn"] = endpoint.conn_props.get("peer_cn")
        for size in options["sizes"]:
            data = pattern(size)
            reply = cell.send_request("test", "echo", "server", new_cell_message({}, data), timeout=ANSWER_DEADLINE)
            ok = reply.headers.get(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK
            result["echoes"].append({"size": size, "equal": bool(ok and (reply.payload or b"") == data)})
    cell.stop()
    print(json.dumps(result))


def ask_twice(url: str, options: dict) -> None:
    """Ask, say so, wait for a line on stdin (the server has been replaced meanwhile), and ask until it answers."""
    cell = make_cell("site-1", url, options)
    cell.start()

    def answered(seconds: float) -> bool:
        deadline, data = time.monotonic() + seconds, pattern(300_000)
        while time.monotonic() < deadline:
            reply = cell.send_request("test", "echo", "server", new_cell_message({}, data), timeout=2)
            if reply.headers.get(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK:
                return bool(reply.payload == data)
            time.sleep(0.05)  # FLARE has no event for this
        return False

    for seconds in (CONNECT_DEADLINE, 60.0):
        print(json.dumps(answered(seconds)), flush=True)
        sys.stdin.readline()
    cell.stop()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    {"serve": serve, "ask": ask, "ask_twice": ask_twice}[sys.argv[1]](sys.argv[2], json.loads(sys.argv[3]))
