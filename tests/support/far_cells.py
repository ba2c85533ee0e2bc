"""A server's cell and a site's, each in a network of its own: what scripts with such cells have in common.

A script calls `run` with what each of the two does. It is started in a network namespace in which it may do all
(`namespaces.run_apart`); the server starts the script again, for the site, in another one.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message
from nvflare.fuel.utils import fobs

from nvflare_rdma.streaming.component import install
from tests.support.namespaces import in_another_network, ip
from tests.support.two_cells import Lines
from tests.support.waiting import eventually

MODEL = {"w": torch.arange(500_000).float()}


def reply(payload: dict | None) -> Any:
    return make_reply(ReturnCode.OK, "", payload)


def log_lines() -> Lines:
    lines = Lines()
    logging.getLogger("nvflare_rdma").addHandler(lines)
    return lines


def serve(
    script: str,
    arguments: Sequence[str],
    url: str,
    network: Callable[[int], Sequence[str]],
    topics: Callable[[Cell], Mapping[str, Callable]],
) -> int:
    """The server, until the site has ended. `network` gives the commands of ip(8) for the network, given the site's
    process; `topics` the answers of a cell."""
    with in_another_network(script, *arguments, "site") as site:
        assert site.stdin is not None
        ip(*network(site.pid))
        cell = Cell("server", url, secure=False, credentials={})
        for topic, answer in topics(cell).items():
            cell.register_request_cb(channel="test", topic=topic, cb=answer)
        cell.start()
        install()
        print("go", file=site.stdin, flush=True)
        return site.wait()


class FarSite:
    """The site's cell, connected to the server's. Its tensors move directly when `install` was called."""

    def __init__(self, url: str, *network: str) -> None:
        print("ready", flush=True)
        assert sys.stdin.readline() == "go\n"
        ip(*network)
        self.lines = log_lines()
        self.cell = Cell("site-1", url, secure=False, credentials={})
        self.cell.start()
        eventually(lambda: self.cell.core_cell.is_cell_connected("server"))

    def request(self, topic: str, payload: dict | None = None, timeout: float = 60.0) -> Any:
        """The reply of the server."""
        message = new_cell_message({}, payload or {})
        return self.cell.send_request(channel="test", topic=topic, target="server", request=message, timeout=timeout)


def run(server: Callable[..., int], site: Callable[..., int], *defaults: str) -> None:
    """Run this script: `SCRIPT FOLDER [ARGUMENTS]`, with `site` behind them for the site. ``defaults``: of those."""
    status = 1
    try:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        fobs.register(TensorDecomposer)
        folder, *arguments = sys.argv[1:]
        what = server
        if arguments[-1:] == ["site"]:
            what = site
            arguments.pop()
        status = what(Path(folder), *(arguments or defaults))
    except BaseException:  # noqa: BLE001 - it is shown
        traceback.print_exc()
    os._exit(status)  # FLARE's threads would hold the process
