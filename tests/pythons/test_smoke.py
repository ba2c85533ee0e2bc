"""How the smoke test finds interpreters. What it does with them takes minutes: `make test-pythons`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("pythons_smoke", Path(__file__).with_name("smoke.py"))
smoke = sys.modules["pythons_smoke"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(smoke)
HERE = "{}.{}".format(*sys.version_info)


@pytest.fixture
def only_pyenv(tmp_path, monkeypatch):
    """No interpreter is in PATH, and pyenv keeps two patch releases of this version, of which one is broken."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    for patch, target in (("2", sys.executable), ("10", "/bin/false")):
        folder = tmp_path / "versions" / f"{HERE}.{patch}" / "bin"
        folder.mkdir(parents=True)
        (folder / "python").symlink_to(target)
    return tmp_path


def test_a_path_a_command_or_a_version_is_an_interpreter(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    found = smoke.find_interpreters(f"{sys.executable} {Path(sys.executable).name}")
    assert [each.version for each in found] == [HERE, HERE]


def test_the_newest_of_pyenv_that_works_is_taken(only_pyenv):
    (found,) = smoke.find_interpreters(HERE)
    assert found == smoke.Interpreter(HERE, str(only_pyenv / "versions" / f"{HERE}.2" / "bin" / "python"))


def test_what_is_not_asked_for_may_be_missing(only_pyenv, capsys):
    found = smoke.find_interpreters("")
    assert [each.version for each in found] == [version for version in smoke.SUPPORTED if version == HERE]
    said = capsys.readouterr().out
    assert said.count("not on this machine") == len(smoke.SUPPORTED) - len(found)


def test_what_is_asked_for_may_not(only_pyenv):
    with pytest.raises(smoke.StepFailedError, match=r"no usable 3\.99 here"):
        smoke.find_interpreters("3.99")
