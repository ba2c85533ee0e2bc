from __future__ import annotations

import errno
import json
import os

import pytest

from nvflare_rdma.cli import main


def test_driver_path_prints_a_folder_with_one_plugin(capsys):
    assert main(["driver-path"]) == 0
    folder = capsys.readouterr().out.strip()
    assert [name for name in os.listdir(folder) if name.endswith(".py")] == ["rdma_driver.py"]


def test_doctor_prints_every_fabric_with_its_reason(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for fabric in ("verbs", "shm", "tcp"):
        assert f"\n{fabric} " in out


def test_an_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_programs_get_one_envelope(capsys):
    assert main(["driver-path", "--format", "json"]) == 0
    envelope = json.loads(capsys.readouterr().out)
    assert envelope["data"].keys() == {"driver_path"}
    assert {key: envelope[key] for key in ("schema_version", "status", "exit_code")} == {
        "schema_version": "1",
        "status": "ok",
        "exit_code": 0,
    }
    assert main(["driver-path", "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out) == {"event": "terminal", "terminal": True, **envelope}


def test_an_error_is_one_line_with_its_code_and_for_programs_an_envelope(capsys, tmp_path):
    command = ["policy", str(tmp_path / "none.json"), "model.json"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nvflare-rdma policy: ")
    assert "none.json can't be read as JSON" in err
    assert err.endswith("Code: INVALID_INPUT (exit 1)\n")
    assert main([*command, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    envelope = json.loads(out)
    assert (envelope["status"], envelope["exit_code"], envelope["error_code"]) == ("error", 1, "INVALID_INPUT")
    assert envelope["recovery_category"] == "FIXABLE_BY_CONFIG"
    assert "none.json can't be read" in envelope["message"]


def test_an_installation_that_is_not_whole_is_told(capsys, monkeypatch):
    monkeypatch.setattr("nvflare_rdma.cli.driver_path", lambda: "/nowhere")
    assert main(["driver-path"]) == 1
    assert "/nowhere has no rdma_driver.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "says", "hint"),
    [
        (errno.ENOSPC, "No space left on device", "make room on the disk"),
        (errno.EMFILE, "Too many open files", "ulimit -n"),
        (errno.EACCES, "Permission denied", "run this as whoever owns it"),
        (errno.EPIPE, "Broken pipe", "try again"),
    ],
)
def test_what_the_system_refuses_is_told_with_what_to_do_about_it(capsys, monkeypatch, number, says, hint):
    def refused():
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("nvflare_rdma.cli.driver_path", refused)
    assert main(["driver-path"]) == 1
    _, told, advice, _ = "\n".join(["", *capsys.readouterr().err.splitlines()]).split("\n")
    assert says in told
    assert hint in advice


COMMANDS = ["driver-path", "doctor", "bench", "policy", "plan", "report", "enable", "disable", "status"]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_takes_is_told_even_if_it_is_missing(command, capsys):
    assert main([command, "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["command"] == f"nvflare-rdma {command}"
    assert "--format" in [argument["name"] for argument in schema["args"]]
