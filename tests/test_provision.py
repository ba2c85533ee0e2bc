"""`RdmaBuilder` among FLARE's own builders."""

from __future__ import annotations

import json

import pytest
from nvflare.lighter.utils import verify_folder_signature

from nvflare_rdma import class_list
from nvflare_rdma.cli import main
from nvflare_rdma.cli.doctor import read_settings
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.kits import BACKUP, RECORD
from nvflare_rdma.provision import RdmaBuilder
from nvflare_rdma.settings import Settings
from tests.support.configuration import read_anew
from tests.support.kits import CERT, SIGNATURE, WORKSPACE, provision, static_file

PLUGIN = "/opt/venv/lib/python3.11/site-packages/nvflare_rdma/plugin"
#: Has FLARE write a comm_config.json for each site.
LISTENING = {"default_host": "localhost", "port": 8102, "scheme": "tcp", "connection_security": "clear"}


def builder(**args):
    return {"path": "nvflare_rdma.provision.RdmaBuilder", "args": args}


def read(file):
    return json.loads(file.read_text())


@pytest.fixture(autouse=True)
def own_configuration():
    with read_anew():
        yield


def test_kits_have_the_settings_from_the_beginning(tmp_path, capsys):
    args = {"data_port": 8004, "patience": "4h", "upgrade_driver": True, "driver_path": PLUGIN}
    ours = builder(**args, sites=["server", "site-1"])
    kits = provision(tmp_path, [WORKSPACE, ours, static_file(), CERT, SIGNATURE])
    for name in ("server", "site-1"):
        ports = (8004, 8004) if name == "server" else "auto"
        settings, _, problems = read_settings(kits / name)
        assert problems == []
        assert settings == Settings(rdma_data_ports=ports, rdma_patience=4 * 3600.0, rdma_upgrade=True)
        assert read(kits / name / "local/comm_config.json")["comm_driver_path"] == PLUGIN
        assert class_list.read(kits / name).missing == []
    assert "nvflare_rdma.streaming.ParentDoor" in (kits / "server/local/resources.json.default").read_text()
    assert class_list.read(kits / "site-2").missing
    assert not [path for path in kits.rglob("*") if path.name == RECORD or path.name.endswith(BACKUP)]
    assert main(["disable", str(kits)]) == 0  # they are the kits' own
    assert "nothing to do" in capsys.readouterr().out


def test_direct_tensors_can_share_flares_own_port(tmp_path, capsys):
    args = {"data_port": 8002, "upgrade_driver": True, "driver_path": PLUGIN}
    kits = provision(tmp_path, [WORKSPACE, builder(**args), static_file(), CERT, SIGNATURE])
    assert "rdma_data_ports" not in read(kits / "server/local/comm_config.json")
    assert "nvflare_rdma.streaming.ParentDoor" in (kits / "server/local/resources.json.default").read_text()
    kits = provision(tmp_path / "grpc", [WORKSPACE, builder(**args), static_file("grpc"), CERT, SIGNATURE])
    assert not kits.exists()
    assert "for FLARE's own connections, over grpc" in "".join(capsys.readouterr())


def test_what_flare_writes_into_comm_config_stays(tmp_path):
    builders = [WORKSPACE, builder(patience="4h"), static_file(), CERT, SIGNATURE]
    kits = provision(tmp_path, builders, listening_host=LISTENING)
    config = read(kits / "site-1/local/comm_config.json")
    assert config["rdma_patience"] == "4h"
    assert config["internal"]["resources"]["port"] == 8102
    assert "comm_driver_path" not in config


@pytest.mark.parametrize("signed", [True, False])
def test_what_flare_signs_is_signed_as_it_is_in_the_end(tmp_path, signed):
    # Sites that encrypt homomorphically have such a file; the signature says nothing of what is in it.
    tenseal = [{"path": "tests.support.kits.Tenseal"}] if signed else []
    kits = provision(tmp_path, [WORKSPACE, builder(patience="4h"), static_file(), *tenseal, CERT, SIGNATURE])
    local = kits / "site-1/local"
    assert read(local / "comm_config.json") == {"rdma_patience": "4h"}
    assert (local / "signature.json").exists() == signed
    root = str(kits / "site-1/startup/rootCA.pem")
    assert verify_folder_signature(str(local), root, single_signer=True, signature_file="signature.json") == signed


@pytest.mark.parametrize(
    ("builders", "says"),
    [
        ([WORKSPACE, static_file(), builder()], ""),
        ([builder(), WORKSPACE, static_file()], "has to stand after WorkspaceBuilder"),
        (
            [WORKSPACE, builder(sites=["site-9"]), static_file()],
            "sites has 'site-9', which is none of the participants",
        ),
    ],
)
def test_a_wrong_place_or_name_ends_the_provisioning(tmp_path, capsys, builders, says):
    kits = provision(tmp_path, [*builders, CERT, SIGNATURE])
    assert kits.exists() == (not says)
    assert says in "".join(capsys.readouterr())


def test_before_flare_has_written_its_file_is_too_early(tmp_path, capsys):
    builders = [WORKSPACE, static_file(), builder(), CERT, SIGNATURE]
    kits = provision(tmp_path, builders, listening_host=LISTENING)
    assert not kits.exists()
    assert "RdmaBuilder has to stand before StaticFileBuilder" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"patience": "soon"}, "patience='soon': rdma_patience='soon' is no time"),
        ({"upgrade_driver": True}, "upgrade_driver needs driver_path"),
    ],
)
def test_a_bad_value_is_refused(args, says):
    with pytest.raises(ConfigError, match=says):
        RdmaBuilder(**args)
