"""Two rounds of FedAvg with the transfer, of a model whose embedding is its output layer, too.

python ties_job.py FOLDER [DIFF]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe  # noqa: E402
from nvflare.client.config import ExchangeFormat, TransferType  # noqa: E402
from ties_model import Tied  # noqa: E402

from nvflare_rdma.recipe import add_transfer  # noqa: E402
from nvflare_rdma.simulator import RdmaSimEnv  # noqa: E402

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    recipe = FedAvgRecipe(
        name="ties",
        model=Tied(),
        min_clients=2,
        num_rounds=3,
        train_script=str(HERE / "ties_client.py"),
        train_args=str(folder),
        server_expected_format=ExchangeFormat.PYTORCH,
        params_transfer_type=TransferType.DIFF if sys.argv[2:] == ["DIFF"] else TransferType.FULL,
    )
    add_transfer(recipe)
    recipe.execute(RdmaSimEnv(num_clients=2, workspace_root=str(folder / "ws"), scheme="tcp"))
