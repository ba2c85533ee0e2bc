"""A job with a numpy model that each site adds its number to, so that each round adds their mean.

sites_job.py FOLDER      writes the job to FOLDER/sites
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

from nvflare_rdma.recipe import add_transfer

NAME = "sites"
ROUNDS = 2
#: 4 MiB, which is not of whole chunks.
VALUES = (1 << 20) + 1


def first_model() -> np.ndarray:
    return np.arange(VALUES, dtype=np.float32) % 1000


def main() -> None:
    folder = Path(sys.argv[1])
    np.save(folder / "model.npy", first_model())
    recipe = NumpyFedAvgRecipe(
        name=NAME,
        initial_ckpt=str(folder / "model.npy"),
        min_clients=2,
        num_rounds=ROUNDS,
        train_script=str(Path(__file__).with_name("sites_client.py")),
    )
    add_transfer(recipe)
    recipe.export(job_dir=str(folder))


if __name__ == "__main__":
    main()
