"""One round of FedAvg with one site, whose script runs in a process of its own. No torch, for it takes long to load.

python trainer_job.py FOLDER     in FOLDER: initial.npy, received.npy, sent.npy, and the workspace ws
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv

from nvflare_rdma.recipe import add_transfer

SCRIPT = Path(__file__).parents[1] / "verbs" / "array_client.py"
sys.path.insert(0, str(SCRIPT.parent))  # FLARE puts the script where it is below one of these


def main() -> None:
    folder = Path(sys.argv[1])
    np.save(folder / "initial.npy", np.random.default_rng(3).standard_normal((500, 1000), np.float32))
    recipe = NumpyFedAvgRecipe(
        name="array",
        initial_ckpt=str(folder / "initial.npy"),
        min_clients=1,
        num_rounds=1,
        train_script=str(SCRIPT),
        train_args=str(folder),
        launch_external_process=True,
    )
    add_transfer(recipe)
    recipe.execute(SimEnv(num_clients=1, workspace_root=str(folder / "ws")))


if __name__ == "__main__":
    main()
