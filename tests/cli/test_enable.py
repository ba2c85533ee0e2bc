"""`nvflare-rdma enable`, `disable` and `status` on kits that FLARE's own provisioning has made."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nvflare_rdma import class_list
from nvflare_rdma.cli import driver_path, main
from nvflare_rdma.cli.doctor import read_settings
from nvflare_rdma.kits import BACKUP, RECORD
from nvflare_rdma.settings import Settings
from tests.support.kits import CERT, SIGNATURE, WORKSPACE, poc, prepared, provision, static_file, tree

ALL = [
    "--fabrics",
    "shm,tcp",
    "--memory-budget",
    "256MiB",
    "--data-port",
    "20000-20010",
    "--patience",
    "4h",
    "--upgrade-driver",
]
DOCKER = {"runtime": "docker", "parent": {"docker_image": "image:1"}}
SERVER, SITE_1, SITE_2 = "server", "site-1", "site-2"


@pytest.fixture(scope="module")
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


@pytest.fixture(autouse=True)
def own_configuration(monkeypatch):
    for name in [name for name in os.environ if name.startswith("NVFLARE_")]:
        monkeypatch.delenv(name)
    yield
    from nvflare.fuel.f3.comm_config import CommConfigurator
    from nvflare.fuel.utils.config_service import ConfigService

    ConfigService.reset()
    CommConfigurator.reset()


def run(*arguments) -> int:
    return main([str(each) for each in arguments])


def config(kit: Path) -> dict:
    return json.loads((kit / "local/comm_config.json").read_text())


def change(file: Path, **values) -> bytes:
    """Have the operator set something; returns what the file then has."""
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **values}, indent=2))
    return file.read_bytes()


def has_door(file: Path) -> bool:
    return "nvflare_rdma.streaming.ParentDoor" in [each["path"] for each in json.loads(file.read_text())["components"]]


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


# -- bad input ---------------------------------------------------------------------------------------------


def no_local(kits):
    shutil.rmtree(kits / SITE_2 / "local")


def no_startup(kits):
    shutil.rmtree(kits / SITE_2 / "startup")


def no_role(kits):
    (kits / SITE_2 / "startup/fed_client.json").unlink()


def no_resources(kits):
    (kits / SITE_2 / "local/resources.json.default").unlink()


def startup_no_json(kits):
    (kits / SITE_2 / "startup/fed_client.json").write_text("[]")


def config_no_json(kits):
    (kits / SITE_2 / "local/comm_config.json").write_text('{\n  "rdma_rails": 4,\n}')


def config_no_object(kits):
    (kits / SITE_2 / "local/comm_config.json").write_text("[1]")


def config_no_text(kits):
    (kits / SITE_2 / "local/comm_config.json").write_bytes(b'{"\xff": 1}')


def config_bad_setting(kits):
    change(kits / SITE_2 / "local/comm_config.json", rdma_rails=4000)


def config_unknown_setting(kits):
    change(kits / SITE_2 / "local/comm_config.json", rdma_rail=4)


def config_other_format(kits):
    (kits / SITE_2 / "local/comm_config.conf").write_text("a = 1")


def config_elsewhere(kits):
    change(kits / SITE_2 / "comm_config.json", rdma_rails=4)


def classes_no_list(kits):
    change(kits / SITE_2 / "local/resources.json.default", class_allow_list="*")


def classes_null(kits):
    change(kits / SITE_2 / "local/resources.json.default", class_allow_list=None)


def components_no_list(kits):
    change(kits / SITE_2 / "local/resources.json.default", components={})


def record_no_json(kits):
    (kits / SITE_2 / "local" / RECORD).write_text("{")


def record_of_the_future(kits):
    change(kits / SITE_2 / "local" / RECORD, version=2)


def config_is_a_folder(kits):
    (kits / SITE_2 / "local/comm_config.json").mkdir()


@pytest.mark.parametrize(
    ("breaks", "code", "says"),
    [
        (no_local, "HALF_A_KIT", "site-2 is half a start-up kit: it has startup and no local"),
        (no_startup, "HALF_A_KIT", "site-2 is half a start-up kit: it has local and no startup"),
        (no_role, "HALF_A_KIT", "site-2/startup is no start-up kit's: it has none of fed_server.json"),
        (no_resources, "HALF_A_KIT", "site-2/local has neither resources.json nor resources.json.default"),
        (startup_no_json, "HALF_A_KIT", "fed_client.json is not as FLARE has it"),
        (config_no_json, "BAD_JSON", "site-2/local/comm_config.json is no JSON: "),
        (config_no_object, "BAD_JSON", "comm_config.json has no JSON object, but a list"),
        (config_no_text, "BAD_JSON", "comm_config.json is no JSON: "),
        (config_bad_setting, "INVALID_SETTING", "comm_config.json: rdma_rails=4000 is out of range. Allowed: 1 to 64"),
        (config_unknown_setting, "INVALID_SETTING", "comm_config.json: unknown setting 'rdma_rail'"),
        (config_other_format, "OTHER_FILE", "comm_config.conf is in a format that can't be edited here"),
        (config_elsewhere, "OTHER_FILE", "FLARE reads {0}/site-2/comm_config.json before"),
        (classes_no_list, "BAD_JSON", "class_allow_list is a str, and FLARE wants a list"),
        (classes_null, "BAD_JSON", "class_allow_list is a NoneType, and FLARE wants a list"),
        (components_no_list, "BAD_JSON", "components is no list of objects"),
        (record_no_json, "BAD_JSON", "rdma_enabled.json is no JSON: "),
        (record_of_the_future, "BAD_RECORD", "version 2 is not known"),
        (config_is_a_folder, "NO_ACCESS", "comm_config.json can't be read: Is a directory"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_kit_that_is_broken_is_told_and_no_other_is_changed(workspace, kits, capsys, breaks, code, says):
    breaks(kits)
    before = tree(workspace)
    assert run("enable", workspace, *ALL) == 1
    out, err = capsys.readouterr()
    assert out == ""
    message, hint, last = err.splitlines()
    assert message.startswith("nvflare-rdma enable: ")
    assert says.format(kits) in message
    assert hint.startswith("Hint: ")
    assert last == f"Code: {code} (exit 1)"
    assert tree(workspace) == before


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--fabrics", "pigeon", "fabrics='pigeon': rdma_fabrics='pigeon': unknown fabric 'pigeon'"),
        ("--memory-budget", "lots", "memory_budget='lots': bytes are expected, or a text such as 512MiB"),
        ("--memory-budget", "1KiB", "rdma_memory_budget_bytes=1024 is out of range"),
        ("--data-port", "99999", "rdma_data_ports='99999' is no port"),
        ("--data-port", "none", "data_port='none': a port (8004) or a range (8004-8010) is expected"),
        ("--data-port", "8002", "data_port='8002': {} has that port for FLARE's own connections"),
        ("--patience", "9x", "rdma_patience='9x' is no time"),
        ("--driver-path", "plugin", "driver_path='plugin': an absolute path is expected"),
    ],
)
def test_a_bad_value_is_told_and_nothing_is_changed(workspace, capsys, option, value, says):
    before = tree(workspace)
    assert run("enable", workspace, option, value, "--format", "json") == 1
    out, err = capsys.readouterr()
    envelope = json.loads(out)
    assert (envelope["error_code"], err) == ("INVALID_VALUE", "")
    assert says.format(workspace / "example_project/prod_00/server") in envelope["message"]
    assert envelope["hint"]
    assert tree(workspace) == before


@pytest.mark.parametrize(
    ("command", "target", "code", "says"),
    [
        ("enable", "nowhere", "NO_SUCH_TARGET", "nowhere does not exist"),
        ("disable", "file", "NO_KIT", "file is a file and no folder"),
        ("status", "empty", "NO_KIT", "empty has no start-up kits"),
        ("enable", "two", "NO_KIT", "two has kits of several projects: "),
    ],
)
def test_a_target_that_is_none_is_told(tmp_path, capsys, command, target, code, says):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for project in ("a", "b"):
        (tmp_path / "two" / project / "prod_00").mkdir(parents=True)
    assert run(command, tmp_path / target) == 1
    err = capsys.readouterr().err
    assert says in err
    assert f"Code: {code} (exit 1)" in err


def test_a_signed_kit_is_left_alone(made, provisioned, capsys):
    """FLARE signs `local` where sites encrypt homomorphically; a file more breaks the signature, too."""
    from nvflare.lighter.utils import load_private_key, sign_folders, verify_folder_signature

    state = json.loads((made / "provisioned/project/state/cert.json").read_text())
    key = load_private_key(state["root_pri_key"])
    local = provisioned / SITE_2 / "local"
    sign_folders(str(local), key, signature_file="signature.json")
    before = tree(provisioned)
    assert run("enable", provisioned) == 1
    err = capsys.readouterr().err
    assert f"{local} is signed by {local / 'signature.json'}" in err
    assert "Code: SIGNED_KIT" in err
    assert tree(provisioned) == before
    root = str(provisioned / SITE_2 / "startup/rootCA.pem")

    def verified() -> bool:
        return verify_folder_signature(str(local), root, single_signer=True, signature_file="signature.json")

    assert verified()
    (local / RECORD).touch()
    assert not verified()


# -- writing -----------------------------------------------------------------------------------------------

NOBODY = 65534
AS_NOBODY = f"""
import contextlib, io, os, sys
from nvflare_rdma.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main([*sys.argv[1:], "--dry-run"])  # while it may, let it import what it will
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def kit_of_root(kits):
    """A kit where another user may look."""
    if os.geteuid() != 0:
        pytest.skip("to run as another user takes root")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        kit = Path(shutil.copytree(kits / SERVER, Path(folder) / SERVER))
        change(kit / "local/comm_config.json", rdma_rails=4)
        yield kit


def as_nobody(*arguments):
    command = [sys.executable, "-c", AS_NOBODY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_who_may_not_write_is_told_and_nothing_is_changed(kit_of_root):
    before = tree(kit_of_root)
    done = as_nobody("enable", kit_of_root, *ALL)
    assert (done.returncode, done.stdout) == (1, "")
    assert "can't be written: Permission denied, and nothing was changed" in done.stderr
    assert "Code: CANT_WRITE" in done.stderr
    (kit_of_root / "local/comm_config.json").chmod(0o600)
    done = as_nobody("enable", kit_of_root)
    assert "local/comm_config.json can't be read: Permission denied" in done.stderr
    (kit_of_root / "local").chmod(0o700)
    done = as_nobody("enable", kit_of_root)
    assert "can't be read: Permission denied" in done.stderr
    assert "Code: NO_ACCESS" in done.stderr
    assert {name: data for name, (_, data) in tree(kit_of_root).items()} == {
        name: data for name, (_, data) in before.items()
    }


def test_what_was_written_before_one_file_fails_is_put_back(kit_of_root):
    """In a sticky folder nobody replaces a file of somebody else's, though he may put files beside it."""
    local = kit_of_root / "local"
    local.chmod(0o1777)
    os.chown(local / "comm_config.json", NOBODY, NOBODY)
    before = tree(kit_of_root)
    done = as_nobody("enable", kit_of_root, *ALL)
    assert done.returncode == 1
    assert (
        f"{local / 'resources.json'} can't be written: Operation not permitted, and nothing was changed" in done.stderr
    )
    assert tree(kit_of_root) == before
    assert sorted(path.name for path in local.iterdir()) == sorted(
        name.removeprefix("local/") for name in before if name.startswith("local/")
    )
    assert as_nobody("enable", kit_of_root, "--dry-run", *ALL).returncode == 0
    assert (local / "comm_config.json").stat().st_uid == NOBODY


def test_what_root_changes_stays_its_owners(kit_of_root):
    for path in (kit_of_root, *kit_of_root.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    assert run("enable", kit_of_root, *ALL) == 0
    assert {path.stat().st_uid for path in kit_of_root.rglob("*")} == {NOBODY}


# -- status ------------------------------------------------------------------------------------------------


def test_status_says_what_is_set_where_and_by_whom(workspace, kits, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("enable", kits / SERVER, *ALL) == 0
    change(kits / SITE_2 / "local/comm_config.json", rdma_rails=4)
    capsys.readouterr()
    assert run("status", workspace) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines()), out
    for word in (
        "memory_budget_bytes=268435456",
        "patience=4h",
        "enable",
        "hand",
        "defaults",
        "allowed",
        "refused",
    ):
        assert word in out, out
    assert run("status", workspace, "--format", "json") == 0
    sites = {each["site"]: each for each in json.loads(capsys.readouterr().out)["data"]["sites"]}
    assert {name for name, each in sites.items() if each["role"] != "admin"} == {SERVER, SITE_1, SITE_2}
    server = sites[SERVER]
    assert server["settings"] == {
        "rdma_fabrics": "shm,tcp",
        "rdma_memory_budget_bytes": 256 << 20,
        "rdma_patience": "4h",
        "rdma_upgrade": True,
        "rdma_data_ports": "20000-20010",
    }
    assert (server["enabled"], server["driver"], server["parent_door"], server["classes_missing"]) == (
        True,
        True,
        True,
        [],
    )
    assert (sites[SITE_2]["enabled"], sites[SITE_2]["settings"]) == (False, {"rdma_rails": 4})
    assert sites[SITE_1]["classes_missing"] == list(class_list.ENTRIES)
    assert all(each["problems"] == [] for each in sites.values())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rdma_rails": 400}, "rdma_rails=400 is out of range"),
        ({"rdma_upgrade": True}, "rdma_upgrade does nothing, as comm_driver_path has no folder of the driver"),
        ({"comm_driver_path": "/gone/nvflare_rdma/plugin"}, "names /gone/nvflare_rdma/plugin, which has no driver"),
    ],
)
def test_status_finds_what_would_not_work(kits, capsys, values, says):
    change(kits / SITE_1 / "local/comm_config.json", **values)
    assert run("status", kits / SITE_1) == 1
    assert says in capsys.readouterr().out


def test_status_of_a_kit_that_cannot_be_read_tells_the_rest(kits, capsys):
    (kits / SITE_1 / "local/comm_config.json").write_text("{")
    assert run("status", kits, "--format", "json") == 1
    envelope = json.loads(capsys.readouterr().out)
    problems = {each["site"]: each["problems"] for each in envelope["data"]["sites"]}
    assert "is no JSON" in problems.pop(SITE_1)[0]
    assert not any(problems.values())
