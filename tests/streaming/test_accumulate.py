"""Which runs keep results encoded: a server's, if its component says so."""

from __future__ import annotations

import types

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContextManager

from nvflare_rdma.flare_compat import ACCUMULATE_PROP
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming import RdmaTransfer


def context(cell: str, folder: str):
    workspace = types.SimpleNamespace(
        get_server_startup_file_path=lambda: "/nowhere", get_run_dir=lambda job_id: folder
    )
    engine = types.SimpleNamespace(
        get_cell=lambda: types.SimpleNamespace(get_fqcn=lambda: cell, _send_request=None),
        get_workspace=lambda: workspace,
    )
    ctx = FLContextManager(engine, cell.split(".")[0], "job-1", {}, {}).new_context()
    ctx.set_prop(FLContextKey.PROCESS_TYPE, "SJ", private=True, sticky=False)
    return ctx


@pytest.mark.parametrize(
    ("cell", "options", "wanted"),
    [
        ("server.job-1", {}, True),
        ("server.job-1", {"accumulate": False}, False),
        ("site-1.job-1", {}, False),
    ],
)
def test_a_servers_run_keeps_results_encoded_from_its_start_to_its_end(tmp_path, cell, options, wanted):
    component, ctx = RdmaTransfer(**options), context(cell, str(tmp_path))
    assert not shared().holdings.wanted
    component.handle_event(EventType.START_RUN, ctx)
    try:
        assert shared().holdings.wanted is wanted
        assert ctx.get_prop(ACCUMULATE_PROP) is (shared().holdings if wanted else None)
    finally:
        component.handle_event(EventType.END_RUN, ctx)
    assert not shared().holdings.wanted
