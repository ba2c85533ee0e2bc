"""FLARE's list of classes for jobs without code of their own: what it says about this package, and who adds to it."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_common.np.np_trainer import NPTrainer
from nvflare.app_common.np.recipes.cross_site_eval import NumpyCrossSiteEvalRecipe
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.job_config.api import FedJob

import nvflare_rdma.filters
import nvflare_rdma.persistors
import nvflare_rdma.streaming
from nvflare_rdma import class_list
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.recipe import add_quantization, add_transfer

STANDARD = list(DEFAULT_CLASS_ALLOW_LIST)
TASKS = ["validate", "submit_model"]
PUBLIC = [
    getattr(package, name)
    for package in (nvflare_rdma.filters, nvflare_rdma.streaming, nvflare_rdma.persistors)
    for name in package.__all__
    if name[0].isupper() and name != "Autopilot"  # which no job names
]


def site(folder, entries=None, name="resources.json.default", **more):
    (folder / "local").mkdir(exist_ok=True)
    resources = {"format_version": 2, **more} | ({} if entries is None else {class_list.KEY: entries})
    (folder / "local" / name).write_text(json.dumps(resources))
    return folder


def flare_allows(cls, folder) -> bool:
    """What FLARE does when it builds a component of a job without code of its own."""
    file = next(f for n in ("", ".default") if (f := folder / "local" / f"resources.json{n}").exists())
    workspace = SimpleNamespace(get_resources_file_path=lambda: str(file))
    config = {"path": f"{cls.__module__}.{cls.__name__}"}
    try:
        ComponentPathAuthorizer().authorize_component_config(config, workspace=workspace)
    except UnsafeComponentError:
        return False
    return True


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_the_entries_have_every_public_class_by_the_name_that_flare_writes(cls, tmp_path):
    assert not flare_allows(cls, site(tmp_path, STANDARD))
    assert flare_allows(cls, site(tmp_path, [*STANDARD, *class_list.ENTRIES]))


@pytest.mark.parametrize(
    ("entries", "more", "missing"),
    [
        (STANDARD, {}, list(class_list.ENTRIES)),
        (None, {}, list(class_list.ENTRIES)),
        ([*STANDARD, "nvflare_rdma.filters"], {}, ["nvflare_rdma.streaming", "nvflare_rdma.persistors"]),
        ([*STANDARD, "nvflare_rdma."], {}, []),
        (["*"], {}, []),
        (["nvflare_rdma.filters.", "nvflare_rdma.streaming", "nvflare_rdma.persistors."], {}, []),
        (["nvflare_rdma.filtersets"], {}, list(class_list.ENTRIES)),
        (STANDARD, {"class_list_enforcement_mode": "warn"}, []),
        (None, {"class_list_enforcement_mode": "warn"}, []),
    ],
)
def test_what_is_missing_is_what_flare_refuses(entries, more, missing, tmp_path):
    found = class_list.read(site(tmp_path, entries, **more))
    assert found.missing == missing
    refused = {cls.__module__ for cls in PUBLIC if not flare_allows(cls, tmp_path)}
    assert refused == set(missing)
    assert bool(found.advice) == bool(missing)
    assert all(f'"{entry}"' in found.advice for entry in missing)


def test_the_file_that_flare_reads_is_the_one_that_is_named(tmp_path):
    site(tmp_path, STANDARD)
    assert "resources.json.default" in class_list.read(tmp_path).advice
    site(tmp_path, [*STANDARD, *class_list.ENTRIES], name="resources.json")
    assert class_list.read(tmp_path).missing == []
    (tmp_path / "local/resources.json").write_text("[")
    with pytest.raises(ConfigError, match=r"resources\.json can't be read"):
        class_list.read(tmp_path)


def test_a_simulators_workspace_gets_the_entries_unless_its_list_is_the_users_own(tmp_path):
    assert class_list.allow(tmp_path).missing == []  # nothing was there
    assert class_list.read(tmp_path).listed
    written = (tmp_path / "local/resources.json.default").read_text()
    assert json.loads(written)[class_list.KEY] == [*STANDARD, *class_list.ENTRIES]
    class_list.allow(tmp_path)
    assert (tmp_path / "local/resources.json.default").read_text() == written
    site(tmp_path, STANDARD[1:], name="resources.json")
    assert class_list.allow(tmp_path).missing == list(class_list.ENTRIES)
    assert json.loads((tmp_path / "local/resources.json").read_text())[class_list.KEY] == STANDARD[1:]


@pytest.mark.parametrize(
    ("entries", "code", "config", "said"),
    [
        (STANDARD, False, "nvflare_rdma.filters.ModelQuantizer", False),
        (STANDARD[1:], False, "nvflare_rdma.filters.ModelQuantizer", True),
        (STANDARD[1:], True, "nvflare_rdma.filters.ModelQuantizer", False),
        (STANDARD[1:], False, "nvflare.app_common.filters.ExcludeVars", False),
    ],
)
def test_the_simulator_says_which_line_a_list_of_the_users_own_lacks(entries, code, config, said, tmp_path, caplog):
    job = tmp_path / "job"
    (job / "app/config").mkdir(parents=True)
    (job / "app/config/config_fed_server.json").write_text(json.dumps({"components": [{"path": config}]}))
    if code:
        (job / "app/custom").mkdir()
    class_list.allow_for(job, site(tmp_path, entries))
    assert (f"add {class_list.line()} to class_allow_list in" in caplog.text) == said
    assert (class_list.read(tmp_path).missing == []) == (entries == STANDARD)


def fedavg(tmp_path):
    (tmp_path / "client.py").write_text("import nvflare.client\n")
    return NumpyFedAvgRecipe(
        name="t",
        model=np.zeros((2, 2)).tolist(),
        min_clients=1,
        num_rounds=1,
        train_script=str(tmp_path / "client.py"),
    )


def test_a_recipe_without_code_says_which_line_its_sites_need(caplog):
    recipe = NumpyCrossSiteEvalRecipe(name="q")
    with caplog.at_level(logging.WARNING, "nvflare_rdma"):
        add_quantization(recipe, tasks=TASKS)
        add_transfer(recipe)
    filters, streaming = (record.getMessage() for record in caplog.records)
    assert 'Add "nvflare_rdma.filters" to it' in filters
    assert 'Add "nvflare_rdma.streaming" to it' in streaming
    assert "every site and the server" in filters


def test_a_recipe_with_a_script_says_nothing(caplog, tmp_path):
    recipe = fedavg(tmp_path)
    with caplog.at_level(logging.WARNING, "nvflare_rdma"):
        add_quantization(recipe)
        add_transfer(recipe)
    assert not caplog.records


def test_with_an_app_for_each_site_each_has_to_bring_code(caplog, tmp_path):
    recipe = fedavg(tmp_path)
    recipe.set_per_site_config({"site-1": {}, "site-2": {}})
    with caplog.at_level(logging.WARNING, "nvflare_rdma"):
        add_transfer(recipe)
    (record,) = caplog.records
    assert "no code of its own so far for server, so" in record.getMessage()


@pytest.mark.parametrize("add", [add_quantization, add_transfer])
def test_a_site_that_gets_nothing_has_nothing_to_allow(add, caplog):
    job = FedJob(name="q")
    for name in ("site-1", "site-2", "site-3"):
        job.to(NPTrainer(), name)
    with caplog.at_level(logging.WARNING, "nvflare_rdma"):
        add(job, clients=["site-2"])
    (record,) = caplog.records
    named = record.getMessage().partition(" so far for ")[2].partition(", so FLARE")[0]
    assert sorted(named.split(", ")) == ["server", "site-2"]


class Own(NPTrainer):
    """A class that is in no installed package, so that FLARE copies its file into the job."""


def test_a_class_of_the_jobs_own_is_code():
    job = FedJob(name="q")
    job.to_clients(Own())
    assert class_list.sites_without_code(job._deploy_map, []) == []
    job = FedJob(name="q")
    job.to_clients(NPTrainer())
    assert class_list.sites_without_code(job._deploy_map, []) == ["@ALL"]
