"""What a site's job process hands on to trainers, and who gets `RdmaTransfer` in a job."""

from __future__ import annotations

import os
import types
from pathlib import Path

import numpy as np
import pytest
from nvflare.apis.event_type import EventType
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.client.cell.bootstrap import BOOTSTRAP_FILE_ENV_VAR
from nvflare.fuel.f3.cellnet.identity import CellIdentityResolver

from nvflare_rdma import runtime
from nvflare_rdma.errors import ConfigError, FabricUnavailable
from nvflare_rdma.flare_compat import CellConnections, cell_connections
from nvflare_rdma.recipe import add_transfer
from nvflare_rdma.settings import load_settings
from nvflare_rdma.streaming import RdmaTransfer
from nvflare_rdma.streaming.trainer import hand_on, inherited_site, take_back

IDENTITIES = {"server": "fl.example.org", "site-1.job": "site-1"}
CREDENTIALS = {"ca_cert": "/site/startup/rootCA.pem", "client_key": "/site/startup/client.key"}


def flare_cell(credentials, url="grpc://fl.example.org:8002", secure=True):
    endpoint = types.SimpleNamespace(conn_props=credentials)
    resolver = CellIdentityResolver("site-1.job", {"server": "fl.example.org"}, {"site-1.job": "site-1"})
    core = types.SimpleNamespace(
        endpoint=endpoint, root_url=url, parent_url=None, secure=secure, identity_resolver=resolver
    )
    return types.SimpleNamespace(core_cell=core, get_fqcn=lambda: "site-1.job")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Its changes go with the test."""
    monkeypatch.setattr(runtime, "_shared", runtime.Shared())
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in (BOOTSTRAP_FILE_ENV_VAR, "NVFLARE_COMM_DRIVER_PATH", "RDMA_TRANSFER_SITE"):
        os.environ.pop(name, None)
    return os.environ


def test_a_trainer_knows_its_site(environment):
    environment["NVFLARE_RDMA_RAILS"] = "3"
    settings = load_settings()
    before = dict(environment)
    hand_on(flare_cell(CREDENTIALS))
    assert environment["NVFLARE_COMM_DRIVER_PATH"].endswith("nvflare_rdma/trainer_plugin")
    assert inherited_site() is None  # the site's job process is none
    environment[BOOTSTRAP_FILE_ENV_VAR] = "/site/app/bootstrap.json"
    assert inherited_site() == CellConnections("grpc://fl.example.org:8002", True, CREDENTIALS, IDENTITIES)
    assert load_settings() == settings
    del environment[BOOTSTRAP_FILE_ENV_VAR]
    take_back()
    assert environment == before


def test_folders_of_other_drivers_stay_and_this_one_comes_once(environment):
    environment["NVFLARE_COMM_DRIVER_PATH"] = "/others"
    hand_on(flare_cell({}))
    hand_on(flare_cell({}))
    others, ours = environment["NVFLARE_COMM_DRIVER_PATH"].split(os.pathsep)
    assert others == "/others"
    # FLARE imports all of them by name, into a process that may be anybody's.
    assert {path.name for path in Path(ours).glob("**/*.py")} == {"nvflare_rdma_trainer.py"}


def _fire(component: RdmaTransfer, event: str) -> None:
    engine = types.SimpleNamespace(get_cell=lambda: flare_cell(CREDENTIALS))
    component.handle_event(event, types.SimpleNamespace(get_engine=lambda: engine))


def test_the_last_of_several_runs_takes_it_back(environment):
    first, second = RdmaTransfer(), RdmaTransfer()
    before = dict(environment)
    _fire(first, EventType.ABOUT_TO_START_RUN)
    handed = dict(environment)
    assert handed != before
    _fire(second, EventType.ABOUT_TO_START_RUN)
    for _ in range(2):
        _fire(first, EventType.END_RUN)  # which has not started
        assert environment == handed
    _fire(second, EventType.END_RUN)
    assert environment == before


@pytest.mark.parametrize(
    ("credentials", "url", "secure", "site"),
    [
        (None, None, False, CellConnections("", False, {}, IDENTITIES)),
        ({}, ["tcp://a:1", "tcp://b:2"], False, CellConnections("tcp://a:1", False, {}, IDENTITIES)),
        # Somebody else protects FLARE's own connections, but not these.
        (CREDENTIALS, "tcp://a:1", False, CellConnections("tcp://a:1", True, CREDENTIALS, IDENTITIES)),
    ],
)
def test_a_site_is_as_its_cell(credentials, url, secure, site):
    assert cell_connections(flare_cell(credentials, url, secure)) == site


def test_trainers_dial_their_site_on_this_host_and_nobody_else_does(cell):
    site = cell("site-1.job", ports=None, host="fl.example.org", trainers=True)
    trainer = cell("site-1.job.trainer", ports=None, host="fl.example.org")
    invitation = site.invite("site-1.job.trainer")
    assert invitation["hosts"] == ["127.0.0.1"]
    trainer.dial("site-1.job", invitation)
    assert site.await_open("site-1.job.trainer") is not None
    assert site.has_door_for("site-1.job.trainer")
    for peer in ("server.job", "site-1.job2", "site-1.job", "site-2.job.trainer"):
        assert not site.has_door_for(peer)
        with pytest.raises(FabricUnavailable, match=r"site-1\.job does not listen for data"):
            site.invite(peer)


@pytest.mark.parametrize("sites", [[], ["site-1", "site-2"]])
def test_a_recipe_gets_the_component_on_every_site(sites, tmp_path):
    (tmp_path / "client.py").write_text("import nvflare.client\n")
    recipe = NumpyFedAvgRecipe(
        name="t",
        model=np.zeros((2, 2)).tolist(),
        min_clients=1,
        num_rounds=1,
        train_script=str(tmp_path / "client.py"),
    )
    if sites:
        recipe.set_per_site_config({site: {} for site in sites})
    add_transfer(recipe)
    apps = recipe._job._deploy_map
    assert set(apps) == {"server", *(sites or ["@ALL"])}
    for name, app in apps.items():
        assert isinstance(app.app_config.components["rdma_transfer"], RdmaTransfer)
        assert name == "server" or app.app_config.executors, "an app of its own, which could not train"
        assert app.app_config.components["rdma_transfer"].accumulate
    with pytest.raises(ConfigError, match="already has RdmaTransfer"):
        add_transfer(recipe)


def test_a_site_that_has_no_package_gets_no_component(tmp_path):
    (tmp_path / "client.py").write_text("import nvflare.client\n")
    recipe = NumpyFedAvgRecipe(
        name="t",
        model=np.zeros((2, 2)).tolist(),
        min_clients=1,
        num_rounds=1,
        train_script=str(tmp_path / "client.py"),
    )
    recipe.set_per_site_config({site: {} for site in ("site-1", "site-2")})
    with pytest.raises(ConfigError, match="the job has no site-3"):
        add_transfer(recipe, clients=["site-3"])
    add_transfer(recipe, clients=["site-1"], accumulate=False)
    apps = recipe._job._deploy_map
    having = {name for name, app in apps.items() if "rdma_transfer" in app.app_config.components}
    assert having == {"server", "site-1"}
    assert not apps["server"].app_config.components["rdma_transfer"].accumulate
