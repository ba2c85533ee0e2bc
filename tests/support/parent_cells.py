"""FLARE cells of a server's parent, of job processes and of sites, in one process: parent_cells.py FOLDER SCHEME.
What came of it is in FOLDER/results.json. With the scheme `rdma` the parent has no port but FLARE's own."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.cell import Cell

from nvflare_rdma.driver import RdmaDriver
from nvflare_rdma.streaming import ParentDoor
from nvflare_rdma.streaming.component import open_links
from tests.support.processes import free_port
from tests.support.waiting import eventually


def event(cell: Cell, **props: object) -> FLContext:
    """What FLARE hands to a component of a parent's."""
    context = FLContext()
    context.set_prop(ReservedKey.ENGINE, SimpleNamespace(get_cell=lambda: cell), private=True, sticky=False)
    for name, value in props.items():
        context.set_prop(name, value, private=True, sticky=False)
    return context


def main(folder: Path, scheme: str) -> None:
    port, door = free_port(), free_port()
    if scheme != "rdma":
        os.environ["NVFLARE_RDMA_DATA_PORTS"] = str(door)  # everybody's, as with one comm_config.json
    url = f"{scheme}://127.0.0.1:{port}"
    parent = Cell("server", url, secure=False, credentials={}, create_internal_listener=True)
    component = ParentDoor()
    may_listen = listening_late()
    parent.start()
    if scheme == "rdma":
        component.handle_event(EventType.SYSTEM_START, event(parent))
    may_listen.set()
    inner = parent.get_internal_listener_url()
    made = {name: Cell(name, url, secure=False, credentials={}, parent_url=inner) for name in ("server.a", "server.b")}
    made |= {name: Cell(name, url, secure=False, credentials={}) for name in ("site-1", "site-2")}
    for cell in made.values():
        cell.start()
    eventually(lambda: all(cell.core_cell.is_cell_connected("server") for cell in made.values()))

    before = None
    if scheme != "rdma":
        before = without_door(made["server.a"])
        component.handle_event(EventType.SYSTEM_START, event(parent))
    links = {name: open_links(cell) for name, cell in made.items()}

    def join(host: str, guest: str) -> str:
        invitation = {**links[host].invite(guest), "port": 0}
        return links[guest].dial(host, invitation).way

    ways = [join("server.a", "site-1"), join("server.b", "site-1"), join("site-1", "site-2")]
    routes = component._junction._routes
    cells = sorted(route.cell for route in routes.values())
    component.handle_event(EventType.JOB_COMPLETED, event(parent, **{FLContextKey.EVENT_DATA: {"job_id": "a"}}))
    component.handle_event(EventType.JOB_COMPLETED, event(parent, **{FLContextKey.CURRENT_JOB_ID: "b"}))
    left = [route.cell for route in routes.values()]
    component.handle_event(EventType.SYSTEM_END, event(parent))
    for each in links.values():
        each.close()
    results = {"door": door, "port": port, "before": before, "ways": ways, "routes": cells, "left": left}
    (folder / "results.json").write_text(json.dumps(results))


def listening_late() -> threading.Event:
    """The `rdma` driver's listeners open their ports when this is set: FLARE starts them in a thread, which may be
    later than the start of the system."""
    listen, may_listen = RdmaDriver.listen, threading.Event()

    def late(driver: RdmaDriver, connector: object) -> None:
        assert may_listen.wait(20)
        listen(driver, connector)

    RdmaDriver.listen = late  # type: ignore[method-assign]
    return may_listen


def without_door(cell: Cell) -> dict[str, object]:
    """How a job process invites where no parent joins connections."""
    links = open_links(cell)
    invitation, door = links.invite("site-1"), links._door
    links.close()
    assert door is not None
    eventually(lambda: door.is_over)
    return {"port": invitation["port"], "through": "through" in invitation}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    code = 1
    try:
        main(Path(sys.argv[1]), sys.argv[2])
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)  # FLARE's threads would keep it for a while
