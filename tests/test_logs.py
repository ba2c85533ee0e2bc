"""Nobody else writes log lines: what comes from a peer or a file is escaped, in lines and in errors."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.utils.log_utils import BaseFormatter

from nvflare_rdma.errors import CodecError, FabricError, ProtocolError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.logs import escaped, get_logger
from nvflare_rdma.transfer.content import TensorContent
from nvflare_rdma.transfer.manifest import Item

#: A line of somebody's own, a red terminal, a text that is read backwards, and a file name that is no UTF-8.
FORGED = "w\n2026-01-01 ERROR\r\x1b[31m\u202e\udcff"
SHOWN = r"w\n2026-01-01 ERROR\r\x1b[31m\u202e\udcff"


@pytest.mark.parametrize(("text", "shown"), [(FORGED, SHOWN), ("Größe 7/w_0", "Größe 7/w_0"), (7, "7"), ("", "")])
def test_escaped(text, shown):
    assert escaped(text) == shown
    assert escaped(escaped(text)) == shown


def test_a_line_has_its_arguments_escaped_and_names_its_place(caplog):
    log = get_logger("nvflare_rdma.test")
    with caplog.at_level(logging.INFO, "nvflare_rdma.test"):
        log.info("%s, %d of %.1f\nare %s", FORGED, 3, 4.5, ValueError(FORGED))
        log.debug("not shown: %s", FORGED)
    (record,) = caplog.records
    assert record.getMessage() == f"{SHOWN}, 3 of 4.5\nare {SHOWN}"
    assert (record.name, record.funcName) == (
        "nvflare_rdma.test",
        "test_a_line_has_its_arguments_escaped_and_names_its_place",
    )


def test_a_line_shows_what_its_format_asks_for(caplog):
    """The type of an error and its number say what happened; numbers of numpy are numbers."""
    log = get_logger("nvflare_rdma.test")
    log.warning("%r, %r and '%s'", OSError(9, FORGED), FORGED, FORGED)
    log.warning("%d of %.1f, %5d, %s", np.int64(3), np.float32(4.5), True, np.uint8(7))
    assert caplog.messages == [f"OSError(9, '{SHOWN}'), '{SHOWN}' and '{SHOWN}'", "3 of 4.5,     1, 7"]


def test_flares_formatter_shows_a_line_that_looks_as_its_own(caplog):
    get_logger("nvflare_rdma.test").warning("%s: 100 %% of %s", "[CH1 PASSIVE tcp://0:8002?admin_listener=true]", "it")
    shown = BaseFormatter("%(fl_ctx)s %(message)s").format(caplog.records[0])
    assert shown == "[CH1 PASSIVE tcp://0:8002?admin_listener=true]: 100 % of it".replace("]: ", "] ")


@pytest.mark.parametrize("kind", [CodecError, ProtocolError, FabricError])
def test_errors_have_escaped_texts(kind):
    assert str(kind(f"'{FORGED}' is refused")) == f"'{SHOWN}' is refused"


def test_the_name_of_a_tensor_that_is_sent(caplog):
    item = Item(FORGED, False, "float32", (4096,))
    TensorContent({FORGED: np.zeros(4096, np.float32)}).send_exact(item, "NaN")
    assert caplog.messages == [f"tensor {SHOWN} is sent exact: NaN"]


def test_names_in_a_models_messages(warnings_of_filters):
    bad = {FORGED: torch.full((5000,), torch.nan), "w": torch.randn(64, 64)}
    sent = ModelQuantizer("normfloat4").process(DXO(DataKind.WEIGHTS, data=bad).to_shareable(), FLContext())
    (warning,) = warnings_of_filters
    assert SHOWN in warning
    assert "\n" not in warning
    dxo = from_shareable(sent)
    dxo.meta["source_datatype"][FORGED] = FORGED
    with pytest.raises(CodecError) as error:
        ModelDequantizer().process(dxo.to_shareable(), FLContext())
    assert f"'{SHOWN}'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def warnings_of_filters():
    """FLARE's components log with loggers of their own."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    yield messages
    logging.getLogger().removeHandler(handler)
