"""One round of FedAvg with quantization both ways, over rdma.

python weights_job.py FOLDER QUANTIZATION_TYPE [streamed|direct]

streamed: FLARE streams the tensors of the task, and the job has the transfer, too. direct: it has the transfer,
and its model is saved in the background.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe  # noqa: E402
from nvflare.client.config import ExchangeFormat  # noqa: E402
from weights_model import Awkward  # noqa: E402

from nvflare_rdma.recipe import add_quantization, add_transfer, save_in_background  # noqa: E402
from nvflare_rdma.simulator import RdmaSimEnv  # noqa: E402

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model = Awkward()
    torch.save(model.state_dict(), folder / "initial.pt")
    recipe = FedAvgRecipe(
        name="weights",
        model=model,
        min_clients=2,
        num_rounds=1,
        train_script=str(HERE / "weights_client.py"),
        train_args=str(folder),
        server_expected_format=ExchangeFormat.PYTORCH,
    )
    everything = [{"quantization_type": sys.argv[2]}]  # small tensors too
    if sys.argv[2] == "auto":
        add_quantization(recipe, "auto", round_seconds=60)
    else:
        add_quantization(recipe, sys.argv[2], policy=everything)
    if sys.argv[3:] == ["streamed"]:
        recipe.enable_tensor_streaming()
        add_transfer(recipe)
    if sys.argv[3:] == ["direct"]:
        add_transfer(recipe)
        save_in_background(recipe)
    recipe.execute(RdmaSimEnv(num_clients=2, workspace_root=str(folder / "ws"), scheme="rdma"))
