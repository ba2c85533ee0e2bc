"""Jobs with a numpy model that each site adds its number to, so that each round adds their mean.

sites_job.py FOLDER ...      writes a job that the server controls to FOLDER/sites, and a swarm to FOLDER/swarm
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator
from nvflare.app_common.ccwf import ccwf_job as ccwf
from nvflare.app_common.ccwf.comps.np_file_model_persistor import NPFileModelPersistor
from nvflare.app_common.ccwf.comps.simple_model_shareable_generator import SimpleModelShareableGenerator
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from nvflare.recipe.spec import Recipe

from nvflare_rdma.recipe import add_transfer

NAME, SWARM = "sites", "swarm"
CLIENT = str(Path(__file__).with_name("sites_client.py"))
ROUNDS, SITES = 2, 3
#: 4 MiB, which is not of whole chunks.
VALUES = (1 << 20) + 1


def first_model(values: int = VALUES) -> np.ndarray:
    return np.arange(values, dtype=np.float32) % 1000


def swarm(model: str) -> Recipe:
    """Models go from site to site."""
    client = ccwf.SwarmClientConfig(
        executor=ScriptRunner(CLIENT, framework=FrameworkType.RAW, server_expected_format=ExchangeFormat.RAW),
        aggregator=InTimeAccumulateWeightedAggregator(expected_data_kind="WEIGHTS"),
        persistor=NPFileModelPersistor(source_ckpt_file_full_name=model),
        shareable_generator=SimpleModelShareableGenerator(),
        min_responses_required=SITES,
        learn_task_ack_timeout=100,
        request_to_submit_result_interval=0.2,
    )
    job = ccwf.CCWFJob(SWARM, min_clients=SITES)
    job.add_swarm(ccwf.SwarmServerConfig(ROUNDS, aggr_clients=["site-1"], starting_client="site-1"), client)
    return Recipe(job)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--values", type=int, default=VALUES)
    parser.add_argument("--patience", help="how long a site may be out of reach; FLARE's timers stay without it")
    parser.add_argument("--sites", type=int, default=SITES)
    parser.add_argument("--clients", nargs="+", help="the sites that have this package; all without it")
    given = parser.parse_args()
    folder = given.folder
    np.save(folder / "model.npy", first_model(given.values))
    recipe = NumpyFedAvgRecipe(
        name=NAME,
        initial_ckpt=str(folder / "model.npy"),
        min_clients=given.sites,
        num_rounds=ROUNDS,
        train_script=CLIENT,
    )
    if given.clients:
        recipe.set_per_site_config({f"site-{number + 1}": {} for number in range(given.sites)})
    for each in (recipe,) if given.clients else (recipe, swarm(str(folder / "model.npy"))):
        add_transfer(each, given.clients, patience=given.patience)
        each.export(job_dir=str(folder))


if __name__ == "__main__":
    main()
