"""FLARE's `Connection` on a link."""

from __future__ import annotations

from typing import Any

from nvflare.fuel.f3.comm_config import CommConfigurator
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.connection import BytesAlike, Connection
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo

from nvflare_rdma.channel import Delivery, Link
from nvflare_rdma.errors import RdmaError, SendTimeoutError, TransferError
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)


class RdmaConnection(Connection):
    """A FLARE connection whose frames travel over `link`, which the driver sets as soon as it has one. `properties`
    are what FLARE logs and checks."""

    def __init__(self, connector: ConnectorInfo, properties: dict[str, Any]) -> None:
        super().__init__(connector)
        self._properties = properties
        self._send_timeout = CommConfigurator().get_streaming_send_timeout(30.0)
        self._closing = False
        self.link: Link | None = None

    def get_conn_properties(self) -> dict[str, Any]:
        """FLARE's hook: addresses and the peer's common name."""
        return self._properties

    def receive(self, message: Delivery) -> None:
        """Hand a frame to FLARE, which slices a memoryview without copying it."""
        self.process_frame(message)

    def send_frame(self, frame: BytesAlike) -> None:
        """FLARE's hook: send a frame. It blocks while the peer makes no room, and does not wait for its arrival.

        Raises:
            CommError: FLARE's; the link has ended, or there was no room in time.
        """
        assert self.link is not None
        try:
            self.link.send(frame, self._send_timeout, self._lost)
        except RdmaError as error:
            if self._closing:
                return  # as with FLARE's own drivers, what is sent while closing is dropped
            if isinstance(error, SendTimeoutError):
                # Also as FLARE's: a peer that takes nothing would block every heartbeat round for the timeout.
                code = CommError.TIMEOUT
                self.close(linger=0.0)
            else:
                code = CommError.CLOSED if isinstance(error, TransferError) else CommError.ERROR
            raise CommError(code, f"can't send a frame of {len(frame)} bytes on {self.name}: {error}") from error

    def _lost(self, reason: str) -> None:
        """A frame that FLARE takes for sent did not arrive. FLARE knows a connection whose frames arrive, or a broken
        one: what waits for this frame is told at once, and does not time out."""
        log.error("%s: a frame was refused, so this connection is closed: %s", self.name, reason)
        assert self.link is not None
        self.link.close(0.0)  # not `close`: what FLARE sends from now on fails, and is not dropped

    def close(self, linger: float | None = None) -> None:
        """FLARE's hook: end the link. `linger` is how many seconds it may wait for its peer; None for its default."""
        self._closing = True
        if self.link is None:
            return
        if linger is None:
            self.link.close()
        else:
            self.link.close(linger)
