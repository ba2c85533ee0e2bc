from __future__ import annotations

import json
import subprocess
import sys

import job
import pytest
from progress import FOLDER_VARIABLE, ProgressView, append_progress


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rounds", "0"], "0 is less than 1"),
        (["--width", "100"], "100 is not a multiple of 64"),
        (["--driver", "ib"], "invalid choice: 'ib'"),
        (["--seed", "-1"], "-1 is less than 0"),
        (["--quantize", "none", "--delta"], "choose one with --quantize"),
        (["--rate", "nan"], "nan is no number above 0"),
        (["--start", "nowhere.pt"], "--start nowhere.pt is no file: give an earlier run's FL_global_model.pt"),
    ],
)
def test_bad_arguments_are_named(args, message, capsys):
    with pytest.raises(SystemExit):
        job.parse(args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("my runs", "has blanks, at which FLARE parts a script's arguments: move it"),
        ("work/stdlib_lm/server", "is in what this run replaces: copy it, or name another --workspace"),
    ],
)
def test_a_model_to_go_on_from_can_be_named_and_stays_where_it_is(folder, message, tmp_path, monkeypatch, capsys):
    where = tmp_path / folder
    where.mkdir(parents=True)
    (where / "FL_global_model.pt").write_bytes(b"")
    monkeypatch.chdir(where)
    with pytest.raises(SystemExit):
        job.parse(["--start", "FL_global_model.pt", "--workspace", str(tmp_path / "work")])
    assert message in capsys.readouterr().err


def test_a_failed_run_shows_its_log_and_last_errors(tmp_path, monkeypatch, capsys):
    def fail(args):
        (tmp_path / "console.log").write_text("starting\nERROR - the disk is full\n")
        raise RuntimeError("Simulation failed with return code 2")

    monkeypatch.setattr(job, "run", fail)
    assert job.main(["--workspace", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "return code 2" in shown
    assert str(tmp_path / "console.log") in shown
    assert "ERROR - the disk is full" in shown
    assert "starting" not in shown


def test_clearing_a_workspace_keeps_what_is_not_ours(tmp_path):
    (tmp_path / "progress").mkdir()
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("")
    job._clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_progress_is_shown_as_plain_lines_outside_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    with ProgressView(tmp_path, "none over tcp", total=2, clock=lambda: 0.0):
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
        append_progress(site="site-1", round=0, step=1, loss=3.0)
        append_progress(round=0, held_out_loss=2.5)
        with open(next(tmp_path.glob("*.jsonl")), "a") as half:
            half.write('{"round": 1, "held_')
    assert capsys.readouterr().out == "none over tcp: held-out loss 2.500 after round 1 (1 of 2 steps)\n"


def test_outside_a_terminal_there_is_a_line_every_few_seconds(tmp_path, monkeypatch, capsys):
    """The log grows between two looks, and time goes on; nothing here waits for a clock."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)

    def step(number):
        append_progress(site="site-1", round=0, step=number, loss=3.0)

    looks = iter(
        [
            (4.9, lambda: None),  # too early for a line
            (5.0, lambda: None),  # nothing has happened, which is a line, too
            (6.0, lambda: step(1)),
            (10.5, lambda: step(2)),
            (11.0, lambda: append_progress(round=0, held_out_loss=2.5)),  # at once
            (15.9, lambda: None),
            (16.0, lambda: None),
        ]
    )
    now = 0.0

    def wait(seconds):
        nonlocal now
        at, happens = next(looks, (now, None))
        now = at
        if happens:
            happens()
        return happens is None

    with ProgressView(tmp_path, "none over tcp", total=4, clock=lambda: now, wait=wait):
        pass
    assert capsys.readouterr().out.splitlines() == [
        "none over tcp: starting (0 of 4 steps, 5 s)",
        "none over tcp: round 1, training (2 of 4 steps, 10 s)",
        "none over tcp: held-out loss 2.500 after round 1 (2 of 4 steps)",
        "none over tcp: moving models (2 of 4 steps, 16 s)",
    ]


def test_no_progress_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    append_progress(round=0)
    assert list(tmp_path.iterdir()) == []


def test_export_writes_the_job_and_leaves_the_workspace_alone(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    command = [sys.executable, job.__file__, "--quantize", "none", "--workspace", str(tmp_path)]
    done = subprocess.run(
        [*command, "--export", "--export-dir", str(tmp_path / "out")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "stdlib_lm" / "meta.json").is_file()
    assert (tmp_path / "results.json").read_text() == "{}"


def test_the_exported_job_leaves_the_package_to_the_installation(tmp_path):
    args = job.parse(["--quantize", "none", "--width", "64", "--layers", "1", "--sites", "2"])
    job.build(args).export(str(tmp_path))
    custom = tmp_path / "stdlib_lm" / "app" / "custom"
    names = {p.name for p in custom.rglob("*.py")}
    assert {"client.py", "evaluate.py", "model.py", "progress.py", "stdlib_text.py", "training.py"} <= names
    assert not (custom / "nvflare_rdma").exists()
    server = json.loads((tmp_path / "stdlib_lm" / "app" / "config" / "config_fed_server.json").read_text())
    assert "traffic.recorder.TrafficRecorder" in {c["path"] for c in server["components"]}
