"""add_quantization puts the right filter at each of the four points of a recipe or job."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.job_config.api import FedJob

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.recipe import add_quantization

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


def test_a_job_with_an_app_per_site(tmp_path):
    from nvflare.app_common.np.np_trainer import NPTrainer

    job = FedJob(name="q")
    for site in ("site-1", "site-2"):
        job.to(NPTrainer(), site)
    add_quantization(job, "blockwise8", tasks=["train", "validate"])
    for site in ("site-1", "site-2"):
        config = job._deploy_map[site].app_config
        assert [type(f).__name__ for _, fs in config.task_data_filters for f in fs] == [DEQUANTIZE]
        assert [type(f).__name__ for _, fs in config.task_result_filters for f in fs] == [QUANTIZE]
        assert set(config.task_data_filters[0][0]) == {"train", "validate"}


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
