"""A configuration that is read anew for each test, and start-up kits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nvflare_rdma.cli.peer_kit import this_side
from tests.support.configuration import read_anew
from tests.support.kits import CERT, SIGNATURE, WORKSPACE, poc, provision, static_file


@pytest.fixture(autouse=True)
def own_configuration():
    with read_anew():
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits")
    poc(folder)
    provision(folder / "provisioned", [WORKSPACE, static_file("http"), CERT, SIGNATURE])
    return folder


@pytest.fixture
def workspace(made, tmp_path):
    """That of a POC."""
    return Path(shutil.copytree(made / "poc", tmp_path / "poc"))


@pytest.fixture
def kits(workspace):
    return workspace / "example_project" / "prod_00"


@pytest.fixture
def provisioned(made, tmp_path):
    """Kits as they come, with scheme http and without a resources.json."""
    return Path(shutil.copytree(made / "provisioned/project/prod_00", tmp_path / "provisioned"))


@pytest.fixture
def side(monkeypatch):
    """This side of a check, over tcp, without a kit."""
    monkeypatch.setenv("NVFLARE_RDMA_FABRICS", "tcp")
    return this_side(None)
