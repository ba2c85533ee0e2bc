"""Drivers in this process, as FLARE's connector loop runs them."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager

from nvflare.fuel.f3.connection import ConnState, FrameReceiver
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo, Mode
from nvflare.fuel.f3.drivers.driver import ConnMonitor, Driver
from nvflare.fuel.f3.drivers.net_utils import parse_url

from nvflare_rdma.cli.port_use import listening_ports
from nvflare_rdma.driver import RdmaDriver
from nvflare_rdma.runtime import shared
from tests.support.waiting import eventually

DEADLINE = 20.0


class Monitor(ConnMonitor):
    """Records connections as FLARE's connection manager would, and their frames."""

    def __init__(self) -> None:
        self.frames: queue.Queue[bytes] = queue.Queue()
        self.states: list[ConnState] = []
        self.connections: list = []
        self._changed = threading.Condition()

    def state_change(self, connection) -> None:
        with self._changed:
            self.states.append(connection.state)
            if connection.state is ConnState.CONNECTED:
                connection.register_frame_receiver(Recording(self.frames))
                self.connections.append(connection)
            self._changed.notify_all()

    def wait_for(self, state: ConnState, count: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.states.count(state) >= count, DEADLINE), self.states


class Recording(FrameReceiver):
    def __init__(self, frames: queue.Queue[bytes]) -> None:
        self._frames = frames

    def process_frame(self, frame) -> None:
        self._frames.put(bytes(frame))


class Running:
    """A driver that connects or listens in a thread."""

    def __init__(self, url: str, mode: Mode, driver: type[Driver] = RdmaDriver, **params) -> None:
        self.driver, self.monitor = driver(), Monitor()
        self.driver.register_conn_monitor(self.monitor)
        self.connector = ConnectorInfo(
            "CH", self.driver, {**parse_url(url), **params}, mode, 0, 0, False, threading.Event()
        )
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        start = self.driver.connect if self.connector.mode is Mode.ACTIVE else self.driver.listen
        try:
            start(self.connector)
        except Exception as error:  # noqa: BLE001 - FLARE's loop catches all, too
            self.error = error

    def join(self) -> None:
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive(), "the driver does not return"


@contextmanager
def running(url: str, mode: Mode, driver: type[Driver] = RdmaDriver, **params):
    it = Running(url, mode, driver, **params)
    try:
        yield it
    finally:
        it.driver.shutdown()
        it.join()


def wait_for_port(port: int) -> None:
    """Until somebody listens there. Nobody dials to see: that would be a guest, who may still be there later."""
    eventually(lambda: port in listening_ports())


def comes_to_takers(port: int) -> bool:
    """Whether a connection to this port of a listening driver's gets to a taker of this process's shared ports."""
    magic, came = b"A-MAGIC!", threading.Event()

    def taker(sock: socket.socket, seconds: float, admitted: Callable[[], None]) -> None:
        admitted()
        came.set()
        sock.close()

    shared().ports.add_taker(magic, taker)
    try:
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as guest:
            guest.sendall(magic)
            assert guest.recv(1) == b""
    finally:
        shared().ports.remove_taker(magic)
    return came.is_set()
