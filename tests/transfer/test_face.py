"""Other packages import what `transfer` and `transfer.files` hand on, and none of their modules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nvflare_rdma.transfer as transfer
import nvflare_rdma.transfer.files as files

PACKAGE = Path(transfer.__file__).parents[1]
FACES = {face.__name__: set(face.__all__) for face in (transfer, files)}


@pytest.mark.parametrize("face", [transfer, files])
def test_a_face_has_what_it_promises(face):
    order = sorted(set(face.__all__), key=lambda name: (not name.isupper(), not name[0].isupper(), name))  # as ruff's
    assert face.__all__ == order
    assert all(hasattr(face, name) for name in face.__all__)


def test_outsiders_import_the_faces_only():
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "transfer"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nvflare_rdma.transfer"):
                assert {alias.name for alias in node.names} <= FACES[node.module], path
