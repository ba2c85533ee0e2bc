"""A small job like FLARE's hello-pt: training and cross-site evaluation of a torch model, in few bits in all tasks.

python hello_pt_job.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe.utils import add_cross_site_evaluation

from nvflare_rdma.recipe import add_quantization
from nvflare_rdma.simulator import RdmaSimEnv

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    recipe = FedAvgRecipe(
        name="hello_pt",
        model={"class_path": "torch.nn.Linear", "args": {"in_features": 64, "out_features": 100}},
        min_clients=2,
        num_rounds=1,
        train_script=str(Path(__file__).with_name("hello_pt_client.py")),
    )
    add_cross_site_evaluation(recipe)
    add_quantization(recipe, "blockwise8", tasks=["train", "validate", "submit_model"])
    run = recipe.execute(RdmaSimEnv(scheme="tcp", num_clients=2, workspace_root=str(folder / "ws")))
    print("JOB STATUS", run.get_status())
