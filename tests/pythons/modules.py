"""Imports every module of the installed package, and prints as JSON what became of that:

imported    how many there are
wanting     by name, what is not here and the wheel does not ask for, and the modules that are for it
failed      modules that can't be imported for another reason, which follows each
warned      what this Python says of their source, such as of an escape that will be an error some day
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from pathlib import Path

import nvflare_rdma

#: A user installs them: an extra, and a package of the system.
NOT_ASKED_FOR = ("torch", "pyverbs")
#: In folders that are no packages; FLARE finds them by their path.
PLUGINS = ("plugin/rdma_driver.py", "trainer_plugin/nvflare_rdma_trainer.py")
HOME = Path(nvflare_rdma.__file__).parent


def load(path: Path) -> None:
    """Import the module in a file of the package."""
    if (path.parent / "__init__.py").exists():
        parts = [nvflare_rdma.__name__, *path.relative_to(HOME).with_suffix("").parts]
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def main() -> None:
    imported, wanting = 0, {}
    failed = {name: "it is not there" for name in PLUGINS if not (HOME / name).exists()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for path in sorted(HOME.rglob("*.py")):
            if path.name == "__main__.py":  # it runs what it is for
                continue
            name = str(path.relative_to(HOME))
            try:
                load(path)
                imported += 1
            except ModuleNotFoundError as error:
                if error.name in NOT_ASKED_FOR:
                    wanting.setdefault(error.name, []).append(name)
                else:
                    failed[name] = str(error)
            except Exception as error:  # noqa: BLE001
                failed[name] = f"{type(error).__name__}: {error}"
    warned = sorted(
        {f"{each.filename}:{each.lineno}: {each.message}" for each in said if each.filename.startswith(str(HOME))}
    )
    print(json.dumps({"imported": imported, "wanting": wanting, "failed": failed, "warned": warned}))


if __name__ == "__main__":
    main()
