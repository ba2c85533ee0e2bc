"""Queue pairs and their completions through pyverbs.

Sources: ibv_create_qp(3), ibv_modify_qp(3), ibv_post_send(3), ibv_get_cq_event(3), and IB specification vol. 1, ch. 10
and 11. Nothing here waits, see `ports`.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nvflare_rdma.fabric.options import VerbsOptions
from nvflare_rdma.fabric.verbs.devices import INFINIBAND, IWARP, Gid, PortInfo
from nvflare_rdma.fabric.verbs.ports import Closable, Port, close_all, nothing_came, translated, with_descriptor
from nvflare_rdma.fabric.verbs.pyverbs import (
    CQ,
    GID,
    QP,
    SGE,
    AHAttr,
    CompChannel,
    GlobalRoute,
    PyverbsError,
    QPAttr,
    QPCap,
    QPInitAttr,
    RecvWR,
    SendWR,
    e,
)
from nvflare_rdma.fabric.verbs.registration_cache import Segment

_HINTS = {
    "RETRY_EXC_ERR": "the peer did not answer in time: is it there, does the network pass RoCE (UDP port 4791), is "
    "rdma_ack_timeout longer than the round trip?",
    "RNR_RETRY_EXC_ERR": "the peer has no receive posted: it hangs, or does not speak this protocol",
    "REM_ACCESS_ERR": "the peer's device refused the write: its memory is not, or no longer, granted",
    "REM_INV_REQ_ERR": "the peer's device does not understand the request",
    "REM_OP_ERR": "the peer's device failed",
    "LOC_PROT_ERR": "the memory to send is not registered",
    "LOC_LEN_ERR": "a message is longer than the receive or the device allows",
    "LOC_QP_OP_ERR": "the device gave the request up (on iWARP also when the peer closed the connection, or refused a "
    "write)",
    "WR_FLUSH_ERR": "the queue pair is in the error state, after an error of either side (on iWARP also when the peer "
    "closed the connection, or refused a write)",
    "FATAL_ERR": "the device or its driver failed: see dmesg",
}
_STATUS = {
    value: name.removeprefix("IBV_WC_")
    for name, value in vars(e).items()
    if name.startswith("IBV_WC_") and name.endswith(("_ERR", "_SUCCESS"))
}
_RECEIVE = 1 << 63


@dataclass(frozen=True, slots=True)
class Work:
    """A send work request. `remote` is the address and key of the peer's memory, None for a message (SEND). `immediate`
    is the 32 bits that go with an RDMA WRITE WITH IMM."""

    segments: Sequence[Segment]
    remote: tuple[int, int] | None
    immediate: int | None = None
    inline: bool = False

    @property
    def opcode(self) -> int:
        """The operation (enum ibv_wr_opcode)."""
        if self.remote is None:
            return int(e.IBV_WR_SEND)
        return int(e.IBV_WR_RDMA_WRITE if self.immediate is None else e.IBV_WR_RDMA_WRITE_WITH_IMM)


@dataclass(frozen=True, slots=True)
class Completion:
    """`number` is what the work or the receive was posted with, 0 for requests that others follow in a chain (where
    those are completed one by one). `immediate` is None unless the peer's write carried one; `error` is "" or what
    went wrong, with a hint."""

    received: bool
    number: int
    error: str
    length: int = 0
    immediate: int | None = None


class QueuePair:
    """A reliable connection (RC) and its completion queue, whose descriptor is `fd`."""

    def __init__(self, port: Port, sends: int, receives: int, inline: int) -> None:
        """So many `sends` and `receives` may be posted at once; `inline` bytes are wanted inline."""
        self._port = port
        self._open: list[Any] = []
        self._kept: list[Closable] = []
        self._unacknowledged = 0
        device = port.info.device
        capacity = QPCap(
            max_send_wr=sends,
            max_recv_wr=receives,
            max_send_sge=min(port.max_segments, 8),
            max_recv_sge=1,
            max_inline_data=inline,
        )
        try:
            with translated(device, f"creating a completion queue for {sends + receives} completions"):
                self._channel, self.fd = with_descriptor(lambda: CompChannel(port.context), "fd")
                self._open.append(self._channel)
                self._cq = CQ(port.context, sends + receives, None, self._channel, 0)
                self._open.append(self._cq)
                self._cq.req_notify()
            with translated(device, f"creating a queue pair for {sends} sends and {receives} receives"):
                attributes = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=capacity, sq_sig_all=0)
                self._qp = QP(port.pd, attributes)
                self._open.append(self._qp)
        except BaseException:  # see `Port`
            self.close()
            raise
        self.number: int = self._qp.qp_num
        self.first_packet = secrets.randbits(24)
        self.max_segments: int = attributes.max_send_sge
        self.inline_bytes: int = attributes.max_inline_data

    def prepare(self) -> None:
        """To the state INIT: receives can be posted."""
        attributes = QPAttr(port_num=self._port.info.number)
        attributes.qp_access_flags = e.IBV_ACCESS_REMOTE_WRITE
        with translated(self._port.info.device, "preparing a queue pair"):
            self._qp.to_init(attributes)

    def connect(self, gid: Gid, lid: int, mtu: int, number: int, first_packet: int, options: VerbsOptions) -> None:
        """To the states RTR and RTS, with the queue pair `number` of the port at `gid` and `lid`. Both ways are
        open as soon as the peer has done the same."""
        port = self._port
        attributes = QPAttr(port_num=port.info.number)
        attributes.qp_access_flags = e.IBV_ACCESS_REMOTE_WRITE
        attributes.path_mtu = min(port.mtu, mtu)
        attributes.dest_qp_num = number
        attributes.rq_psn = first_packet
        attributes.max_dest_rd_atomic = attributes.max_rd_atomic = 1
        attributes.min_rnr_timer = 12  # 0.64 ms
        same_subnet = int(port.gid.value) >> 64 == int(gid.value) >> 64
        if port.info.transport == INFINIBAND and same_subnet:
            attributes.ah_attr = AHAttr(dlid=lid, port_num=port.info.number, is_global=0)
        else:
            route = GlobalRoute(dgid=GID(gid.value.exploded), sgid_index=port.gid.index, hop_limit=64)
            attributes.ah_attr = AHAttr(gr=route, dlid=lid, port_num=port.info.number, is_global=1)
        attributes.sq_psn = self.first_packet
        attributes.timeout, attributes.retry_cnt = options.ack_timeout, options.retries
        attributes.rnr_retry = 7  # without end: a receive is posted before anything is granted
        with translated(port.info.device, f"connecting a queue pair to {gid.address}"):
            self._qp.to_rtr(attributes)
            self._qp.to_rts(attributes)

    def post_receive(self, number: int, segment: Segment) -> None:
        """Have a message of the peer, or the notice of its write, completed as `number`."""
        sge = SGE(segment.address, segment.length, segment.lkey)
        request = RecvWR(wr_id=_RECEIVE | number, num_sge=1, sg=[sge])
        try:
            with translated(self._port.info.device, "posting a receive"):
                self._qp.post_recv(request)
        finally:
            request.close()  # its finaliser leaks

    def post(self, works: Sequence[Work], number: int) -> None:
        """Post work requests as one chain; the last is completed as `number` (not 0), and with it those before."""
        # siw sends what is not signaled without a copy, so that TCP may read it after all of the chain is completed
        # (siw_qp_tx.c, SENDPAGE_THRESH).
        each = e.IBV_SEND_SIGNALED if self._port.info.transport == IWARP else 0
        requests: list[Any] = []
        try:
            for work in reversed(works):
                flags = each if requests else e.IBV_SEND_SIGNALED
                if work.inline:
                    flags |= e.IBV_SEND_INLINE
                request = SendWR(
                    wr_id=0 if requests else number,
                    opcode=work.opcode,
                    num_sge=len(work.segments),
                    sg=[SGE(s.address, s.length, s.lkey) for s in work.segments],
                    imm_data=work.immediate or 0,
                    send_flags=flags,
                )
                if work.remote is not None:
                    request.set_wr_rdma(work.remote[1], work.remote[0])
                if requests:
                    request.next_wr = requests[-1]
                requests.append(request)
            with translated(self._port.info.device, "posting a write"):
                self._qp.post_send(requests[-1])
        finally:
            for request in requests:
                request.close()

    def completions(self) -> list[Completion]:
        """Those that are there; call it when `fd` is readable, until there are none."""
        with translated(self._port.info.device, "polling for completions"):
            count, found = self._cq.poll(32)
        return [_completion(wc) for wc in found[:count]] if count > 0 else []

    def rearm(self) -> None:
        """Take the event that made `fd` readable, and ask for the next. `completions` is to follow."""
        with translated(self._port.info.device, "asking for completion events"):
            try:
                self._channel.get_cq_event(self._cq)
                self._unacknowledged += 1
            except PyverbsError as error:
                if not nothing_came(error):
                    raise
            if self._unacknowledged >= 64:
                self._cq.ack_events(self._unacknowledged)
                self._unacknowledged = 0
            self._cq.req_notify()

    def keep(self, opened: Closable) -> None:
        """Close `opened` with the queue pair, after it and what is kept later."""
        self._kept.append(opened)

    def fail(self) -> None:
        """To the error state: what is posted is flushed, and nothing of the peer is taken any more."""
        with contextlib.suppress(PyverbsError):
            self._qp.modify(QPAttr(qp_state=e.IBV_QPS_ERR), e.IBV_QP_STATE)

    def close(self) -> None:
        """The device touches nothing for it any more when this returns."""
        if self._unacknowledged:
            with contextlib.suppress(PyverbsError):
                self._cq.ack_events(self._unacknowledged)
            self._unacknowledged = 0
        close_all(self._open)
        close_all(self._kept)


def _completion(wc: Any) -> Completion:
    received, number = bool(wc.wr_id & _RECEIVE), int(wc.wr_id & ~_RECEIVE)
    if wc.status != e.IBV_WC_SUCCESS:
        name = _STATUS.get(wc.status, f"status {wc.status}")
        hint = _HINTS.get(name, "")
        error = f"{name} (vendor {wc.vendor_err:#x}){f': {hint}' if hint else ''}"
        return Completion(received, number, error)
    with_immediate = received and wc.opcode == e.IBV_WC_RECV_RDMA_WITH_IMM
    return Completion(received, number, "", wc.byte_len, wc.imm_data if with_immediate else None)


def writes_carry_immediates(port: PortInfo) -> bool:
    """iWARP has no RDMA WRITE WITH IMM (RFC 5040): there a message follows the write."""
    return port.transport != IWARP


def messages_wait(port: PortInfo) -> bool:
    """Where a message finds no receive, an InfiniBand or RoCE device has it sent again (RNR NAK); an iWARP device ends
    the connection (RFC 5041, 7.1)."""
    return port.transport != IWARP
