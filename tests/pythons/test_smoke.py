"""How the smoke test finds interpreters and modules. What it does with them takes minutes: `make test-pythons`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
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


def test_every_module_is_imported_and_what_is_wrong_is_named(tmp_path):
    """In an interpreter without packages, so that torch is wanted."""
    package = tmp_path / "nvflare_rdma"
    sources = {
        **{"__init__": "", "good": "", "on_torch": "import torch", "broken": "import nowhere", "old": "x = '\\d'"},
        **{"within/__init__": "", "within/deep": "1 / 0", "within/__main__": "1 / 0"},
        **{"fails/__init__": "1 / 0", "fails/below": ""},
        "plugin/rdma_driver": "1 / 0",
    }
    for name, source in sources.items():
        path = package / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    done = subprocess.run(
        [sys.executable, "-S", smoke.MODULES],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["imported"] == 4  # the package, good, old, within
    assert found["wanting"] == {"torch": ["on_torch.py"]}
    assert {name: why.split(":")[0] for name, why in found["failed"].items()} == {
        "broken.py": "No module named 'nowhere'",
        "within/deep.py": "ZeroDivisionError",
        "fails/__init__.py": "ZeroDivisionError",
        "fails/below.py": "ZeroDivisionError",
        "plugin/rdma_driver.py": "ZeroDivisionError",
        "trainer_plugin/nvflare_rdma_trainer.py": "it is not there",
    }
    (warned,) = found["warned"]
    assert warned.startswith(f"{package / 'old.py'}:1: ")
