"""Small jobs of FLARE's workflows with numpy models and both of this package's lines.

python workflow_job.py FOLDER pretrained|apart|swarm|cyclic|scaffold
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.ccwf import ccwf_job as ccwf
from nvflare.app_common.ccwf.comps.np_file_model_persistor import NPFileModelPersistor
from nvflare.app_common.ccwf.comps.simple_model_shareable_generator import SimpleModelShareableGenerator
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.np.recipes.cross_site_eval import NumpyCrossSiteEvalRecipe
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_common.workflows.scaffold import Scaffold
from nvflare.client.config import ExchangeFormat
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from nvflare.recipe.spec import Recipe

from nvflare_rdma.recipe import add_quantization, add_transfer
from nvflare_rdma.simulator import RdmaSimEnv

QUANTIZATION = "blockwise8"
ROUNDS = 2
CLIENT = str(Path(__file__).with_name("workflow_client.py"))


def model() -> np.ndarray:
    """More than a codec leaves exact, and than the first message brings along."""
    return np.linspace(-1, 1, 200 * 300, dtype=np.float32).reshape(200, 300)


def pretrained(folder: Path) -> Recipe:
    """FLARE's hello-numpy-cross-val with `--mode pretrained`: it brings no code of its own."""
    np.save(folder / "model.npy", model())
    recipe = NumpyCrossSiteEvalRecipe(name="pretrained", initial_ckpt=str(folder / "model.npy"))
    add_quantization(recipe, QUANTIZATION, tasks=["validate", "submit_model"])
    add_transfer(recipe)
    return recipe


def apart(folder: Path) -> Recipe:
    """Only site-1 has this package."""
    recipe = NumpyFedAvgRecipe(
        name="apart",
        model=model().tolist(),
        min_clients=2,
        num_rounds=ROUNDS,
        train_script=CLIENT,
        train_args=str(folder),
    )
    recipe.set_per_site_config({"site-1": {}, "site-2": {}})
    add_quantization(recipe, QUANTIZATION, clients=["site-1"])
    add_transfer(recipe, clients=["site-1"])
    return recipe


def runner(folder: Path) -> ScriptRunner:
    return ScriptRunner(CLIENT, str(folder), framework=FrameworkType.RAW, server_expected_format=ExchangeFormat.RAW)


def controlled_by_sites(folder: Path, which: str) -> Recipe:
    np.save(folder / "model.npy", model())
    parts = {
        "executor": runner(folder),
        "persistor": NPFileModelPersistor(source_ckpt_file_full_name=str(folder / "model.npy")),
        "shareable_generator": SimpleModelShareableGenerator(),
    }
    job = ccwf.CCWFJob(which, min_clients=2)
    if which == "swarm":
        from patient_aggregator import PatientAggregator  # a file of the job's own, in the folder of this one

        client = ccwf.SwarmClientConfig(
            aggregator=PatientAggregator(),
            min_responses_required=2,
            learn_task_ack_timeout=100,
            request_to_submit_result_interval=0.2,
            **parts,
        )
        job.add_swarm(ccwf.SwarmServerConfig(ROUNDS, aggr_clients=["site-1"], starting_client="site-1"), client)
    else:
        job.add_cyclic(
            ccwf.CyclicServerConfig(ROUNDS, starting_client="site-1"),
            ccwf.CyclicClientConfig(learn_task_ack_timeout=100, **parts),
        )
    recipe = Recipe(job)
    add_quantization(recipe, QUANTIZATION)
    add_transfer(recipe)
    return recipe


def scaffold(folder: Path) -> FedJob:
    job = FedJob("scaffold", min_clients=2)
    job.to_server(NPModelPersistor(model=model().tolist()), id="persistor")
    job.to_server(Scaffold(num_clients=2, num_rounds=ROUNDS, persistor_id="persistor"))
    job.to_clients(runner(folder))
    recipe = Recipe(job)
    add_quantization(recipe, QUANTIZATION)
    add_transfer(recipe)
    return recipe


def main() -> None:
    folder, which = Path(sys.argv[1]), sys.argv[2]
    os.environ.pop("NVFLARE_COMM_DRIVER_PATH", None)  # a site without this package can't import its driver
    make = {"pretrained": pretrained, "apart": apart, "scaffold": scaffold}
    recipe = make[which](folder) if which in make else controlled_by_sites(folder, which)
    # FLARE's own driver, which a site without this package has, too.
    run = recipe.execute(RdmaSimEnv(scheme="tcp", num_clients=2, workspace_root=str(folder / "ws")))
    print("JOB STATUS", run.get_status())


if __name__ == "__main__":
    main()
