"""Runs one simulated FedAvg job with a chosen subset of the four filters, or the transfer:
one_sided_job.py WORKSPACE POINT..."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.recipe import add_transfer
from nvflare_rdma.simulator import RdmaSimEnv

ADD = {
    "transfer": add_transfer,
    "server-out": lambda recipe: recipe.add_server_output_filter(ModelQuantizer("blockwise8"), tasks=["train"]),
    "client-in": lambda recipe: recipe.add_client_input_filter(ModelDequantizer(), tasks=["train"]),
    "client-out": lambda recipe: recipe.add_client_output_filter(ModelQuantizer("blockwise8"), tasks=["train"]),
    "server-in": lambda recipe: recipe.add_server_input_filter(ModelDequantizer(), tasks=["train"]),
    "server-out-one-way": lambda recipe: recipe.add_server_output_filter(
        ModelQuantizer("blockwise8", one_way=True), tasks=["train"]
    ),
}


def main() -> None:
    workspace, points = sys.argv[1], sys.argv[2:]
    recipe = NumpyFedAvgRecipe(
        name="one_sided",
        model=np.linspace(-1, 1, 64 * 100, dtype=np.float32).reshape(64, 100).tolist(),
        min_clients=1,
        num_rounds=2,
        train_script=str(Path(__file__).with_name("one_sided_client.py")),
    )
    for point in points:
        ADD[point](recipe)
    run = recipe.execute(RdmaSimEnv(scheme="tcp", num_clients=1, workspace_root=workspace))
    print("JOB STATUS", run.get_status())


if __name__ == "__main__":
    main()
