"""Transfers in FLARE's stats pools, which its admin commands show.

The pools belong to the process and stay until it ends.
"""

from __future__ import annotations

import threading

from nvflare.fuel.f3.stats_pool import CounterPool, HistPool, StatsPoolManager

from nvflare_rdma.transfer import TransferRecord

TIME, GOODPUT, COUNTERS = "Rdma_Transfer_Time", "Rdma_Goodput", "Rdma_Transfer_Counters"
_SECONDS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_MEGABYTES = (1, 10, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_NAMES = ["transfers", "failed", "raw_bytes", "wire_bytes", "resent_chunks"]
_lock = threading.Lock()


def add_to_pools(record: TransferRecord) -> None:
    """Add a transfer to the pools. Its category there is, for example, "sent direct tcp", or "received flare"."""
    time, goodput, counters = _pools()
    category = " ".join(part for part in (record.direction, record.path, record.fabric) if part)
    amounts = (1, int(record.failed), record.raw_bytes, record.wire_bytes, record.resent_chunks)
    for name, amount in zip(_NAMES, amounts, strict=True):
        counters.increment(category, name, amount)
    if not record.failed:
        time.record_value(category, record.seconds)
        goodput.record_value(category, record.goodput / 1e6)


def _pools() -> tuple[HistPool, HistPool, CounterPool]:
    manager = StatsPoolManager
    with _lock:
        if manager.get_pool(TIME) is None:
            manager.add_time_hist_pool(TIME, "Time (secs) of tensor transfers", _SECONDS)
            manager.add_msg_size_pool(GOODPUT, "Goodput (MB/s) of tensor transfers", _MEGABYTES).unit = "MB/s"
            manager.add_counter_pool(COUNTERS, "Counters of tensor transfers", list(_NAMES))
        return manager.get_pool(TIME), manager.get_pool(GOODPUT), manager.get_pool(COUNTERS)
