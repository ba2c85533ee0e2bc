"""Imports every module of the installed package, and prints as JSON what became of that:

imported    how many there are
wanting     by name, what is not here and the wheel does not ask for, and the modules that are for it
failed      modules that can't be imported for another reason, which follows each
warned      what this Python says of their source, such as of an escape that will be an error some day
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import warnings
from pathlib import Path

import nvflare_rdma

#: A user installs them: an extra, and a package of the system.
NOT_ASKED_FOR = ("torch", "pyverbs")
HOME = str(Path(nvflare_rdma.__file__).parent)


def main() -> None:
    imported, wanting, failed = 0, {}, {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for module in pkgutil.walk_packages(nvflare_rdma.__path__, "nvflare_rdma."):
            if module.name.endswith(".__main__"):  # it runs what it is for
                continue
            try:
                importlib.import_module(module.name)
                imported += 1
            except ModuleNotFoundError as error:
                if error.name in NOT_ASKED_FOR:
                    wanting.setdefault(error.name, []).append(module.name)
                else:
                    failed[module.name] = str(error)
            except Exception as error:  # noqa: BLE001
                failed[module.name] = f"{type(error).__name__}: {error}"
    warned = sorted(
        {f"{each.filename}:{each.lineno}: {each.message}" for each in said if each.filename.startswith(HOME)}
    )
    print(json.dumps({"imported": imported, "wanting": wanting, "failed": failed, "warned": warned}))


if __name__ == "__main__":
    main()
