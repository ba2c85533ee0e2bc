"""FLARE's `FileRetriever` on `FileStreamer`."""

from __future__ import annotations

from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.streamers import file_retriever as flare

from nvflare_rdma.streaming.file_streamer import FileStreamer


class FileRetriever(flare.FileRetriever):
    """Gets a file from another site's ``source_dir`` into this one's ``dest_dir``; as FLARE's."""

    def register_stream_processing(
        self, channel: str, topic: str, fl_ctx: FLContext, stream_done_cb: Any, **cb_kwargs: Any
    ) -> None:
        """See FLARE's."""
        FileStreamer.register_stream_processing(fl_ctx, channel, topic, self.dest_dir, stream_done_cb, **cb_kwargs)

    def do_stream(
        self, target: str, request: Shareable, fl_ctx: FLContext, stream_ctx: Any, validated_data: Any
    ) -> Any:
        """See FLARE's."""
        return FileStreamer.stream_file(
            channel=self.stream_channel,
            topic=self.topic,
            stream_ctx=stream_ctx,
            targets=[target],
            file_name=validated_data,
            fl_ctx=fl_ctx,
            chunk_size=self.chunk_size,
            chunk_timeout=self.chunk_timeout,
            optional=self.stream_msg_optional,
            secure=self.stream_msg_secure,
        )
