"""What both filters share: FLARE's DXO filtering without its changes in place, flat names for what is in a DXO, and
job-stopping config errors."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_rdma.errors import CodecError, ConfigError
from nvflare_rdma.filters.points import DXO_COUNT, DXO_PATH, FilterPoint
from nvflare_rdma.flare_compat import apply_dxo_filter

QUANT_STATE = "quant_state"
SOURCE_DATATYPE = "source_datatype"
QUANTIZED_FLAG = "quantized_flag"
OURS = "nvflare_rdma"  # what FLARE's filters don't know: ties, and the models that messages are based on
QUANT_META = (MetaKey.PROCESSED_ALGORITHM, QUANT_STATE, SOURCE_DATATYPE, QUANTIZED_FLAG, OURS)
_MAX_DEPTH = 8  # more is no model; keeps a forged message from exhausting the stack


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
        concerned = self._count(dxo)
        if not concerned:
            return shareable
        point = FilterPoint.of(self, shareable, fl_ctx)
        if self.clients is not None and point.on_server and point.peer not in self.clients:
            return shareable
        # process_dxo's signature is FLARE's; the context belongs to this one call.
        fl_ctx.set_prop(DXO_COUNT, concerned, private=True, sticky=False)
        try:
            result = self._filtered(dxo, "", shareable, fl_ctx)
        except ConfigError as error:
            self._stop(point, error, fl_ctx)
        return result.update_shareable(copy.copy(shareable))

    def _count(self, dxo: DXO) -> int:
        """Return how many DXOs with data to filter are in `dxo`, itself included."""
        if dxo.data_kind == DataKind.COLLECTION:
            return sum(self._count(d) for d in dxo.data.values() if isinstance(d, DXO))
        return int(dxo.data_kind in self.data_kinds and bool(dxo.data))

    def _filtered(self, dxo: DXO, path: str, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        if dxo.data_kind == DataKind.COLLECTION:
            parts = {
                k: self._filtered(d, f"{path}/{k}", shareable, fl_ctx) if isinstance(d, DXO) else d
                for k, d in dxo.data.items()
            }
            return DXO(DataKind.COLLECTION, data=parts, meta=dxo.meta)
        if self._count(dxo):
            fl_ctx.set_prop(DXO_PATH, path, private=True, sticky=False)
            return apply_dxo_filter(self, dxo, shareable, fl_ctx)
        return dxo

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return a new DXO with other values and metadata, or None if it stays as it is."""
        filtered = self.process_values(flatten(dxo.data), dxo, shareable, fl_ctx) if dxo.data else None
        if filtered is None:
            return None
        values, meta = filtered
        # Dicts of its own: other sites get the same values, and a later filter may change dicts in place.
        return DXO(data_kind=dxo.data_kind, data=rebuild(dxo.data, values), meta=meta)

    @abstractmethod
    def process_values(
        self, values: Mapping[str, Any], dxo: DXO, shareable: Shareable, fl_ctx: FLContext
    ) -> tuple[Mapping[str, Any], dict[str, Any]] | None:
        """Return the values to put in place of `values`, which the DXO has by flat names, and the new DXO's metadata;
        None to leave the DXO as it is."""

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


def flatten(params: dict[str, Any]) -> dict[str, Any]:
    """Return every value by its name; those in inner dicts (one dict per adapter, for example) by `outer/inner`.

    Raises:
        CodecError: two values of one name, or dicts nested deeper than any model has them.
    """
    if not any(type(value) is dict for value in params.values()):
        return params
    flat: dict[str, Any] = {}
    _collect(params, "", 0, flat)
    return flat


def _collect(params: dict[str, Any], prefix: str, depth: int, flat: dict[str, Any]) -> None:
    if depth > _MAX_DEPTH:
        raise CodecError(f"the params '{prefix}' are nested more than {_MAX_DEPTH} deep")
    for key, value in params.items():
        name = f"{prefix}{key}" if prefix else key
        if type(value) is dict:
            _collect(value, f"{name}/", depth + 1, flat)
        elif name in flat:
            raise CodecError(f"two params have the name '{name}': rename one of them")
        else:
            flat[name] = value


def rebuild(params: dict[str, Any], flat: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return new dicts of the form of `params` with the values of `flat`, which `flatten` named."""
    new = {}
    for key, value in params.items():
        name = f"{prefix}{key}" if prefix else key
        new[key] = rebuild(value, flat, f"{name}/") if type(value) is dict else flat[name]
    return new
