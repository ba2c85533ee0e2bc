"""What a wheel of the package holds: an editable install, as the Makefile makes, would not show what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_wheel_has_every_module_and_the_plugin(tmp_path):
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nvflare_rdma", tmp_path / "nvflare_rdma", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("nvflare_rdma/")}
    files = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "nvflare_rdma").rglob("*") if p.is_file()}
    assert inside == files
    assert "nvflare_rdma/plugin/rdma_driver.py" in inside
    assert "nvflare_rdma/trainer_plugin/nvflare_rdma_trainer.py" in inside
