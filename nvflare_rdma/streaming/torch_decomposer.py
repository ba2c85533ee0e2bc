"""`decomposers` for torch tensors."""

from __future__ import annotations

from typing import Any

from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.app_opt.pt.tensor_downloader import TensorDownloadable
from nvflare.fuel.utils.fobs import FOBSContextKey

from nvflare_rdma.streaming.decomposers import DirectDecomposer, _Served, known_as


class ServedTensors(_Served, TensorDownloadable):
    """torch tensors to be downloaded."""


@known_as(TensorDecomposer)
class RdmaTensorDecomposer(DirectDecomposer, TensorDecomposer):
    """torch tensors."""

    served = ServedTensors

    def lands_elsewhere(self, cell: Any, others: dict[str, Any]) -> bool:
        """FLARE's disk offload."""
        context = others.get("fobs_ctx") or {}
        default = cell.get_fobs_context().get(FOBSContextKey.TENSOR_DISK_OFFLOAD, False)
        return bool(context.get(FOBSContextKey.TENSOR_DISK_OFFLOAD, default))
