"""pytest plugin: what runs is FLARE's, with this package's transfer installed. See `upstream.py`."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import nvflare.app_common.decomposers.numpy_decomposers as numpy_decomposers
import nvflare.app_opt.pt.decomposers as pt_decomposers
import pytest

from nvflare_rdma.flare_compat import replace_decomposer
from nvflare_rdma.runtime import shared, this_runtime
from nvflare_rdma.streaming.component import install
from nvflare_rdma.streaming.decomposers import DirectDecomposer, RdmaArrayDecomposer
from nvflare_rdma.streaming.identity import identifier
from nvflare_rdma.streaming.torch_decomposer import RdmaTensorDecomposer
from nvflare_rdma.transfer.peers import PeerLinks
from nvflare_rdma.transfer.receiver import Pull

_counted: Counter[str] = Counter()


def _open(cell: Any) -> PeerLinks:
    """As `open_links`, but every cell listens: only few of those in FLARE's tests are called server."""
    return PeerLinks(
        cell.get_fqcn(), this_runtime(), lambda server_side: None, identifier({}), ("127.0.0.1", 0), (0, 0)
    )


def _noted(method: Any) -> Any:
    @functools.wraps(method)
    def noting(*args: Any, **kinds: Any) -> Any:
        _counted["reached"] += 1
        return method(*args, **kinds)

    return noting


def _counting(run: Any) -> Any:
    @functools.wraps(run)
    def counting(pull: Pull, **kinds: Any) -> Any:
        try:
            tensors = run(pull, **kinds)
        except Exception:
            _counted["own_path"] += 1
            raise
        _counted["direct"] += 1
        _counted["nbytes"] += sum(item.nbytes for item in pull.items)
        return tensors

    return counting


def pytest_configure() -> None:
    """Before FLARE's tests are imported: what they name is ours."""
    install()
    shared().links.start(_open)
    Pull.run = _counting(Pull.run)
    for name in ("to_downloadable", "download"):
        setattr(DirectDecomposer, name, _noted(getattr(DirectDecomposer, name)))
    pt_decomposers.TensorDecomposer = RdmaTensorDecomposer
    numpy_decomposers.NumpyArrayDecomposer = RdmaArrayDecomposer


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Some tests reset FLARE's register."""
    replace_decomposer(RdmaArrayDecomposer())
    replace_decomposer(RdmaTensorDecomposer())
    _counted.clear()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What upstream.py reads in the report."""
    item.user_properties.extend((name, count) for name, count in _counted.items())
