"""What a wheel of the package holds: an editable install, as the Makefile makes, would not show what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(folder, kind):
    """What setuptools says while it makes a wheel of that kind in a copy of the project."""
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "nvflare_rdma", folder / "nvflare_rdma", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_wheel_has_every_module_and_the_plugin(tmp_path):
    build(tmp_path, "wheel")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("nvflare_rdma/")}
    files = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "nvflare_rdma").rglob("*") if p.is_file()}
    assert inside == files
    assert "nvflare_rdma/plugin/rdma_driver.py" in inside
    assert "nvflare_rdma/trainer_plugin/nvflare_rdma_trainer.py" in inside


def test_an_editable_install_is_a_path_and_nothing_is_warned_of(tmp_path):
    said = build(tmp_path, "editable")
    assert "Warning" not in said
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert archive.read(path).decode().split() == [str(tmp_path)]
