"""What FLARE's streamers need of an engine, on a cell: FLARE's own aux messages and object streams, as its runners have
them, without a job around."""

from __future__ import annotations

from typing import Any

from nvflare.apis.fl_constant import FLContextKey, ProcessType, ReservedKey, SiteType
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.signal import Signal
from nvflare.apis.streaming import StreamableEngine
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.apis.utils.fl_context_utils import gen_new_peer_ctx
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.private.aux_runner import AuxMsgTarget, AuxRunner
from nvflare.private.stream_runner import ObjectStreamer


class StreamEngine(StreamableEngine):
    """For the cell of one site, or of the server. Its name is the cell's."""

    def __init__(self, name: str, url: str, credentials: dict[str, str] | None = None) -> None:
        self.cell = Cell(name, url, secure=bool(credentials), credentials=credentials or {})
        self.abort = Signal()
        flare_decomposers.register()
        kind = ProcessType.SERVER_PARENT if name == SiteType.SERVER else ProcessType.CLIENT_PARENT
        stickers = {FLContextKey.PROCESS_TYPE: kind, ReservedKey.RUN_ABORT_SIGNAL: self.abort}
        self._contexts = FLContextManager(self, name, "job", {}, stickers)
        self.aux = AuxRunner(self)
        self.streamer = ObjectStreamer(self.aux)
        self.cell.register_request_cb(channel=CellChannel.AUX_COMMUNICATION, topic="*", cb=self._received)
        self.cell.start()

    def new_context(self) -> FLContext:
        return self._contexts.new_context()

    def get_cell(self) -> Cell:
        return self.cell

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Nobody listens."""

    def _received(self, message: Any) -> Any:
        with self.new_context() as fl_ctx:
            topic = message.get_header(MessageHeaderKey.TOPIC)
            reply = self.aux.dispatch(topic=topic, request=message.payload, fl_ctx=fl_ctx)
            reply.set_peer_context(gen_new_peer_ctx(fl_ctx))
            return make_reply(ReturnCode.OK, "", reply)

    def register_aux_message_handler(self, topic: str, message_handle_func: Any) -> None:
        self.aux.register_aux_message_handler(topic, message_handle_func)

    def send_aux_request(
        self, targets: list[str], topic: str, request: Any, timeout: float, fl_ctx: FLContext, **flags: bool
    ) -> dict[str, Any]:
        found = [AuxMsgTarget(name, name) for name in targets]
        return dict(self.aux.send_aux_request(found, topic, request, timeout, fl_ctx, **flags))

    def stream_objects(
        self,
        channel: str,
        topic: str,
        stream_ctx: Any,
        targets: list[str],
        producer: Any,
        fl_ctx: FLContext,
        optional: bool = False,
        secure: bool = False,
    ) -> Any:
        found = [AuxMsgTarget(name, name) for name in targets]
        return self.streamer.stream(channel, topic, stream_ctx, found, producer, fl_ctx, secure, optional)

    def register_stream_processing(
        self,
        channel: str,
        topic: str,
        factory: Any,
        stream_done_cb: Any = None,
        consumed_cb: Any = None,
        **cb_kwargs: Any,
    ) -> None:
        self.streamer.register_stream_processing(channel, topic, factory, stream_done_cb, consumed_cb, **cb_kwargs)

    def shutdown_streamer(self) -> None:
        self.streamer.shutdown()

    def stop(self) -> None:
        self.shutdown_streamer()
        self.cell.stop()
