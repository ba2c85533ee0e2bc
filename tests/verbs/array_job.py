"""One round of FedAvg with one site, over rdma: a server and a client, each a process. No torch: it takes long to load
on an emulated CPU.

    python array_job.py FOLDER SIZE     in FOLDER: initial.npy, received.npy, sent.npy, and the workspace
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def main() -> None:
    from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

    from nvflare_rdma.simulator import RdmaSimEnv

    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    np.save(folder / "initial.npy", np.random.default_rng(3).standard_normal(size // 4, np.float32))
    recipe = NumpyFedAvgRecipe(
        name="array",
        initial_ckpt=str(folder / "initial.npy"),
        min_clients=1,
        num_rounds=1,
        train_script=str(HERE / "array_client.py"),
        train_args=str(folder),
    )
    recipe.execute(RdmaSimEnv(num_clients=1, workspace_root=str(folder / "ws"), scheme="rdma"))


if __name__ == "__main__":
    main()
