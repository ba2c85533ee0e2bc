"""Where exported jobs of the first release have `FileRetriever`: it is in `nvflare_rdma.streaming` now."""

from __future__ import annotations

from nvflare_rdma.streaming.streams.files import FileRetriever

__all__ = ["FileRetriever"]
