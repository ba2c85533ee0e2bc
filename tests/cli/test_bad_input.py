"""What every command says of input that can't be right: one line with the thing and the reason, what to do about it, a
code for programs, exit code 1, and not a byte of what was named is changed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.kits import ALL, SERVER, SITE_1, change, run, tree
from tests.support.processes import SMALL, environment
from tests.support.recorded_jobs import RecordedJob

SITE = "a=100Mbit,10ms"
#: For each command that takes a kit, its arguments; `{}` is the kit.
WITH_KIT = {
    "enable": ["enable", "{}", *ALL],
    "disable": ["disable", "{}"],
    "status": ["status", "{}"],
    "doctor": ["doctor", "--kit", "{}"],
    "doctor --for": ["doctor", "--for", "docker", "--kit", "{}"],
    "doctor --peer": ["doctor", "--peer", "127.0.0.1:9", "--kit", "{}"],
    "doctor --listen": ["doctor", "--listen", "0", "--kit", "{}"],
}


def refused(capsys, *arguments) -> tuple[str, str, str]:
    """The code, the message and the hint of a command that can't do what it was asked for, as people and programs get
    them: the same, and one line each."""
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    message, *hint, last = err.splitlines()
    assert len(hint) <= 1
    assert run(*arguments, "--format", "json") == 1
    out, err = capsys.readouterr()
    assert err == ""
    told = json.loads(out)
    assert (told["schema_version"], told["status"], told["exit_code"]) == ("1", "error", 1)
    assert message == f"nvflare-rdma {arguments[0]}: {told['message']}"
    assert hint == ([f"Hint: {told['hint']}"] if told["hint"] else [])
    assert last == f"Code: {told['error_code']} (exit 1)"
    assert told["recovery_category"] in ("FIXABLE_BY_CONFIG", "ENVIRONMENT_FAILURE")
    return told["error_code"], told["message"], told["hint"]


# -- what is no kit, and half of one -----------------------------------------------------------------------


def nowhere(kits: Path) -> Path:
    return kits / "site-9"


def file(kits: Path) -> Path:
    (kits / "file").touch()
    return kits / "file"


def empty(kits: Path) -> Path:
    (kits / "empty").mkdir()
    return kits / "empty"


def no_local(kits: Path) -> Path:
    shutil.rmtree(kits / SITE_1 / "local")
    return kits / SITE_1


def no_startup(kits: Path) -> Path:
    shutil.rmtree(kits / SITE_1 / "startup")
    return kits / SITE_1


def no_role(kits: Path) -> Path:
    (kits / SITE_1 / "startup/fed_client.json").unlink()
    return kits / SITE_1


KIT = "name a POC workspace, a start-up kit"
WHOLE = "take the whole kit, as FLARE has made it"


@pytest.mark.parametrize("command", WITH_KIT.values(), ids=WITH_KIT)
@pytest.mark.parametrize(
    ("find", "code", "says", "fix"),
    [
        (nowhere, "NO_SUCH_TARGET", "site-9 does not exist", KIT),
        (file, "NO_KIT", "file is a file and no folder", KIT),
        (empty, "NO_KIT", "empty has no start-up kits", KIT),
        (no_local, "HALF_A_KIT", "site-1 is half a start-up kit: it has startup and no local", WHOLE),
        (no_startup, "HALF_A_KIT", "site-1 is half a start-up kit: it has local and no startup", WHOLE),
        (no_role, "HALF_A_KIT", "site-1/startup is no start-up kit's", WHOLE),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_no_whole_kit(kits, capsys, command, find, code, says, fix):
    named = find(kits)
    before = tree(kits)
    found, message, hint = refused(capsys, *(named if word == "{}" else word for word in command))
    assert (found, says in message, hint.startswith(fix)) == (code, True, True), message
    assert tree(kits) == before


# -- a configuration that can't be read --------------------------------------------------------------------


def spoilt(kits: Path) -> None:
    (kits / SITE_1 / "local/comm_config.json").write_text('{"rdma_rails": 4,\n}')


def unknown(kits: Path) -> None:
    change(kits / SITE_1 / "local/comm_config.json", rdma_rail=4)


@pytest.mark.parametrize("command", ["enable", "disable", "doctor --for", "doctor --peer", "doctor --listen"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [(spoilt, "comm_config.json is no JSON: "), (unknown, "unknown setting 'rdma_rail'")],
    ids=["no JSON", "unknown"],
)
def test_a_configuration_that_is_none_ends_a_command(kits, capsys, command, spoil, says):
    assert run("enable", kits) == 0
    capsys.readouterr()
    spoil(kits)
    before = tree(kits)
    if (command, spoil) == ("disable", unknown):
        return  # it takes out what was put in, whatever else there is
    named = kits if command in ("enable", "disable") else kits / SITE_1
    _, message, hint = refused(capsys, *(named if word == "{}" else word for word in WITH_KIT[command]))
    assert says in message
    assert str(kits / SITE_1 / "local/comm_config.json") in message
    assert "mend it" in hint
    assert tree(kits) == before


@pytest.mark.parametrize("command", ["status", "doctor"])
@pytest.mark.parametrize("spoil", [spoilt, unknown])
def test_a_configuration_that_is_none_is_among_what_a_command_finds(kits, capsys, command, spoil):
    spoil(kits)
    before = tree(kits)
    arguments = [kits / SITE_1 if word == "{}" else word for word in WITH_KIT[command]]
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert ("is no JSON: " if spoil is spoilt else "unknown setting 'rdma_rail'") in " ".join(out.split())
    assert run(*arguments, "--format", "json") == 1
    out, err = capsys.readouterr()
    assert (err, json.loads(out)["status"], json.loads(out)["exit_code"]) == ("", "ok", 1)
    assert tree(kits) == before


# -- certificates ------------------------------------------------------------------------------------------


def expired(kit: Path, folder: Path) -> None:
    for key, path in Authority(folder / "pki").issue("client", kit.name, age=400).items():
        shutil.copy(path, kit / "startup" / ("rootCA.pem" if key == "ca_cert" else Path(path).name))


def test_the_doctor_tells_until_when_a_certificate_is_valid(kits, capsys):
    run("doctor", "--kit", kits / SITE_1)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "certificate  " in line)
    until = datetime.now(UTC) + timedelta(days=360)
    assert f"ok       certificate         of 'site-1', until {until:%Y}" in line


@pytest.mark.parametrize(
    ("spoil", "says", "fix"),
    [
        (expired, "the certificate of 'site-1', expired on 2", "issue a new one"),
        (lambda kit, _: (kit / "startup/client.crt").unlink(), "client.crt is not there", "take the kit as"),
        (lambda kit, _: (kit / "startup/client.key").write_text("x"), "can't be used", "take the kit as"),
    ],
    ids=["expired", "no certificate", "no key"],
)
def test_a_certificate_that_cannot_be_used(kits, tmp_path, capsys, spoil, says, fix):
    kit = kits / SITE_1
    spoil(kit, tmp_path)
    before = tree(kits)
    assert run("doctor", "--kit", kit, "--format", "json") == 1
    (check,) = (each for each in json.loads(capsys.readouterr().out)["data"]["checks"] if each["name"] == "certificate")
    assert check["verdict"] == "problem"
    assert says in check["value"]
    assert check["advice"].startswith(fix)
    for option in (["--peer", "127.0.0.1:9"], ["--listen", "0"]):
        _, message, hint = refused(capsys, "doctor", *option, "--kit", kit)
        assert (message, hint) == (check["value"], check["advice"])
    assert tree(kits) == before


# -- ports -------------------------------------------------------------------------------------------------


def test_a_port_in_use(kits, capsys):
    """`enable` sets it nevertheless: the kit may be for another host, and what uses the port may be its FLARE."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, message, hint = refused(capsys, "doctor", "--listen", f"127.0.0.1:{port}", "--kit", kits / SITE_1)
        assert (code, f"port {port} is in use by python" in message) == ("PORT_IN_USE", True)
        assert "name another port" in hint
        assert run("enable", kits, "--data-port", f"{port}-{port}") == 0
        (said,) = (line for line in capsys.readouterr().out.splitlines() if "in use" in line)
        assert said.startswith(f"server: port {port} is in use on this host, by python")
        assert "name another --data-port" in said
        assert run("doctor", "--kit", kits / SERVER) == 1
        assert f"data ports          {port}: in use by python" in capsys.readouterr().out
    assert run("enable", kits, "--data-port", port) == 0
    assert "in use" not in capsys.readouterr().out


# -- report, policy and plan -------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Files by the names that the cases below use; those that start with "bad" are none."""
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "job/server/simulate_job", "cut/server/simulate_job/nvflare_rdma"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "cut/server/simulate_job/nvflare_rdma/transfers.jsonl").write_text('{"round": 0, "ti')
    with RecordedJob({"server": tmp_path / "good/server/simulate_job"}) as job:
        job.write("server", "sent", "site-1")
    files = {
        "model.json": '{"weight": {"dtype": "float32", "shape": [64, 64]}}',
        "policy.json": '{"quantization_type": "normfloat4"}',
        "bad.json": "{",
        "bad_list.json": "[1]",
        "bad_entry.json": '{"weight": 1}',
        "bad_shape.json": '{"weight": {"dtype": "float32"}}',
        "bad.safetensors": "no header, but a text",
        "bad.pt": "no pickle",
        "bad_policy.json": '{"a": 1}',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    return tmp_path


FORMATS = "Name a .safetensors file, a torch state dict, or a .json of dtype and shape"
ENTRIES = 'entries such as {"layer.weight": {"dtype": "float32", "shape": [768, 768]}} are expected'
MODELS = [
    ("nowhere.json", "there is no model file nowhere.json: it does not exist", FORMATS),
    ("empty", "there is no model file empty: it is a folder", FORMATS),
    ("bad.json", "bad.json is no JSON: ", "Correct it"),
    ("bad_list.json", "bad_list.json has a list, and no model", ENTRIES),
    ("bad_entry.json", "'weight' is 1, and no tensor", ENTRIES),
    ("bad_shape.json", "and no tensor", ENTRIES),
    ("bad.safetensors", "bad.safetensors can't be read as a model: ", FORMATS),
    ("bad.pt", "bad.pt is no file that torch.save writes", FORMATS),
]
OTHERS: list[tuple[list[str], str, str, str]] = [
    (["report", "nowhere"], "NOT_FOUND", "nowhere does not exist", "name a workspace"),
    (["report", "model.json"], "NO_RECORDS", "model.json is a file and no folder", "name a workspace"),
    (["report", "empty"], "NO_RECORDS", "no nvflare_rdma/transfers.jsonl in empty", "add_transfer(recipe)"),
    (["report", "job"], "NO_RECORDS", "no nvflare_rdma/transfers.jsonl in job", "nvflare job download JOB_ID"),
    (["report", "cut"], "NO_RECORDS", "1 damaged lines in ", "look again later"),
    (["report", "good", "--job", "x"], "JOB_NOT_FOUND", "job 'x' is not there: simulate_job", "leave it out"),
    (["report", "good", "--output", "nowhere/page"], "NOT_WRITTEN", "nowhere/page: No such file", "--output"),
    (["policy", "nowhere.json", "model.json"], "INVALID_INPUT", "nowhere.json can't be read as JSON: No such file", ""),
    (["policy", "empty", "model.json"], "INVALID_INPUT", "give an exported job, its config file, or a small", ""),
    (["policy", "bad.json", "model.json"], "INVALID_INPUT", "bad.json is no JSON: ", ""),
    (
        ["policy", "bad_policy.json", "model.json"],
        "INVALID_INPUT",
        "has no ModelQuantizer and no quantization_type",
        "",
    ),
    (["plan", "model.json", "--site", SITE, "--policy", "empty"], "INVALID_INPUT", "give an exported job", ""),
    (["plan", "model.json", "--site", "a"], "INVALID_INPUT", "write it as hospital=100Mbit,40ms,0.1%", ""),
    (["doctor", "--peer", "127.0.0.1"], "INVALID_INPUT", "'127.0.0.1' is not HOST:PORT", "a port is a number"),
    (["doctor", "--listen", "70000"], "INVALID_INPUT", "'70000' is not [HOST:]PORT", "a port is a number"),
]
for name, says, fix in MODELS:
    for command in (["policy", "policy.json", name], ["plan", name, "--site", SITE]):
        OTHERS.append((command, "INVALID_INPUT", says, f"message: {fix}"))


@pytest.mark.parametrize(("command", "code", "says", "fix"), OTHERS, ids=[" ".join(each[0]) for each in OTHERS])
def test_what_is_no_job_no_policy_and_no_model(place, capsys, command, code, says, fix):
    before = tree(place)
    found, message, hint = refused(capsys, *command)
    assert (found, says in message) == (code, True), message
    assert (fix.removeprefix("message: ") in message) if fix.startswith("message: ") else (fix in hint), (message, hint)
    assert tree(place) == before


def test_a_torch_file_without_torch(place):
    code = "import sys; sys.modules['torch'] = None\nfrom nvflare_rdma.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "plan", str(place / "bad.pt"), "--site", SITE]
    done = subprocess.run(
        command, cwd=SMALL, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    message, last = done.stderr.splitlines()
    assert "bad.pt can't be read without torch" in message
    assert "pip install nvflare-rdma[torch]" in message
    assert (done.returncode, done.stdout, last) == (1, "", "Code: INVALID_INPUT (exit 1)")


# -- rights ------------------------------------------------------------------------------------------------

NOBODY = 65534
AS_NOBODY = f"""
import contextlib, io, json, os, sys
from nvflare_rdma.cli import main
commands, warm, told = json.loads(sys.argv[1]), json.loads(sys.argv[2]), []
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for command in warm:  # while it may, let it import what it will
        main(command)
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
for command in commands:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command)
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


@pytest.fixture
def apart():
    """A folder where another user may look."""
    if os.geteuid() != 0:
        pytest.skip("to run as another user takes root")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def locked(path: Path) -> Path:
    path.chmod(0o700 if path.is_dir() else 0o600)
    return path


def test_who_may_not_read_or_write_is_told(kits, place, apart):
    kit = Path(shutil.copytree(kits / SITE_1, apart / SITE_1))
    assert run("enable", kit) == 0
    hidden = Path(shutil.copytree(kits / SERVER, apart / SERVER))
    (hidden / "local").chmod(0o700)
    for name in ("model.json", "policy.json", "good", "bad.safetensors"):
        copy = shutil.copytree if (place / name).is_dir() else shutil.copy
        copy(place / name, apart / name)
    secret = [locked(apart / name) for name in ("good", "bad.safetensors", "policy.json")]
    (apart / "shown.json").write_text((place / "model.json").read_text())
    cases: list[tuple[list[object], str]] = [
        (["disable", kit], "can't be written: Permission denied, and nothing was changed"),
        (["enable", kit, "--patience", "4h"], "can't be written: Permission denied, and nothing was changed"),
        (["enable", hidden], f"{hidden}/local"),
        (["disable", hidden], f"{hidden}/local"),
        (["doctor", "--for", "docker", "--kit", hidden], f"{hidden}/local"),
        (["doctor", "--peer", "127.0.0.1:9", "--kit", kit], "client.key can't be read: Permission denied"),
        (["report", secret[0]], "can't read "),
        (["plan", secret[1], "--site", SITE], "bad.safetensors can't be used: Permission denied"),
        (["policy", secret[2], apart / "shown.json"], "policy.json can't be read as JSON: Permission denied"),
    ]
    locked(kit / "startup/client.key")
    before = tree(apart)
    commands = [[str(word) for word in command] for command, _ in cases]
    warm = [["plan", str(place / "bad.safetensors"), "--site", SITE], ["doctor", "--kit", str(kits / SITE_1)]]
    warm += [["policy", str(place / "policy.json"), str(place / "model.json")], ["report", str(place / "job")]]
    warm += [["enable", str(kits), "--dry-run"], ["doctor", "--peer", "127.0.0.1:9", "--kit", str(kits / SITE_1)]]
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, json.dumps(commands), json.dumps(warm)],
        cwd=SMALL,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (command, says), (code, out, err) in zip(cases, json.loads(done.stdout), strict=True):
        lines = err.splitlines()
        assert (code, out, len(lines) in (2, 3)) == (1, "", True), (command, out, err)
        assert says in lines[0], command
        assert lines[-1].startswith("Code: ")
    assert tree(apart) == before
