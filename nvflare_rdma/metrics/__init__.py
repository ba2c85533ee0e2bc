"""What a job moved and how long that took.

Whole processes, by round: `wire` counts bytes, `recorder` writes lines, `summary` reads them. Single transfers:
`transfers` has their records, `reporting` shows them (with `pools`).
"""

from __future__ import annotations

from typing import Any


def add_traffic_recorder(recipe: Any) -> None:
    """Record bytes and seconds of every round of a FLARE `recipe`, on the server and on every site."""
    from nvflare_rdma.flare_compat import job_of, use_installed_package
    from nvflare_rdma.metrics.recorder import TrafficRecorder

    job = job_of(recipe, "add_traffic_recorder")
    use_installed_package(job)
    job.to_server(TrafficRecorder(), id="traffic_recorder")
    job.to_clients(TrafficRecorder(), id="traffic_recorder")
