"""A simulated FedAvg job: feedback_job.py FOLDER feedback|delta

feedback: results in 4 bits with error feedback, the model in full; one thread for two sites, so that FLARE starts a
site's process anew for each task. delta: both ways, as differences.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.recipe import add_quantization
from nvflare_rdma.simulator import RdmaSimEnv


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    recipe = NumpyFedAvgRecipe(
        name=mode,
        model=np.linspace(-1, 1, 64 * 100, dtype=np.float32).reshape(64, 100).tolist(),
        min_clients=2,
        num_rounds=2 if mode == "feedback" else 3,
        train_script=str(Path(__file__).with_name("feedback_client.py")),
        train_args=f"{folder} {mode}",
    )
    if mode == "delta":
        add_quantization(recipe, "int8", error_feedback=True, delta=True)
    else:
        recipe.add_client_output_filter(
            ModelQuantizer("normfloat4", one_way=True, error_feedback=True), tasks=["train"]
        )
        recipe.add_server_input_filter(ModelDequantizer(), tasks=["train"])
    threads = 1 if mode == "feedback" else 2
    run = recipe.execute(
        RdmaSimEnv(scheme="tcp", num_clients=2, num_threads=threads, workspace_root=str(folder / "ws"))
    )
    print("JOB STATUS", run.get_status())


if __name__ == "__main__":
    main()
