"""`nvflare-rdma enable` and `disable` on kits that FLARE's own provisioning has made."""

from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path

import pytest

from nvflare_rdma import class_list
from nvflare_rdma.cli import driver_path
from nvflare_rdma.cli.doctor import read_settings
from nvflare_rdma.kits import BACKUP, RECORD
from nvflare_rdma.settings import Settings
from tests.support.kits import (
    ALL,
    CERT,
    DOCKER,
    SERVER,
    SIGNATURE,
    SITE_1,
    SITE_2,
    WORKSPACE,
    change,
    config,
    has_door,
    prepared,
    provision,
    run,
    static_file,
    tree,
)

# -- enable ------------------------------------------------------------------------------------------------


def test_the_package_reads_back_what_was_set(workspace, kits):
    assert run("enable", workspace, *ALL) == 0
    for name in (SERVER, SITE_1, SITE_2):
        settings, told, problems = read_settings(kits / name)
        assert problems == []
        assert told.startswith(str(kits / name / "local/comm_config.json"))
        assert settings == Settings(
            rdma_fabrics=("shm", "tcp"),
            rdma_memory_budget_bytes=256 << 20,
            rdma_data_ports=(20000, 20010) if name == SERVER else "auto",
            rdma_patience=4 * 3600.0,
            rdma_upgrade=True,
        )
        assert config(kits / name)["comm_driver_path"] == driver_path()
        assert class_list.read(kits / name).missing == []
        assert has_door(class_list.read(kits / name).file) == (name == SERVER)


def test_without_options_the_driver_is_there_and_jobs_without_code_may_use_the_package(kits):
    assert run("enable", kits / SITE_1) == 0
    assert config(kits / SITE_1) == {"comm_driver_path": driver_path()}
    assert class_list.read(kits / SITE_1).missing == []
    assert not (kits / SERVER / "local/comm_config.json").exists()


def test_direct_tensors_can_share_flares_own_port(tmp_path):
    kits = provision(tmp_path, [WORKSPACE, static_file("tcp"), CERT, SIGNATURE])
    before = tree(kits)
    for _ in range(2):
        assert run("enable", kits, "--upgrade-driver", "--data-port", "8002") == 0
    assert config(kits / SERVER) == {"comm_driver_path": driver_path(), "rdma_upgrade": True}
    assert has_door(kits / SERVER / "local/resources.json.default")
    assert not has_door(kits / SITE_1 / "local/resources.json.default")
    assert run("enable", kits, "--data-port", "8002") == 0  # the driver has it already
    assert run("disable", kits) == 0
    assert tree(kits) == before


def test_what_flare_set_stays(kits):
    file = kits / SERVER / "local/comm_config.json"
    change(file, allow_adhoc_conns=False, internal={"scheme": "tcp", "resources": {"host": "0.0.0.0"}})
    resources = json.loads((kits / SERVER / "local/resources.json").read_text())
    assert run("enable", kits, *ALL) == 0
    assert config(kits / SERVER)["internal"] == {"scheme": "tcp", "resources": {"host": "0.0.0.0"}}
    after = json.loads((kits / SERVER / "local/resources.json").read_text())
    assert after["components"][:-1] == resources["components"]
    assert after["class_allow_list"] == [*resources["class_allow_list"], *class_list.ENTRIES]
    assert {**after, "components": 0, "class_allow_list": 0} == {**resources, "components": 0, "class_allow_list": 0}


def test_a_second_run_finds_nothing_to_do(workspace, capsys):
    assert run("enable", workspace, *ALL) == 0
    once = tree(workspace)
    times = {path: path.stat().st_mtime_ns for path in workspace.rglob("*")}
    capsys.readouterr()
    assert run("enable", workspace, *ALL) == 0
    out = capsys.readouterr().out
    assert out.count("nothing to do") == 3
    assert "---" not in out
    assert tree(workspace) == once
    assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*")} == times


def test_the_diff_is_data_for_people_and_talk_for_programs(kits, capsys):
    file = kits / SITE_1 / "local/comm_config.json"
    assert run("enable", kits / SITE_1, "--dry-run", "--patience", "4h") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f'--- /dev/null\n+++ {file}\n@@ -0,0 +1,4 @@\n+{{\n+    "rdma_patience": "4h",\n' in out
    assert "site-1: comm_config.json and resources.json.default would be changed" in out
    assert run("enable", kits / SITE_1, "--dry-run", "--patience", "4h", "--format", "json") == 0
    out, err = capsys.readouterr()
    (site,) = json.loads(out)["data"]["sites"]
    assert (site["site"], site["role"], site["folder"]) == (SITE_1, "client", str(kits / SITE_1))
    assert site["changed"] == [str(file), f"{file.with_name('resources.json.default')}"]
    assert err == site["diff"] + "\n"
    assert '+    "rdma_patience": "4h",' in err


def test_a_diff_has_few_lines_besides_those_that_change(kits, capsys):
    """FLARE's files keep their layout."""
    assert run("enable", kits, *ALL, "--format", "json") == 0
    for site in json.loads(capsys.readouterr().out)["data"]["sites"]:
        gone = [line for line in site["diff"].splitlines() if re.match("-(?!--)", line)]
        assert len(gone) == (0 if site["role"] == "admin" else 1), site["diff"]  # which gets a comma


def test_a_dry_run_changes_nothing(workspace):
    before = tree(workspace)
    assert run("enable", workspace, *ALL, "--dry-run") == 0
    assert tree(workspace) == before
    assert run("enable", workspace, *ALL) == 0
    enabled = tree(workspace)
    assert run("disable", workspace, "--dry-run") == 0
    assert tree(workspace) == enabled


def test_the_data_port_is_the_servers_and_without_one_each_sites(kits):
    assert run("enable", kits / SITE_1, kits / SITE_2, "--data-port", "8004") == 0
    for name in (SITE_1, SITE_2):
        assert read_settings(kits / name)[0].rdma_data_ports == (8004, 8004)
        assert has_door(kits / name / "local/resources.json.default")
    assert run("enable", kits, "--data-port", "8005") == 0
    assert [read_settings(kits / name)[0].rdma_data_ports[0] for name in (SERVER, SITE_1)] == [8005, 8004]


def test_a_door_that_is_there_stays_the_only_one(kits):
    file = kits / SERVER / "local/resources.json"
    door = {"id": "parent_door", "path": "nvflare_rdma.streaming.ParentDoor", "args": {}}
    change(file, components=[*json.loads(file.read_text())["components"], door])
    assert run("enable", kits / SERVER, "--data-port", "8004") == 0
    assert json.loads(file.read_text())["components"].count(door) == 1
    assert "rdma_door" not in file.read_text()


@pytest.mark.parametrize(
    ("known", "after"),
    [
        ("/opt/own/drivers", "/opt/own/drivers:{}"),
        ("/old/site-packages/nvflare_rdma/plugin", "{}"),
        ("/old/nvflare_rdma/plugin/:/opt/own", "/opt/own:{}"),
    ],
)
def test_other_drivers_stay_and_another_installations_makes_room(kits, known, after):
    original = change(kits / SITE_1 / "local/comm_config.json", comm_driver_path=known)
    assert run("enable", kits / SITE_1) == 0
    assert config(kits / SITE_1)["comm_driver_path"] == after.format(driver_path())
    assert run("disable", kits / SITE_1) == 0
    assert (kits / SITE_1 / "local/comm_config.json").read_bytes() == original


def test_modes_and_links_stay(kits, tmp_path):
    local = kits / SITE_1 / "local"
    elsewhere = tmp_path / "comm_config.json"
    elsewhere.write_text("{}")
    elsewhere.chmod(0o640)
    (local / "comm_config.json").symlink_to(elsewhere)
    (local / "resources.json.default").chmod(0o600)
    assert run("enable", kits / SITE_1) == 0
    assert (local / "comm_config.json").is_symlink()
    assert "comm_driver_path" in elsewhere.read_text()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (elsewhere, local / "resources.json.default")}
    assert modes == {"comm_config.json": 0o640, "resources.json.default": 0o600}
    assert stat.S_IMODE((local / f"resources.json.default{BACKUP}").stat().st_mode) == 0o600
    assert not list(local.glob(".*")), "something was left beside the files"


@pytest.mark.parametrize("there", [True, False])
def test_kits_may_share_a_file_that_becomes_the_same_for_all(kits, tmp_path, there):
    shared = tmp_path / "comm_config.json"
    if there:
        shared.write_text('{"a": 1}\n')
    for name in (SITE_1, SITE_2):
        (kits / name / "local/comm_config.json").symlink_to(shared)
    before = tree(kits)
    assert run("enable", kits / SITE_1, kits / SITE_2, "--patience", "4h") == 0
    assert json.loads(shared.read_text()) == {
        **({"a": 1} if there else {}),
        "comm_driver_path": driver_path(),
        "rdma_patience": "4h",
    }
    assert run("disable", kits / SITE_1, kits / SITE_2) == 0
    assert tree(kits) == before
    assert shared.exists() == there
    assert not there or shared.read_text() == '{"a": 1}\n'


def test_the_newest_kits_of_a_workspace_count(made, tmp_path):
    folder = Path(shutil.copytree(made / "provisioned", tmp_path / "workspace"))
    older = folder / "project/prod_00"
    shutil.copytree(older, older.with_name("prod_01"))
    before = tree(older)
    assert run("enable", folder) == 0
    assert tree(older) == before
    assert config(older.with_name("prod_01") / SITE_1)


def test_a_scheme_that_stays_flares_is_told(provisioned, capsys):
    assert run("enable", provisioned / SITE_1, "--upgrade-driver") == 0
    assert "it speaks http with the server, which stays FLARE's" in capsys.readouterr().out


def test_in_images_the_folder_of_the_driver_has_to_be_told(provisioned, capsys):
    kit = prepared(provisioned / SERVER, DOCKER)
    before = tree(kit)
    assert run("enable", kit, "--upgrade-driver") == 1
    assert "--driver-path" in capsys.readouterr().err
    assert tree(kit) == before
    assert run("enable", kit, "--data-port", "8004") == 0
    assert "comm_driver_path" not in config(kit)
    assert config(kit)["internal"]["resources"]["host"] == "0.0.0.0"
    assert "has to publish port 8004" in capsys.readouterr().out
    assert run("enable", kit, "--upgrade-driver", "--driver-path", "/opt/x/nvflare_rdma/plugin") == 0
    assert config(kit)["comm_driver_path"] == "/opt/x/nvflare_rdma/plugin"
    assert run("status", kit) == 0  # that there is no such folder here says nothing


# -- disable -----------------------------------------------------------------------------------------------


def test_disable_takes_everything_out_again(workspace, kits, capsys):
    change(kits / SERVER / "local/comm_config.json", rdma_patience="1h", other={"kept": True})
    before = tree(workspace)
    assert run("enable", workspace, "--patience", "2h") == 0
    assert run("enable", workspace, *ALL) == 0
    assert tree(workspace) != before
    assert run("disable", workspace) == 0
    assert tree(workspace) == before
    capsys.readouterr()
    assert run("disable", workspace) == 0
    assert capsys.readouterr().out.count("nothing to do") == 3


def test_disable_keeps_what_the_operator_has_changed_since(kits, capsys):
    local = kits / SERVER / "local"
    change(local / "comm_config.json", rdma_fabrics="tcp")
    assert run("enable", kits / SERVER, *ALL) == 0
    path = f"{driver_path()}:/opt/own"
    change(local / "comm_config.json", rdma_rails=4, rdma_patience="6h", comm_driver_path=path)
    resources = json.loads((local / "resources.json").read_text())
    own = {"id": "own", "path": "own.Component", "args": {}}
    listed = [*resources["class_allow_list"], "own.classes"]
    change(local / "resources.json", components=[*resources["components"], own], class_allow_list=listed)
    capsys.readouterr()
    assert run("disable", kits / SERVER) == 0
    out = capsys.readouterr().out
    assert config(kits / SERVER) == {
        "rdma_fabrics": "tcp",
        "rdma_rails": 4,
        "rdma_patience": "6h",
        "comm_driver_path": "/opt/own",
    }
    assert "rdma_patience stays '6h', as it has been changed since" in out
    after = json.loads((local / "resources.json").read_text())
    original = json.loads((local / f"resources.json{BACKUP}").read_text())
    assert after["class_allow_list"] == [*original["class_allow_list"], "own.classes"]
    assert after["components"] == [*original["components"], own]
    assert not (local / RECORD).exists()


def test_the_first_original_is_never_overwritten(kits):
    local = kits / SITE_1 / "local"
    original = change(local / "comm_config.json", max_message_size=1)
    assert run("enable", kits / SITE_1, "--patience", "1h") == 0
    change(local / "comm_config.json", max_message_size=2)
    assert run("enable", kits / SITE_1, "--patience", "2h") == 0
    assert (local / f"comm_config.json{BACKUP}").read_bytes() == original
    assert run("disable", kits / SITE_1) == 0
    assert config(kits / SITE_1) == {"max_message_size": 2}  # the original is not what was there before
    assert (local / f"comm_config.json{BACKUP}").read_bytes() == original
    assert run("enable", kits / SITE_1, "--patience", "3h") == 0
    assert (local / f"comm_config.json{BACKUP}").read_bytes() == original
    assert run("disable", kits / SITE_1) == 0
    assert config(kits / SITE_1) == {"max_message_size": 2}


def test_a_list_of_classes_that_was_made_is_taken_out_whole(kits):
    """FLARE's standard list holds where there is none."""
    file = kits / SITE_1 / "local/resources.json.default"
    content = json.loads(file.read_text())
    del content["class_allow_list"]
    file.write_text(json.dumps(content))
    assert run("enable", kits / SITE_1) == 0
    assert class_list.read(kits / SITE_1).missing == []
    change(file, own=True)
    assert run("disable", kits / SITE_1) == 0
    assert json.loads(file.read_text()) == {**content, "own": True}


def test_an_enabled_kit_that_was_prepared_for_docker_can_be_disabled(provisioned):
    """FLARE copies the kit with all that is in it, and writes its files anew."""
    resources = json.loads((prepared(provisioned / SERVER, DOCKER) / "local/resources.json.default").read_text())
    assert run("enable", provisioned / SERVER, "--data-port", "8004") == 0
    kit = prepared(provisioned / SERVER, DOCKER)
    assert has_door(kit / "local/resources.json.default")
    assert run("disable", kit) == 0
    assert json.loads((kit / "local/resources.json.default").read_text()) == resources
    assert config(kit).keys() == {"internal"}
