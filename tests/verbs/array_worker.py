"""A site's process of FLARE's simulator, with more time to reach the server than FLARE's ten seconds."""

from __future__ import annotations

import os
import time

from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.private.fed.app.simulator import simulator_worker

if __name__ == "__main__":
    simulator_worker.CELL_CONNECT_CHECK_TIMEOUT *= int(os.environ.get("RDMA_TEST_PATIENCE", "1"))
    args = simulator_worker.parse_arguments()
    MainProcessMonitor.run(main_func=simulator_worker.main, run_dir=args.workspace, args=args)
    time.sleep(2)  # as FLARE's own
