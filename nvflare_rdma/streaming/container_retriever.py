"""Where exported jobs of the first release have `ContainerRetriever`: it is in `nvflare_rdma.streaming` now."""

from __future__ import annotations

from nvflare_rdma.streaming.streams.containers import ContainerRetriever

__all__ = ["ContainerRetriever"]
