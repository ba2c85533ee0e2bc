"""Imports go downward only (see docs/design.md), and the protocol does no I/O."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "nvflare_rdma"

# Layer -> what it may import of this package besides itself, errors.py and logs.py.
ALLOWED = {
    "fabric": set(),
    "channel": {"fabric"},
    "codecs": set(),
    "accumulate": {"codecs", "disk"},
    "transfer": {"channel", "codecs", "disk", "durable", "fabric"},  # the last for types only
    "streaming": {
        *("accumulate", "transfer", "channel", "codecs", "fabric", "filters"),
        *("metrics", "runtime", "settings", "flare_compat", "timers"),
    },
    "filters": {"accumulate", "codecs", "flare_compat"},
    "driver": {"channel", "fabric", "runtime", "settings", "flare_compat"},
    "persistors": {"durable"},
    "plugin": {"driver", "runtime"},
    "metrics": {"transfer", "flare_compat"},
    "cli": {
        "channel",  # what `doctor --peer` and `--listen` check is what a job's links are
        "timers",  # what of FLARE's ends a transfer at a site before its patience does
        *("class_list", "codecs", "fabric", "filters", "flare_compat", "kits", "runtime", "settings"),
        *("metrics", "transfer"),  # the file of records, and what one is
    },
    "kits": {"class_list", "durable", "settings"},
}
NO_FLARE_OR_TORCH = ("fabric", "channel")
NO_FLARE = ("accumulate", "codecs", "transfer")
#: Folders whose code does no I/O.
NO_IO = ("channel/protocol", "channel/controllers")
#: Packages with an `__all__` whose modules others import all the same; each leaves this list when its face is done.
FACES_TO_COME: set[str] = set()
#: Who may look behind a face, and why.
BEHIND_FACES = {
    "benchmarks/state_dict.py": "installs the transfer without a FLARE job that has the component",
    "benchmarks/containers_files.py": "installs the transfer without a FLARE job that has the component",
    "benchmarks/server_memory.py": "installs the transfer without a FLARE job that has the component",
    "benchmarks/plan_check.py": "compares what the command plan works out with measurements",
    "benchmarks/verbs_costs.py": "measures what the parts of the verbs fabric cost on their own",
    "benchmarks/channel_peers.py": "sets endpoint.IN_PLACE_BYTES of the verbs fabric, which is no setting",
}
#: Private names of FLARE by which its objects are told from ours; only this module may say them.
COMPAT = "flare_compat.py"
FLARES_PRIVATE = {
    *("_deploy_map", "_ensure_client_apps_prepared", "_decomposers", "_dot_handlers", "_ref_table"),
    *("_register_source_download", "_unregister_source_download", "_create_datum"),
    *("_create_simulator_server_config", "_create_simulator_client_config"),
    *("_apply_filter", "_filter_dxos", "run_manager"),
    *("identity_resolver", "conn_props", "root_url"),
    *("_dead_clients", "_dead_client_grace", "_get_download_kwargs", "driver_mgr"),
}
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


def face(package: Path) -> set[str]:
    """The names in the `__all__` of a package; none if it is no package, or has no face."""
    if not (package / "__init__.py").exists():
        return set()
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def behind_faces(path: Path, package: str) -> set[str]:
    """What a file imports of a package, or of packages in it, that is in no face of theirs."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported = {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            imported = {(alias.name, "") for alias in node.names}
        else:
            continue
        for module, name in imported:
            if f"{module}.".startswith(f"{package}."):
                names = face(PACKAGE.parent / module.replace(".", "/"))
                if not names or (name and name not in names):
                    found.add(f"{module}.{name}".rstrip("."))
    return found


def own(names: set[str]) -> set[str]:
    parts = {name.split(".")[1] for name in names if name.startswith("nvflare_rdma.")}
    return parts - {"errors", "logs", "version"}


@pytest.mark.parametrize("layer", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()))
def test_a_layer_imports_only_what_is_below_it(layer):
    assert layer in ALLOWED, f"say in ALLOWED what the new layer {layer!r} may import"
    for path in (PACKAGE / layer).rglob("*.py"):
        above = own(imports(path)) - ALLOWED[layer] - {layer}
        assert not above, f"{path.name} imports {above}"


@pytest.mark.parametrize("layer", sorted({p.name for p in PACKAGE.iterdir() if face(p)} - FACES_TO_COME))
def test_outsiders_import_faces_only(layer):
    root = PACKAGE.parent
    for path in sorted([*PACKAGE.rglob("*.py"), *(root / "benchmarks").rglob("*.py")]):
        if PACKAGE / layer in path.parents or path.relative_to(root).as_posix() in BEHIND_FACES:
            continue
        found = behind_faces(path, f"nvflare_rdma.{layer}")
        assert not found, f"{path.relative_to(root)} imports {sorted(found)}: put it into a face, or do without it"


def test_who_looks_behind_faces_still_does():
    for name in BEHIND_FACES:
        assert any(behind_faces(PACKAGE.parent / name, f"nvflare_rdma.{p.name}") for p in PACKAGE.iterdir()), name


@pytest.mark.parametrize("package", sorted({p.parent for p in PACKAGE.rglob("__init__.py") if face(p.parent)}))
def test_a_face_has_what_it_names(package):
    module = ".".join(package.relative_to(PACKAGE.parent).parts)
    if module == "nvflare_rdma.fabric.verbs":
        pytest.importorskip("pyverbs")
    loaded = importlib.import_module(module)
    missing = {name for name in face(package) if not (hasattr(loaded, name) or (package / f"{name}.py").exists())}
    assert not missing


@pytest.mark.parametrize("layer", [*NO_FLARE_OR_TORCH, *NO_FLARE])
def test_low_layers_know_neither_flare_nor_torch(layer):
    for path in (PACKAGE / layer).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert "nvflare" not in roots, path
        if layer in NO_FLARE_OR_TORCH:
            assert "torch" not in roots, path


def private_names_of_flare(tree: ast.AST) -> set[str]:
    """What a module imports from FLARE's private modules, and private names that it uses of FLARE's modules, classes
    and instances. A name in FLARES_PRIVATE is FLARE's whatever has it."""
    found, flares = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            flares |= {alias.asname or alias.name for alias in node.names if alias.name.split(".")[0] == "nvflare"}
            found |= {alias.name for alias in node.names if alias.name.startswith("nvflare.private")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nvflare":
            flares |= {alias.asname or alias.name for alias in node.names}
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name.startswith("nvflare.private") or "._" in name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            known = node.attr in FLARES_PRIVATE or (node.attr == "_job" and not of_self)
            if known or (private and ast.unparse(node.value).split(".")[0] in flares):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.FunctionDef) and node.name in FLARES_PRIVATE and node.name.startswith("_"):
            found.add(f"def {node.name}")
    return found


def test_private_names_of_flare_are_in_one_place():
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    found = {
        str(path.relative_to(PACKAGE)): names for path, tree in trees.items() if (names := private_names_of_flare(tree))
    }
    assert found.pop(COMPAT)
    assert not found


#: pyverbs configures the root logger, which is undone; nothing is logged there.
OWN_LOGGERS = {"logs.py", "fabric/verbs/pyverbs.py"}


def unescaped_log_lines(tree: ast.AST) -> set[str]:
    """Loggers that are not `get_logger`'s, and lines of FLARE components that are neither constant nor `escaped`."""
    found = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr == "getLogger":
            found.add(ast.unparse(node))
        elif node.func.attr.startswith("log_"):
            line = node.args[1]
            safe = isinstance(line, ast.Call) and isinstance(line.func, ast.Name) and line.func.id == "escaped"
            if not safe and not isinstance(line, ast.Constant):
                found.add(ast.unparse(node))
    return found


def test_what_is_logged_is_escaped():
    assert unescaped_log_lines(ast.parse("self.log_info(ctx, f'{x}')")), "this test sees nothing"
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := unescaped_log_lines(ast.parse(path.read_text())))
    }
    assert found.keys() == OWN_LOGGERS


@pytest.mark.parametrize("place", NO_IO)
def test_the_protocol_and_its_controllers_do_no_io(place):
    found = PACKAGE / place
    for path in [found] if found.is_file() else sorted(found.rglob("*.py")):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & IO_MODULES, path


@pytest.mark.parametrize("layer", NO_FLARE_OR_TORCH)
def test_any_module_may_be_imported_first(layer):
    """Faces import modules which import other faces: a circle shows only from some of its members."""
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in (PACKAGE / layer).rglob("*.py")
    ]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    for loaded in [m for m in sys.modules if m.startswith('nvflare_rdma')]:\n"
        "        del sys.modules[loaded]\n"
        "    try:\n"
        "        importlib.import_module(name.removesuffix('.__init__'))\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert error.name.startswith('pyverbs'), name\n"
    )
    subprocess.run([sys.executable, "-c", code, *names], check=True, timeout=120, cwd=PACKAGE.parent)


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


@pytest.mark.parametrize("layer", [*NO_FLARE_OR_TORCH, *NO_FLARE, "runtime"])
def test_importing_low_layers_imports_no_flare(layer):
    code = f"import sys, nvflare_rdma.{layer}; assert 'nvflare' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=PACKAGE.parent)


#: The module that owns what a process shares.
RUNTIME = "runtime.py"
#: Objects that live elsewhere for as long as the process does, and why they may.
PROCESS_WIDE = {
    "accumulate/spool.py: _thread_memory": "memory of each thread, which nobody shares",
    "codecs/runs.py: _scratch": "memory of each thread, which nobody shares",
    "transfer/encoding.py: _thread_memory": "memory of each thread, which nobody shares",
    "codecs/marks.py: _marks": "weak entries by tensor: the mark goes with an object, whoever has it",
    "codecs/marks.py: _codes": "the same",
    "codecs/marks.py: _decoded": "the same",
    "filters/metadata.py: _tables": "constants, made once per framework; FLARE makes filters without arguments",
    "fabric/shm/process_memory.py: TRACER": "the kernel has one tracer per process (prctl)",
    "fabric/shm/handshake.py: _strangers": "how often they are logged, whoever's listener they come to",
    "fabric/verbs/iwarp_listen.py: _strangers": "the same",
    "fabric/verbs/endpoint.py: _endpoints": "what exit and fork have to find, whoever has made it",
}
MUTABLE = {"dict", "list", "set", "deque", "defaultdict", "OrderedDict", "Counter"}


def process_wide_objects(tree: ast.Module) -> set[str]:
    """Names of modules and classes that are bound to instances of the package's own classes, or to containers that
    change. Constants have upper-case names and are no instances of own classes."""
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    classes |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nvflare_rdma")
        for alias in node.names
        if alias.name[:1].isupper()
    }
    classes = {name for name in classes if not name.endswith(("Options", "Limits"))}  # frozen values
    bodies = [("", tree.body)]
    bodies += [
        (f"{node.name}.", node.body)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    ]
    found = set()
    for prefix, body in bodies:
        for node in body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            (target, *_) = node.targets if isinstance(node, ast.Assign) else [node.target]
            called = node.value.func if isinstance(node.value, ast.Call) else None
            made = ast.unparse(called).split("[")[0].split(".")[-1] if called is not None else ""
            own_class = made.lstrip("_") in {name.lstrip("_") for name in classes}
            changes = (
                made in MUTABLE or made.startswith("Weak") or isinstance(node.value, ast.Dict | ast.List | ast.Set)
            )
            name = ast.unparse(target)
            if own_class or (changes and name.lower() == name and not name.endswith("_")):
                found.add(prefix + name)
    return found


def test_what_is_process_wide_is_in_the_runtime():
    found = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in process_wide_objects(ast.parse(path.read_text()))
    }
    assert any(name.startswith(RUNTIME) for name in found)
    assert {name for name in found if not name.startswith(RUNTIME)} == PROCESS_WIDE.keys()


def test_no_module_is_over_600_lines():
    too_long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 600}
    assert not too_long
