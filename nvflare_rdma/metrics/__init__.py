"""What a job moved and how long that took.

Two things are measured. By round, for whole processes: `tcp_counters` counts bytes, `recorder` writes lines, and
`summary` reads them. By transfer: `reporting` shows the records of `nvflare_rdma.transfer.records` where FLARE's users
look (with `pools`). What imports FLARE is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {"TransferReporter": "reporting"}
__all__ = ["TransferReporter", "add_traffic_recorder"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def add_traffic_recorder(recipe: Any) -> None:
    """Record bytes and seconds of every round of a FLARE `recipe`, on the server and on every site."""
    from nvflare_rdma.flare_compat import job_of, use_installed_package
    from nvflare_rdma.metrics.recorder import TrafficRecorder

    job = job_of(recipe, "add_traffic_recorder")
    use_installed_package(job)
    job.to_server(TrafficRecorder(), id="traffic_recorder")
    job.to_clients(TrafficRecorder(), id="traffic_recorder")
