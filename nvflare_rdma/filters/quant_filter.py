"""What both filters share: FLARE's DXO filtering without its changes in place, and job-stopping config errors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters.points import DXO_PATH, FilterPoint

QUANT_STATE = "quant_state"
SOURCE_DATATYPE = "source_datatype"
QUANTIZED_FLAG = "quantized_flag"
OURS = "nvflare_rdma"  # what FLARE's filters don't know: ties, and the models that messages are based on
QUANT_META = (MetaKey.PROCESSED_ALGORITHM, QUANT_STATE, SOURCE_DATATYPE, QUANTIZED_FLAG, OURS)


class QuantFilter(DXOFilter):
    """A `DXOFilter` for model weights that leaves everything it was given as it was.

    FLARE's server hands every client a Shareable of its own whose DXO contents are one shared structure, so what is
    inside must not change. The filtered result is a new Shareable with new DXOs down to the changed leaf; all that
    did not change is shared.

    Args:
        clients: on the server, the sites whose messages are filtered; None: all.
    """

    def __init__(self, clients: Sequence[str] | None = None) -> None:
        kinds = [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF]
        super().__init__(supported_data_kinds=kinds, data_kinds_to_filter=kinds)
        self.clients = None if clients is None else list(clients)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Filter the DXO in `shareable`. Shareables without one, or with an error code, pass unchanged."""
        if shareable.get_return_code() != ReturnCode.OK:
            return shareable
        try:
            dxo = from_shareable(shareable)
        except ValueError:
            return shareable
        if not self._concerns(dxo):
            return shareable
        point = FilterPoint.of(self, shareable, fl_ctx)
        if self.clients is not None and point.on_server and point.peer not in self.clients:
            return shareable
        try:
            result = self._filtered(dxo, "", shareable, fl_ctx)
        except ConfigError as error:
            self._stop(point, error, fl_ctx)
        return result.update_shareable(copy.copy(shareable))

    def _concerns(self, dxo: DXO) -> bool:
        """Return whether a DXO with data to filter is somewhere in `dxo`."""
        if dxo.data_kind == DataKind.COLLECTION:
            return any(isinstance(d, DXO) and self._concerns(d) for d in dxo.data.values())
        return dxo.data_kind in self.data_kinds and bool(dxo.data)

    def _filtered(self, dxo: DXO, path: str, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        if dxo.data_kind == DataKind.COLLECTION:
            parts = {
                k: self._filtered(d, f"{path}/{k}", shareable, fl_ctx) if isinstance(d, DXO) else d
                for k, d in dxo.data.items()
            }
            return DXO(DataKind.COLLECTION, data=parts, meta=dxo.meta)
        if self._concerns(dxo):
            # process_dxo's signature is FLARE's; the context belongs to this one call.
            fl_ctx.set_prop(DXO_PATH, path, private=True, sticky=False)
            return self._apply_filter(dxo, shareable, fl_ctx)
        return dxo

    @staticmethod
    def _meta_for_new_dxo(dxo: DXO) -> dict[str, Any]:
        """Return a copy of the metadata to change.

        FLARE appends to the history list in place, so that one stays behind: `_apply_filter` copies it from the old
        DXO to the new one.
        """
        return {k: v for k, v in (dxo.meta or {}).items() if k != MetaKey.FILTER_HISTORY}

    def _stop(self, point: FilterPoint, error: ConfigError, fl_ctx: FLContext) -> NoReturn:
        """Raise `error`; on the server also end the job, where FLARE would only retry the task.

        A client replies with an error code that makes the server's controller end the job, and logs the message.
        """
        if point.on_server and fl_ctx.get_engine() is not None:
            self.system_panic(str(error), fl_ctx)
        raise error
