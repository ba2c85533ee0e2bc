"""Transfers while their process forks, and the child exits: forked_transfer.py FOLDER. Prints what became of them."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
import types
from pathlib import Path

import numpy as np

from nvflare_rdma.runtime import shared
from nvflare_rdma.transfer.manifest import Item
from nvflare_rdma.transfer.places import OnDisk
from tests.support.data_channels import Cells
from tests.support.direct_transfers import Direct, large
from tests.support.tcp_pair import DEADLINE
from tests.support.waiting import eventually

FABRICS = {"tcp": ("tcp",), "shm": ("shm", "tcp")}


class Running:
    """A transfer that waits in its middle until the fork is over."""

    def __init__(self, cells: Cells, fabric: str) -> None:
        self.sent = large(20)
        self.site = cells(f"site-{fabric}", ports=None, fabrics=FABRICS[fabric])
        self.it = Direct(cells, self.sent, fabrics=FABRICS[fabric])
        self.begun, self.forked = threading.Event(), threading.Event()
        self.got: dict = {}
        self.thread = threading.Thread(target=self._pull, daemon=True)
        self.thread.start()
        assert self.begun.wait(DEADLINE)

    def _pull(self) -> None:
        def wait() -> None:
            self.begun.set()
            assert self.forked.wait(DEADLINE)

        self.got = self.it.pull(self.site, progress=self.it.once_some_are_here(wait))

    def finish(self) -> dict:
        link = self.site.find("server")
        self.forked.set()
        self.thread.join(DEADLINE)
        return {
            "same": all(np.array_equal(self.got.get(name), array) for name, array in self.sent.items()),
            "link": link is not None and link is self.site.find("server"),
            "requests": self.it.asked,
            "door": self.site.dial("server", self.it.channels.invite(self.site.name)).usable,
        }


def main(folder: Path) -> None:
    logging.basicConfig(level=logging.INFO)
    cells = Cells()
    # As a trainer has it: all links of the process end when it exits.
    shared().links.start(lambda cell: cells(cell.get_fqcn()))
    atexit.register(shared().links.stop)
    own = shared().links.of(types.SimpleNamespace(get_fqcn=lambda: "trainer"))
    own.invite("site-1")
    place = OnDisk(Item("w", True, "float32", (1000,)), str(folder / "w.safetensors"))
    running = {name: Running(cells, name) for name in FABRICS}
    child = os.fork()
    if not child:
        assert shared().links.of(types.SimpleNamespace(get_fqcn=lambda: "trainer")) is None  # it has none, yet
        for channels in cells.made:
            channels.close()
            for links in channels._links.values():
                for link in links:
                    link.close()
        sys.exit(0)  # all that Python does at exit
    status: list[int] = []
    eventually(lambda: status.extend(os.waitpid(child, os.WNOHANG)) or any(status[-2:]), DEADLINE)
    results = {name: each.finish() for name, each in running.items()}
    visitor = cells("site-1", ports=None)
    results["own door"] = visitor.dial("trainer", own.invite("site-1")).usable
    results["child"] = status[-1]
    results["file"] = os.path.exists(place.path)
    print(json.dumps(results), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
