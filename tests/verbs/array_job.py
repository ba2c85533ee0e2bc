"""One round of FedAvg with one site, over rdma: a server and a client, each a process. No torch: it takes long to load
on an emulated CPU.

    python array_job.py FOLDER SIZE SECONDS     in FOLDER: initial.npy, received.npy, sent.npy, and the workspace ws
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).parent
WORKER = "-m nvflare.private.fed.app.simulator.simulator_worker "


def as_array_worker(command: str, posix: bool) -> list[str]:
    """The command of a site's process, which starts ours."""
    assert WORKER in command
    return shlex.split(command.replace(WORKER, f"{shlex.quote(str(HERE / 'array_worker.py'))} "), posix=posix)


def main() -> int:
    from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
    from nvflare.private.fed.app.simulator import simulator_runner

    from nvflare_rdma import simulator

    folder, size, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    np.save(folder / "initial.npy", np.random.default_rng(3).standard_normal(size // 4, np.float32))
    recipe = NumpyFedAvgRecipe(
        name="array",
        initial_ckpt=str(folder / "initial.npy"),
        min_clients=1,
        num_rounds=1,
        train_script=str(HERE / "array_client.py"),
        train_args=str(folder),
    )
    recipe.export(str(folder))
    # A site's process has so long to load FLARE; the simulator gives it a minute, and has no option for more.
    simulator_runner.parse_vars = lambda items: {"simulator_worker_timeout": seconds}
    # Then it has ten seconds to reach the server, and there is no option for that either.
    simulator_runner.shlex = SimpleNamespace(split=as_array_worker)
    return simulator.main([str(folder / "array"), "-w", str(folder / "ws"), "-n", "1", "-t", "1", "--scheme", "rdma"])


if __name__ == "__main__":
    sys.exit(main())
