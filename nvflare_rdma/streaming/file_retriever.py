"""FLARE's `FileRetriever` on `FileStreamer`."""

from __future__ import annotations

from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReturnCode, Shareable
from nvflare.app_common.streamers import file_retriever as flare

from nvflare_rdma.streaming.file_layout import plan
from nvflare_rdma.streaming.file_parts import OpenFile, codec_for_files
from nvflare_rdma.streaming.file_streamer import FileStreamer


class FileRetriever(flare.FileRetriever):
    """Gets a file from another site's ``source_dir`` into this one's ``dest_dir``; as FLARE's.

    Args:
        quantization_type: how this site sends files: see `FileStreamer.stream_file`.

    Raises:
        ConfigError: a type that files can't be sent as.
    """

    __module__ = "nvflare_rdma.streaming"  # the public name, which FLARE writes into exported jobs

    def __init__(
        self,
        source_dir: str,
        topic: str | None = None,
        stream_msg_optional: bool = False,
        stream_msg_secure: bool = False,
        dest_dir: str | None = None,
        chunk_size: int | None = None,
        chunk_timeout: float | None = None,
        quantization_type: str | None = None,
    ) -> None:
        if quantization_type:
            codec_for_files(quantization_type)
        super().__init__(source_dir, topic, stream_msg_optional, stream_msg_secure, dest_dir, chunk_size, chunk_timeout)
        self.quantization_type = quantization_type

    def register_stream_processing(
        self, channel: str, topic: str, fl_ctx: FLContext, stream_done_cb: Any, **cb_kwargs: Any
    ) -> None:
        """See FLARE's."""
        FileStreamer.register_stream_processing(fl_ctx, channel, topic, self.dest_dir, stream_done_cb, **cb_kwargs)

    def validate_request(self, request: Shareable, fl_ctx: FLContext) -> tuple[str, Any]:
        """See FLARE's. A file that can't be encoded is refused here, or who asks would wait for it."""
        code, path = super().validate_request(request, fl_ctx)
        if code == ReturnCode.OK and self.quantization_type:
            file = OpenFile(path, self.quantization_type)
            plan(file.identity, file.tensors)
        return code, path

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
            quantization_type=self.quantization_type,
        )
