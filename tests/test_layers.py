"""Imports go downward only (see docs/design.md), and the protocol does no I/O."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "nvflare_rdma"

# Layer -> what it may import of this package besides itself and errors.py.
ALLOWED = {
    "fabric": set(),
    "channel": {"fabric"},
    "codecs": set(),
    "transfer": {"channel", "codecs", "fabric", "runtime"},
    "streaming": {
        *("transfer", "channel", "codecs", "fabric", "filters"),
        *("metrics", "runtime", "settings", "flare_compat"),
    },
    "filters": {"codecs", "flare_compat"},
    "driver": {"channel", "fabric", "runtime", "settings", "flare_compat"},
    "plugin": {"driver"},
    "metrics": {"transfer", "flare_compat"},
    "cli": {"codecs", "fabric", "filters", "flare_compat", "runtime", "settings"},
}
NO_FLARE_OR_TORCH = ("fabric", "channel")
NO_FLARE = ("codecs", "transfer")
#: Folders whose code does no I/O, and modules beside them that it imports.
NO_IO = ("channel/protocol", "channel/controllers", "channel/bodies.py")
IO_MODULES = {"socket", "threading", "select", "selectors", "ssl", "queue", "time", "asyncio", "subprocess"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    parts = {name.split(".")[1] for name in names if name.startswith("nvflare_rdma.")}
    return parts - {"errors", "version"}


@pytest.mark.parametrize("layer", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()))
def test_a_layer_imports_only_what_is_below_it(layer):
    assert layer in ALLOWED, f"say in ALLOWED what the new layer {layer!r} may import"
    for path in (PACKAGE / layer).rglob("*.py"):
        above = own(imports(path)) - ALLOWED[layer] - {layer}
        assert not above, f"{path.name} imports {above}"


@pytest.mark.parametrize("layer", [*NO_FLARE_OR_TORCH, *NO_FLARE])
def test_low_layers_know_neither_flare_nor_torch(layer):
    for path in (PACKAGE / layer).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert "nvflare" not in roots, path
        if layer in NO_FLARE_OR_TORCH:
            assert "torch" not in roots, path


@pytest.mark.parametrize("place", NO_IO)
def test_the_protocol_and_its_controllers_do_no_io(place):
    found = PACKAGE / place
    for path in [found] if found.is_file() else sorted(found.rglob("*.py")):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & IO_MODULES, path


def test_the_driver_works_in_a_process_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['bitsandbytes'] = None\n"
        "from nvflare_rdma.driver import RdmaDriver\n"
        "assert RdmaDriver.supported_transports() == ['rdma', 'srdma']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=PACKAGE.parent)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, nvflare_rdma; assert not {'nvflare', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=PACKAGE.parent)


def test_no_module_is_over_600_lines():
    too_long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 600}
    assert not too_long
