"""Huge pages for the blobs that FLARE puts together from frames.

FLARE 2.9 assembles a blob in a `bytearray` (`nvflare.fuel.f3.streaming.blob_streamer.BlobTask`), whose pages of
4 KiB are touched for the first time while frames are copied in: that alone takes longer than moving the bytes over
shared memory. No extension point of FLARE's offers a blob's memory, so this replaces its `BlobTask`.
"""

from __future__ import annotations

from typing import Any

from nvflare.fuel.f3.streaming import blob_streamer

from nvflare_rdma.fabric import HUGE_PAGE_BYTES
from nvflare_rdma.flare_compat import replace_blob_task
from nvflare_rdma.runtime import shared


class HugePageBlobTask(blob_streamer.BlobTask):
    """A `BlobTask` whose buffer, if it is large, is made of huge pages and is used again when nobody has it."""

    def __init__(self, future: Any, stream: Any, max_size: int = 0, preserve_chunks: bool = False) -> None:
        if preserve_chunks or stream.get_size() < HUGE_PAGE_BYTES:
            super().__init__(future, stream, max_size, preserve_chunks)
            return
        # With `preserve_chunks` FLARE's checks are made, and no buffer.
        super().__init__(future, stream, max_size, preserve_chunks=True)
        self.preserve_chunks = False
        self.pre_allocated = True
        self.buffer = shared().blob_memory.take_for_announced(self.size)
        future.add_done_callback(self._done)

    def _done(self) -> None:
        if self.future.error is None:
            shared().blob_memory.filled(self.buffer)


def use_huge_pages() -> None:
    """Have FLARE put together large blobs in huge pages, from now on, in this process."""
    replace_blob_task(HugePageBlobTask)
