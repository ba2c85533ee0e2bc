"""Runs a simulated job whose server and sites stream files to each other: streams_job.py WORKSPACE FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from nvflare.job_config.api import FedJob

from nvflare_rdma.recipe import add_transfer

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    from streams_parts import SITES, Server, Site

    workspace, folder = sys.argv[1:]
    job = FedJob(name="streams", min_clients=len(SITES))
    job.to_server(Server(folder))
    for site in SITES:
        job.to(Site(folder), site)
    add_transfer(job)
    job.simulator_run(workspace, threads=len(SITES))


if __name__ == "__main__":
    main()
