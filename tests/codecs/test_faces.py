"""Other packages import codecs and filters from their faces, so that what lies behind them can move."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nvflare_rdma
from nvflare_rdma import codecs, filters

PACKAGE = Path(nvflare_rdma.__file__).parent
#: It imports torch, so it is imported where a torch tensor is at hand.
APART = {"nvflare_rdma.codecs.on_device"}


@pytest.mark.parametrize("face", ["codecs", "filters"])
def test_outsiders_import_faces_only(face):
    inside = f"nvflare_rdma.{face}."
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / face):
            continue
        modules = {n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
        behind = {module for module in modules - APART if module.startswith(inside)}
        assert not behind, f"{path.relative_to(PACKAGE)} imports {behind}"


@pytest.mark.parametrize("face", [codecs, filters])
def test_a_face_has_what_it_says(face):
    assert sorted(face.__all__) == sorted(set(face.__all__))
    for name in face.__all__:
        assert hasattr(face, name), name
