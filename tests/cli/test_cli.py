from __future__ import annotations

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
