"""In PYTHONPATH, the simulator's process of site-2 finds no nvflare_rdma, as if it were not installed there."""

from __future__ import annotations

import sys


class _Nothing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "nvflare_rdma":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if "--client" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("--client") + 1] == "site-2":
    sys.meta_path.insert(0, _Nothing)
