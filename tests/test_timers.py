"""`add_transfer(patience=...)` lengthens FLARE's timers, and the log says which are too short."""

from __future__ import annotations

import json

import pytest
from nvflare.app_common.ccwf import SwarmClientController, SwarmServerController
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_common.workflows.cyclic_ctl import CyclicController
from nvflare.job_config.api import FedJob

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.recipe import add_transfer
from nvflare_rdma.timers import ON_CLIENTS, ON_SERVER, too_short

HOURS = 4 * 3600.0


def exported(job, folder):
    """The server's config and the clients', as FLARE writes them."""
    (job.export_job if isinstance(job, FedJob) else job.export)(str(folder))
    files = [next(folder.rglob(f"config_fed_{side}.json")) for side in ("server", "client")]
    return [json.loads(file.read_text()) for file in files]


def args(config, section, name):
    found = [each.get("executor", each) for each in config[section]]
    return next(each.get("args", {}) for each in found if each["path"].endswith(name))


def recipe(tmp_path, **more):
    script = tmp_path / "train.py"
    script.touch()
    return NumpyFedAvgRecipe(name="job", model=[0.0], min_clients=2, num_rounds=1, train_script=str(script), **more)


def test_patience_is_added_to_what_a_job_can_set(tmp_path):
    made = recipe(tmp_path)
    made.add_server_config({"np_min_download_timeout": 900.0})
    add_transfer(made, patience="4h")
    server, client = exported(made, tmp_path / "job")
    assert {name: server[name] for name in ON_SERVER} == {name: value + HOURS for name, value in ON_SERVER.items()}
    assert {name: client[name] for name in ON_CLIENTS} == {name: value + HOURS for name, value in ON_CLIENTS.items()}
    assert server["np_min_download_timeout"] == 900.0 + HOURS
    assert not {"np_min_download_timeout", "submit_task_result_timeout"} & client.keys()
    for config in (server, client):
        assert args(config, "components", "RdmaTransfer") == {"patience": HOURS}
    ClientAPIExecutor(**args(client, "executors", ClientAPIExecutor.__name__))  # takes them


def test_a_trainer_that_was_stopped_with_its_site_is_not_given_up(tmp_path):
    made = recipe(tmp_path, launch_external_process=True, command="python3 -u")
    add_transfer(made, patience="4h")
    _, client = exported(made, tmp_path / "job")
    arguments = args(client, "executors", ClientAPIExecutor.__name__)
    assert ClientAPIExecutor(**arguments)
    assert arguments["heartbeat_timeout"] == 30.0 + HOURS
    assert client["submit_task_result_timeout"] == 300.0 + HOURS


def test_workflows_wait_for_a_site(tmp_path):
    job = FedJob(name="job", min_clients=2)
    job.to_server(CyclicController(num_rounds=1, task_assignment_timeout=10))
    job.to_server(SwarmServerController(num_rounds=1, progress_timeout=100))
    job.to_clients(SwarmClientController(learn_task_ack_timeout=20), tasks=["swarm_*"])
    add_transfer(job, patience=60)
    server, client = exported(job, tmp_path)
    assert args(server, "workflows", "CyclicController")["task_assignment_timeout"] == 70
    assert args(server, "workflows", "SwarmServerController")["progress_timeout"] == 160
    assert args(server, "workflows", "SwarmServerController")["max_status_report_interval"] == 150
    assert args(client, "executors", "SwarmClientController")["learn_task_ack_timeout"] == 80
    assert args(client, "executors", "SwarmClientController")["final_result_ack_timeout"] == 70


def test_without_patience_flares_timers_stay(tmp_path):
    made = recipe(tmp_path)
    add_transfer(made)
    for config in exported(made, tmp_path / "job"):
        assert not {*ON_SERVER, *ON_CLIENTS} & config.keys()
        assert args(config, "components", "RdmaTransfer") == {}


def test_sites_that_have_no_transfer_keep_theirs(tmp_path):
    made = recipe(tmp_path)
    made.set_per_site_config({"site-1": {}, "site-2": {}})
    add_transfer(made, clients=["site-1"], patience=60)
    made.export(str(tmp_path / "job"))
    configs = {path.parents[1].name: json.loads(path.read_text()) for path in tmp_path.rglob("config_fed_client.json")}
    assert configs["app_site-1"]["streaming_idle_timeout"] == 660
    assert "streaming_idle_timeout" not in configs["app_site-2"]


def test_a_wrong_patience_adds_nothing(tmp_path):
    made = recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"patience='ages' is no time"):
        add_transfer(made, patience="ages")
    add_transfer(made, patience="1h")


def defaults(name, default):
    return default


def test_what_ends_first_is_named(tmp_path):
    startup = tmp_path / "fed_server.json"
    startup.write_text(json.dumps({"servers": [{"heart_beat_timeout": 1200}]}))
    assert too_short(HOURS, True, defaults, startup) == [
        "heart_beat_timeout=1200 and dead_client_grace_period=60",
        "streaming_idle_timeout=600",
    ]
    assert too_short(1000.0, True, defaults, startup) == ["streaming_idle_timeout=600"]
    assert too_short(700.0, True, defaults, tmp_path / "none")[0].startswith("heart_beat_timeout=600 and")
    assert too_short(HOURS, False, defaults, None) == ["max_runner_sync_timeout=60", "streaming_idle_timeout=600"]
    assert too_short(60.0, False, defaults, None) == []
    assert too_short(HOURS, True, lambda name, default: default + HOURS, None) == []
