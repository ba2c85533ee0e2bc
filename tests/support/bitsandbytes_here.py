"""bitsandbytes as it is on any processor."""

from __future__ import annotations

from types import ModuleType

import pytest

from nvflare_rdma.codecs import get_codec


def functional() -> ModuleType:
    """Its functions, with this package's table of the dynamic type; the test is skipped where there are none.

    Its own comes from `torch.linspace`, of which the last bits are others where torch does without fused multiply-add.
    What is made with the table would differ there too, which says nothing of what makes it.
    """
    found: ModuleType = pytest.importorskip("bitsandbytes.functional")  # slow to import
    torch = pytest.importorskip("torch")
    found.name2qmap["dynamic"] = torch.from_numpy(get_codec("blockwise8").table.copy())
    return found
