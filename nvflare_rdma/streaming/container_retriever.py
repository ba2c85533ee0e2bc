"""FLARE's `ContainerRetriever` on `ContainerStreamer`."""

from __future__ import annotations

from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.streamers import container_retriever as flare

from nvflare_rdma.streaming.container_streamer import ContainerStreamer


class ContainerRetriever(flare.ContainerRetriever):
    """Gets a container from another site, which has `add_container`-ed it; as FLARE's."""

    __module__ = "nvflare_rdma.streaming"  # the public name, which FLARE writes into exported jobs

    def register_stream_processing(
        self, channel: str, topic: str, fl_ctx: FLContext, stream_done_cb: Any, **cb_kwargs: Any
    ) -> None:
        """See FLARE's."""
        ContainerStreamer.register_stream_processing(fl_ctx, channel, topic, stream_done_cb, **cb_kwargs)

    def do_stream(
        self, target: str, request: Shareable, fl_ctx: FLContext, stream_ctx: Any, validated_data: Any
    ) -> Any:
        """See FLARE's."""
        return ContainerStreamer.stream_container(
            channel=self.stream_channel,
            topic=self.topic,
            stream_ctx=stream_ctx,
            targets=[target],
            container=validated_data,
            fl_ctx=fl_ctx,
            entry_timeout=self.entry_timeout,
            optional=self.stream_msg_optional,
            secure=self.stream_msg_secure,
        )
