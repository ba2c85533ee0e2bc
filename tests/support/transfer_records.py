"""A transfer's record, for tests of what is done with it."""

from __future__ import annotations

from typing import Any

from nvflare_rdma.transfer.records import TransferRecord


def record(**fields: Any) -> TransferRecord:
    made: dict[str, Any] = {
        "time": 100.0,
        "direction": "sent",
        "cell": "server",
        "peer": "site-1",
        "kind": "tensors",
        "items": 2,
        "raw_bytes": 1000,
        "wire_bytes": 250,
        "seconds": 0.5,
        "resent_chunks": 3,
        "fabric": "shm",
        "budget_peak_bytes": 7,
        "path": "direct",
        "reason": "",
        "outcome": "done",
    }
    return TransferRecord(**made | fields)
