"""What `jobs/tour.py` does around FLARE's commands. The tour itself takes minutes: `make tour`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import tour
from tour import StepFailedError, Tour, data_of, main, project

from tests.support.processes import ROOT
from tests.support.waiting import eventually


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_is_shown_with_its_seconds_and_its_output_is_given(tmp_path, capsys):
    said = Tour(tmp_path).run(*python("print('data'); import sys; print('talk', file=sys.stderr)"))
    assert said == "data\n"
    command, seconds = capsys.readouterr().out.splitlines()
    assert command.startswith(f"$ {os.path.basename(sys.executable)} -c")
    assert seconds.endswith(" s")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (python("import sys; print('out'); sys.exit('why')"), ["ended with 1", "    out\n", "    why"]),
        (python("import time; print('begun', flush=True); time.sleep(60)"), ["was not done in 5 s", "begun"]),
        (["/no/such/program"], ["/no/such/program can't be run: No such file"]),
    ],
    ids=["fails", "hangs", "missing"],
)
def test_a_command_that_fails_is_told_with_the_end_of_what_it_said(tmp_path, command, says):
    with pytest.raises(StepFailedError) as failed:
        Tour(tmp_path).run(*command, seconds=5.0 if "sleep" in command[-1] else 60.0)
    assert all(each in f"{failed.value}\n" for each in says), failed.value


def test_what_commands_leave_running_is_ended_and_nothing_else_is(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        one = Tour(tmp_path)
        one.run(*python("import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"))
        eventually(lambda: len(one.processes()) == 1, 10.0)
        assert Tour(tmp_path / "another").end_processes() == []
        (left,) = one.end_processes()
        assert left != other.pid
        assert one.processes() == []
        assert other.poll() is None
        other.kill()


def test_settings_of_the_user_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("NVFLARE_RDMA_FABRICS", "verbs")
    said = Tour(tmp_path).run(*python("import os; print([name for name in os.environ if 'NVFLARE' in name])"))
    assert said == "['NVFLARE_POC_WORKSPACE']\n"


def test_what_flare_says_to_programs_is_read_behind_its_talk():
    assert data_of('talk\n{"status": "ok", "data": {"job_id": "1"}}\n', "nvflare") == {"job_id": "1"}
    for said in ("", "talk", "[1]", '{"status": "error"}'):
        with pytest.raises(StepFailedError, match="nvflare said nothing that can be understood"):
            data_of(said, "nvflare")


def test_a_step_that_fails_ends_the_tour_and_its_exit_status_says_so(tmp_path, monkeypatch, capsys):
    """What FLARE is to make has a participant of no known type."""
    wrong = project(8002)
    wrong["participants"][0]["type"] = "pigeon"
    monkeypatch.setattr(tour, "project", lambda port: wrong)
    folder = tmp_path / "tour"
    assert main(["--folder", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("make start-up kits")] == ["FAILED"]
    assert "put this package's settings" not in out
    assert "The tour failed: nvflare poc prepare" in err
    assert f"0 processes were ended. Logs are in {folder}" in err
    shutil.rmtree(folder)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as ended:
        main(["--folder", str(tmp_path)])
    assert ended.value.code == 2
    assert "not empty: name another one" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_the_tour_runs_the_commands_of_the_quick_start():
    page = (ROOT / "docs/quickstart.md").read_text().partition("## A server and its sites")[2]
    commands = re.findall(r"^(nvflare|nvflare-rdma) (\w+) (\w+)?", page, re.MULTILINE)
    assert len(commands) > 6
    run = (ROOT / "jobs/tour.py").read_text()
    for program, first, second in commands:
        words = f'"{first}", "{second}"' if program == "nvflare" else f'"{first}", "poc"'
        assert words in run, (program, first, second)
