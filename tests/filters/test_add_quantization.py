"""add_quantization puts the right filter at each of the four points of a recipe or job."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator
from nvflare.app_common.ccwf import ccwf_job as ccwf
from nvflare.app_common.ccwf.comps.np_file_model_persistor import NPFileModelPersistor
from nvflare.app_common.ccwf.comps.simple_model_shareable_generator import SimpleModelShareableGenerator
from nvflare.app_common.np.np_trainer import NPTrainer
from nvflare.app_common.np.np_validator import NPValidator
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.collab import collab
from nvflare.collab.recipe import CollabRecipe
from nvflare.job_config.api import FedJob
from nvflare.recipe.spec import Recipe

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters import PeerQuantizer
from nvflare_rdma.recipe import add_quantization, add_transfer

QUANTIZE, DEQUANTIZE = "ModelQuantizer", "ModelDequantizer"
PUBLIC = "nvflare_rdma.filters."


@pytest.fixture
def recipe(tmp_path):
    script = tmp_path / "client.py"
    script.write_text("import nvflare.client\n")
    return NumpyFedAvgRecipe(
        name="q", model=np.zeros((2, 2)).tolist(), min_clients=1, num_rounds=1, train_script=str(script)
    )


def exported(job, folder):
    job.export_job(str(folder))
    found = {}
    for side in ("server", "client"):
        for path in folder.glob(f"**/config_fed_{side}.json"):
            config = json.loads(path.read_text())
            found[side] = {
                s: [(c["tasks"], f["path"], f.get("args", {})) for c in config[s] for f in c["filters"]]
                for s in ("task_data_filters", "task_result_filters")
            }
    return found


def test_the_four_filters_of_a_recipe(recipe, tmp_path):
    add_quantization(recipe, "NormFloat4")
    found = exported(recipe._job, tmp_path / "out")
    args = {"quantization_type": "normfloat4", "policy": []}
    for side, quantized, decoded in (
        ("server", "task_data_filters", "task_result_filters"),
        ("client", "task_result_filters", "task_data_filters"),
    ):
        assert found[side][quantized] == [(["train"], PUBLIC + QUANTIZE, args)]
        assert found[side][decoded] == [(["train"], PUBLIC + DEQUANTIZE, {})]
    assert not list((tmp_path / "out").glob("**/nvflare_rdma")), "the package must not be copied into the job"


@pytest.mark.parametrize(
    ("kind", "options"), [("exact_delta", {"delta": True}), ("topk2", {"delta": True, "error_feedback": True})]
)
def test_what_a_type_can_not_do_without_is_on(recipe, tmp_path, kind, options):
    add_quantization(recipe, kind)
    found = exported(recipe._job, tmp_path / "out")
    args = {"quantization_type": kind, "policy": []} | options
    assert found["server"]["task_data_filters"] == [(["train"], PUBLIC + QUANTIZE, args)]
    assert found["client"]["task_result_filters"] == [(["train"], PUBLIC + QUANTIZE, args)]


def test_the_largest_error_is_for_both_sides(recipe, tmp_path):
    add_quantization(recipe, "normfloat4", max_relative_error=0.05)
    found = exported(recipe._job, tmp_path / "out")
    args = {"quantization_type": "normfloat4", "policy": [], "max_relative_error": 0.05}
    assert found["server"]["task_data_filters"] == [(["train"], PUBLIC + QUANTIZE, args)]
    assert found["client"]["task_result_filters"] == [(["train"], PUBLIC + QUANTIZE, args)]


def test_the_type_may_follow_the_links(recipe, tmp_path):
    add_quantization(recipe, "auto", round_seconds=60, round_bytes=10_000_000)
    found = exported(recipe._job, tmp_path / "out")
    args = {"quantization_type": "auto", "policy": [], "round_seconds": 60.0, "round_bytes": 10_000_000}
    assert found["server"]["task_data_filters"] == [(["train"], PUBLIC + QUANTIZE, args)]
    assert found["client"]["task_result_filters"] == [(["train"], PUBLIC + QUANTIZE, args)]


def test_a_job_with_an_app_per_site(tmp_path):
    job = FedJob(name="q")
    for site in ("site-1", "site-2"):
        job.to(NPTrainer(), site)
    add_quantization(job, "blockwise8", tasks=["train", "validate"])
    for site in ("site-1", "site-2"):
        config = job._deploy_map[site].app_config
        assert [type(f).__name__ for _, fs in config.task_data_filters for f in fs] == [DEQUANTIZE]
        assert [type(f).__name__ for _, fs in config.task_result_filters for f in fs] == [QUANTIZE]
        assert set(config.task_data_filters[0][0]) == {"train", "validate"}


def test_a_job_with_an_app_for_all_sites_and_one_that_flare_ignores(tmp_path):
    job = FedJob(name="q", min_clients=1)
    job.to_server(FedAvg(num_clients=1, num_rounds=1))
    job.to_clients(NPTrainer(), tasks=["train"])
    job.to(NPValidator(), "site-1", tasks=["validate"])
    add_quantization(job, "int8")
    add_transfer(job)
    found = exported(job, tmp_path / "out")
    for section in ("task_data_filters", "task_result_filters"):
        assert len(found["server"][section]) == len(found["client"][section]) == 1
    texts = [path.read_text() for path in (tmp_path / "out").glob("**/config_fed_client.json")]
    assert len(texts) == 1
    assert "RdmaTransfer" in texts[0]


def test_adding_twice_is_refused(recipe):
    add_quantization(recipe, "float16")
    with pytest.raises(ConfigError, match="already has ModelQuantizer"):
        add_quantization(recipe, "float16")


@pytest.mark.parametrize("tasks", [[], "train", ["*"], [""], [1]])
def test_bad_tasks_are_refused(recipe, tasks):
    with pytest.raises(ConfigError, match="tasks"):
        add_quantization(recipe, "float16", tasks=tasks)


def test_a_bad_type_or_target_adds_nothing(recipe):
    with pytest.raises(ConfigError, match="int3"):
        add_quantization(recipe, "int3")
    with pytest.raises(ConfigError, match="dict"):
        add_quantization({}, "float16")
    add_quantization(recipe, "float16")


def components(recipe, site):
    return recipe._job._deploy_map[site].app_config.components


def filters(recipe, site):
    config = recipe._job._deploy_map[site].app_config
    return config.task_data_filters + config.task_result_filters


def test_some_sites_only(recipe, tmp_path):
    recipe.set_per_site_config({"site-1": {}, "site-2": {}})
    add_quantization(recipe, "int8", clients=["site-2"])
    assert filters(recipe, "site-2")
    assert not filters(recipe, "site-1")
    recipe._job.export_job(str(tmp_path / "out"))
    texts = {path.parts[-3]: path.read_text() for path in (tmp_path / "out").glob("**/config_fed_*.json")}
    assert "nvflare_rdma" not in texts["app_site-1"], "a site without the package could not load it"
    assert "clients" not in texts["app_site-2"]
    assert texts["app_server"].count('"clients": [') == 2


@pytest.mark.parametrize(
    ("sites", "clients", "reason"),
    [
        ([], ["site-1"], "this job has one for all of them: call recipe.set_per_site_config"),
        (["site-1"], ["site-2", "site-1"], "the job has no site-2, only site-1"),
        (["site-1"], [], "clients must be a list of site names"),
        (["site-1"], "site-1", "clients must be a list of site names"),
    ],
)
def test_bad_clients_are_refused(recipe, sites, clients, reason):
    if sites:
        recipe.set_per_site_config({site: {} for site in sites})
    with pytest.raises(ConfigError, match=reason):
        add_quantization(recipe, clients=clients)
    assert not any(filters(recipe, site) for site in recipe._job._deploy_map)


def test_tasks_that_no_executor_takes_are_refused():
    job = FedJob(name="q")
    job.to_clients(NPTrainer(), tasks=["train", "swarm_*"])
    with pytest.raises(ConfigError, match=r"no executor for validate.*name some of: swarm_\*, train"):
        add_quantization(job, tasks=["train", "validate"])
    add_quantization(job, tasks=["train", "swarm_learn"])


def controlled_by_sites(*workflows):
    parts = {
        "executor": NPTrainer(),
        "persistor": NPFileModelPersistor(),
        "shareable_generator": SimpleModelShareableGenerator(),
    }
    job = ccwf.CCWFJob("q")
    if "swarm" in workflows:
        aggregator = InTimeAccumulateWeightedAggregator()
        job.add_swarm(ccwf.SwarmServerConfig(1), ccwf.SwarmClientConfig(aggregator=aggregator, **parts))
    if "cyclic" in workflows:
        job.add_cyclic(ccwf.CyclicServerConfig(1), ccwf.CyclicClientConfig(**parts))
    if "evaluation" in workflows:
        job.add_cross_site_eval(ccwf.CrossSiteEvalConfig(), "persistor")
        job.to_clients(NPTrainer(), tasks=["validate"])
    return Recipe(job)


@pytest.mark.parametrize("workflow", ["swarm", "cyclic"])
def test_what_sites_send_each_other_is_no_filters_matter(workflow):
    recipe = controlled_by_sites(workflow)
    add_quantization(recipe, "NormFloat4", policy=[{"name": "head", "quantization_type": "exact"}])
    made = components(recipe, "@ALL")["peer_quantizer"]
    assert type(made) is PeerQuantizer
    assert made.max_relative_error is None
    assert (made.quantization_type, len(made.policy)) == ("normfloat4", 1)
    assert not filters(recipe, "@ALL")
    assert not filters(recipe, "server"), "they would never have a model"
    with pytest.raises(ConfigError, match="already has PeerQuantizer"):
        add_quantization(recipe)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"error_feedback": True, "delta": True}, "error_feedback, delta can't be used in a workflow that the sites"),
        ({"quantization_type": "lossless"}, "lossless can't be used between sites"),
        ({"quantization_type": "exact_delta"}, "exact_delta can't be used between sites"),
        ({"quantization_type": "topk2"}, "topk2 can't be used between sites"),
        ({"policy": [{"role": "head", "quantization_type": "adaquant"}]}, "adaquant can't be used between sites"),
    ],
)
def test_what_can_not_be_done_between_sites_is_refused(arguments, reason):
    recipe = controlled_by_sites("swarm")
    with pytest.raises(ConfigError, match=reason):
        add_quantization(recipe, **arguments)
    assert "peer_quantizer" not in components(recipe, "@ALL")


@pytest.mark.parametrize("arguments", [{}, {"tasks": ["validate"]}])
def test_between_sites_names_of_tasks_mean_nothing(arguments):
    recipe = controlled_by_sites("swarm")
    for each in recipe._job._deploy_map["@ALL"].app_config.executors:
        each.executor.learn_task_name = "learn"
        each.tasks = ["learn"]
    add_quantization(recipe, **arguments)
    assert "peer_quantizer" in components(recipe, "@ALL")


def test_a_job_may_get_its_executors_later(caplog):
    """Nobody has named the task, and the job is not whole yet as that of a recipe is."""
    job = FedJob(name="q")
    job.to_clients(NPTrainer(), tasks=["validate"])
    with pytest.raises(ConfigError, match="no executor for train"):
        add_quantization(Recipe(job))
    with pytest.raises(ConfigError, match="no executor for train"):
        add_quantization(job, tasks=["train"])
    with caplog.at_level(logging.WARNING, "nvflare_rdma"):
        add_quantization(job)
    assert "no executor for train, so nothing would be quantized; name some of: validate, unless" in caplog.text
    assert job._deploy_map["@ALL"].app_config.task_data_filters


class CollabServer:
    @collab.main
    def run(self):
        pass


class CollabClient:
    @collab.publish
    def train(self):
        pass


def test_jobs_in_which_nothing_would_be_quantized_are_refused():
    with pytest.raises(ConfigError, match="none of them is a swarm or cyclic one"):
        add_quantization(controlled_by_sites("evaluation"))
    recipe = CollabRecipe("c", server=CollabServer(), client=CollabClient())
    with pytest.raises(ConfigError, match="no effect on a Collab job"):
        add_quantization(recipe)
