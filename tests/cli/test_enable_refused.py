"""What `nvflare-rdma enable` and `disable` refuse, and that nothing is half-edited then."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nvflare_rdma.kits import RECORD
from tests.support.kits import (
    ALL,
    CERT,
    SERVER,
    SIGNATURE,
    SITE_1,
    SITE_2,
    WORKSPACE,
    change,
    provision,
    run,
    static_file,
    tree,
)

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


def test_kits_that_share_a_file_are_told_where_it_would_not_be_the_same_for_all(kits, tmp_path, capsys):
    """The server gets ports, and the site none: whichever came last would have been there alone."""
    shared = tmp_path / "comm_config.json"
    shared.write_text('{"a": 1}\n')
    links = [kits / name / "local/comm_config.json" for name in (SERVER, SITE_1)]
    for link in links:
        link.symlink_to(shared)
    before = tree(kits)
    assert run("enable", kits / SERVER, kits / SITE_1, "--data-port", "8004") == 1
    err = capsys.readouterr().err
    assert f"{links[0]} and {links[1]} are one file by a link" in err
    assert "Code: SHARED_FILE (exit 1)" in err
    assert tree(kits) == before
    assert shared.read_text() == '{"a": 1}\n'
    assert sorted(path.name for path in tmp_path.glob("*comm_config*")) == ["comm_config.json"]


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
    ("scheme", "known", "options", "says", "hint"),
    [
        (
            "http",
            {},
            ["--upgrade-driver"],
            "for FLARE's own connections, over http",
            "--upgrade-driver, a server whose",
        ),
        ("tcp", {}, [], "for FLARE's own connections, over tcp", "with --upgrade-driver"),
        ("tcp", {"rdma_upgrade": "false"}, [], "for FLARE's own connections, over tcp", "with --upgrade-driver"),
        ("tcp", {"rdma_data_ports": "8004"}, ["--upgrade-driver"], "has '8004'", "nvflare-rdma disable"),
        ("tcp", {}, ["--data-port", "8002-8002"], "over tcp", "with --upgrade-driver"),
        ("tcp", {}, ["--upgrade-driver", "--data-port", "8000-8010"], "has 8002 for", "take a range without it"),
    ],
)
def test_flares_own_port_is_shared_where_the_driver_has_it(tmp_path, capsys, scheme, known, options, says, hint):
    kits = provision(tmp_path, [WORKSPACE, static_file(scheme), CERT, SIGNATURE])
    change(kits / SERVER / "local/comm_config.json", **known)
    before = tree(kits)
    assert run("enable", kits, "--data-port", "8002", *options) == 1
    message, advice, last = capsys.readouterr().err.splitlines()
    assert says in message
    assert hint in advice
    assert last == "Code: INVALID_VALUE (exit 1)"
    assert tree(kits) == before


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
