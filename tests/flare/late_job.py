"""FLARE's ScatterAndGather that goes on with the results of two of three sites, and a third that is always late.

python late_job.py FOLDER QUANTIZATION_TYPE|none
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from late_model import Wide  # noqa: E402
from late_parts import HoldBack  # noqa: E402
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import (  # noqa: E402
    InTimeAccumulateWeightedAggregator,
)
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import (  # noqa: E402
    FullModelShareableGenerator,
)
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather  # noqa: E402
from nvflare.app_opt.pt.job_config.model import PTModel  # noqa: E402
from nvflare.client.config import ExchangeFormat  # noqa: E402
from nvflare.job_config.api import FedJob  # noqa: E402
from nvflare.job_config.script_runner import ScriptRunner  # noqa: E402
from nvflare.recipe.spec import Recipe  # noqa: E402

from nvflare_rdma.recipe import add_quantization, add_transfer  # noqa: E402
from nvflare_rdma.simulator import RdmaSimEnv  # noqa: E402

ROUNDS = 3

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    job = FedJob("late", min_clients=3)
    components = job.to_server(PTModel(Wide(), allow_numpy_conversion=False))
    job.to_server(FullModelShareableGenerator(), id="generator")
    job.to_server(InTimeAccumulateWeightedAggregator(expected_data_kind="WEIGHTS"), id="aggregator")
    job.to_server(
        ScatterAndGather(
            min_clients=2,
            wait_time_after_min_received=0,
            num_rounds=ROUNDS,
            persistor_id=components["persistor_id"],
            aggregator_id="aggregator",
            shareable_generator_id="generator",
            task_check_period=0.1,
        )
    )
    job.to_clients(
        ScriptRunner(str(HERE / "late_client.py"), str(folder), server_expected_format=ExchangeFormat.PYTORCH)
    )
    job.to_clients(HoldBack(str(folder), "site-3", ROUNDS), id="hold_back")
    recipe = Recipe(job)
    if sys.argv[2] != "none":
        add_quantization(recipe, sys.argv[2])
    add_transfer(recipe)
    run = recipe.execute(RdmaSimEnv(num_clients=3, workspace_root=str(folder / "ws"), scheme="tcp"))
    print("JOB STATUS", run.get_status())
