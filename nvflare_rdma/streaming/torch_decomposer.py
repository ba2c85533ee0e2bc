"""`decomposers` for torch tensors, which FLARE may want on disk (its `docs/design/tensor_disk_offload.md`)."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict
from nvflare.app_opt.pt.tensor_downloader import DiskTensorConsumer, TensorDownloadable
from nvflare.fuel.f3.cellnet.fqcn import FQCN

from nvflare_rdma.accumulate import plain
from nvflare_rdma.errors import TransferError
from nvflare_rdma.flare_compat import offload_folder
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.decomposers import DirectDecomposer, Landing, Served, known_as
from nvflare_rdma.streaming.results import Results
from nvflare_rdma.transfer import Item, OnDisk, Place


class ServedTensors(Served, TensorDownloadable):
    """FLARE's `TensorDownloadable` (torch tensors), which also answers direct requests."""


@known_as(TensorDecomposer)
class RdmaTensorDecomposer(DirectDecomposer, TensorDecomposer):
    """FLARE's `TensorDecomposer`, whose tensors move over links."""

    served = ServedTensors

    def decompose(self, target: Any, manager: Any = None) -> Any:
        """FLARE's hook on the sending side. What has come encoded is sent on as a plain tensor."""
        return super().decompose(plain(target), manager)

    @contextlib.contextmanager
    def landing(self, cell: Any, sender: str, others: dict[str, Any]) -> Iterator[Landing]:
        """Where the tensors of one message are received: in files if the workflow has FLARE put them on disk (the
        application then gets a `LazyTensorDict`), else in memory. A server whose results wait until they are added
        keeps them as they come, and on disk what memory has no room for."""
        root = offload_folder((others.get("fobs_ctx") or {}, cell.get_fobs_context()))
        if root is None:
            if shared().holdings.wanted and FQCN.get_root(cell.get_fqcn()) == FQCN.ROOT_SERVER:
                results = Results(shared(), sender)
                yield Landing(results.land, nbytes=results.nbytes)
                return
            with super().landing(cell, sender, others) as landing:
                yield landing
            return
        folder = _Folder(root)
        try:
            yield Landing(folder.land, folder.give)
        finally:
            folder.close()


class _Folder:
    """The folder of one message's tensors, a file for each.

    It belongs to a `DiskTensorConsumer`, as FLARE looks for these when it ends a workflow, and removes their folders.
    """

    def __init__(self, root: str) -> None:
        self._path = tempfile.mkdtemp(prefix="nvflare_tensors_", dir=root)
        self._owner = DiskTensorConsumer(self._path)
        self._numbers = itertools.count()
        self._given = False

    def land(self, item: Item) -> Place:
        if not OnDisk.takes(item):
            raise TransferError(f"safetensors files have no {item.dtype} ({item.name})")
        return OnDisk(item, os.path.join(self._path, f"tensor_{next(self._numbers)}.safetensors"))

    def give(self, items: Any) -> LazyTensorDict:
        if not os.path.isdir(self._path):
            raise TransferError("FLARE has removed the tensors that were to be on disk")
        self._owner.release()
        self._given = True
        return LazyTensorDict(items, self._path)

    def close(self) -> None:
        if not self._given:
            self._owner.cleanup()
