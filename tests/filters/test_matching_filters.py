"""One-sided configs are refused, at each of the four points, by a message that names key and fix."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.filters.points import DECODED, FILTERED


def weights():
    return DXO(DataKind.WEIGHTS, data={"w": np.ones(100, np.float32)}).to_shareable()


def tables(**filters):
    """Like a ClientRunner: tables by section, keyed by task and direction."""
    return SimpleNamespace(**{"task_data_filters": {}, "task_result_filters": {}, **filters})


def server(**filters):
    """Like a ServerRunner, which keeps its tables in its config."""
    return SimpleNamespace(config=tables(**filters))


class Other(Filter):
    def process(self, shareable, fl_ctx):
        return shareable


class FlareLike:
    class ModelDequantizer(Other):
        pass


class Engine:
    def __init__(self):
        self.events = []

    def fire_event(self, event_type, fl_ctx):
        self.events.append((event_type, fl_ctx.get_prop(FLContextKey.EVENT_DATA)))


SIDES = {
    "server out": (server, "task_result_filters", "train/in", "config_fed_server.json", "config_fed_client.json"),
    "client out": (tables, "task_data_filters", "train/in", "config_fed_client.json", "config_fed_server.json"),
}


@pytest.mark.parametrize("point", SIDES)
def test_a_quantizer_needs_a_dequantizer_for_the_other_direction(point, at):
    side, section, key, own, other = SIDES[point]
    for present in ([], [Other()], [ModelQuantizer()]):
        quantizer = ModelQuantizer("normfloat4")
        ctx = at(point, quantizer, runner=side(**{section: {key: present}}))
        with pytest.raises(ConfigError) as error:
            quantizer.process(weights(), ctx)
        assert f"ModelDequantizer to {section} of {own}" in str(error.value)
        assert f"ModelQuantizer to {section} of {other}" in str(error.value)
        assert "one_way=true" in str(error.value)
        assert "'train'" in str(error.value)


@pytest.mark.parametrize("point", SIDES)
@pytest.mark.parametrize("dequantizer", [ModelDequantizer, FlareLike.ModelDequantizer])
def test_a_quantizer_with_its_dequantizer_works(point, dequantizer, at):
    side, section, key, _, _ = SIDES[point]
    quantizer = ModelQuantizer("normfloat4")
    ctx = at(point, quantizer, runner=side(**{section: {key: [Other(), dequantizer()]}}))
    assert from_shareable(quantizer.process(weights(), ctx)).data["w"].dtype == np.uint8


def test_a_dequantizer_for_another_task_or_direction_does_not_count(at):
    for key in ("validate/in", "train/out"):
        quantizer = ModelQuantizer()
        ctx = at("server out", quantizer, runner=server(task_result_filters={key: [ModelDequantizer()]}))
        with pytest.raises(ConfigError):
            quantizer.process(weights(), ctx)


def test_each_task_is_checked(at):
    quantizer = ModelQuantizer()
    runner = server(task_result_filters={"train/in": [ModelDequantizer()]})
    quantizer.process(weights(), at("server out", quantizer, runner=runner))
    quantizer.process(weights(), at("server out", quantizer, runner=runner))
    with pytest.raises(ConfigError, match="'validate'"):
        quantizer.process(weights(), at("server out", quantizer, runner=runner, task="validate"))


def test_one_way_is_allowed_when_said(at):
    quantizer = ModelQuantizer(one_way=True)
    quantizer.process(weights(), at("server out", quantizer, runner=server()))


def test_a_site_level_dequantizer_counts(at):
    quantizer = ModelQuantizer()
    ctx = at("client out", quantizer, runner=tables())
    scope = SimpleNamespace(task_data_filters={FilterKey.IN: [ModelDequantizer()]}, task_result_filters={})
    ctx.set_prop(FLContextKey.SCOPE_OBJECT, scope, private=True, sticky=False)
    quantizer.process(weights(), ctx)


def site(decoded=None, filtered=None):
    peer = FLContext()
    peer.set_prop("__identity_name__", "site-1", private=False, sticky=False)
    if decoded is not None:
        peer.set_prop(DECODED, decoded, private=False, sticky=False)
        peer.set_prop(FILTERED, decoded if filtered is None else filtered, private=False, sticky=False)
    return peer


@pytest.mark.parametrize("one_way", [True, False])
def test_a_site_that_does_not_decode_is_sent_no_codes(at, one_way):
    quantizer = ModelQuantizer(one_way=one_way)
    ctx = at("server out", quantizer, runner=server(task_result_filters={"train/in": [ModelDequantizer()]}))
    for decoded in (["train"], ["*"]):
        ctx.set_peer_context(site(decoded))
        quantizer.process(weights(), ctx)
    for decoded in ([], ["validate"]):
        ctx.set_peer_context(site(decoded))
        with pytest.raises(ConfigError, match="site-1 has no ModelDequantizer for the data of task 'train'") as error:
            quantizer.process(weights(), ctx)
        add = "add nvflare_rdma.filters.ModelDequantizer to task_data_filters of the site's config_fed_client.json"
        assert add in str(error.value)


def test_a_site_that_says_nothing_is_warned_of_once(at, warnings_logged):
    quantizer = ModelQuantizer(one_way=True)
    for task in ("train", "train", "validate"):
        ctx = at("server out", quantizer, runner=server(), task=task)
        ctx.set_peer_context(site())
        assert from_shareable(quantizer.process(weights(), ctx)).data["w"].dtype == np.float16
    assert ["'train'" in line for line in warnings_logged] == [True, False]
    assert "site-1 does not say that it decodes" in warnings_logged[0]
    assert "unless it has an older version of this package, FLARE's ModelDequantizer, or another" in warnings_logged[0]
    assert "config_fed_client.json" in warnings_logged[0]


@pytest.mark.parametrize("filtered", [["train"], ["*"]])
def test_a_site_with_another_filter_may_decode_with_it(at, filtered, warnings_logged):
    """A dequantizer may have any name, and the job goes on."""
    quantizer = ModelQuantizer(one_way=True)
    for _ in range(2):
        ctx = at("server out", quantizer, runner=server())
        ctx.set_peer_context(site([], filtered))
        assert from_shareable(quantizer.process(weights(), ctx)).data["w"].dtype == np.float16
    (line,) = warnings_logged
    assert "site-1 has no ModelDequantizer for the data of task 'train'; unless another of its filters decodes" in line


@pytest.mark.parametrize("teller", [ModelQuantizer, ModelDequantizer])
@pytest.mark.parametrize(
    ("filters", "decoded", "filtered"),
    [
        ({}, [], []),
        ({"train/in": [ModelQuantizer()], "train/out": [ModelDequantizer()]}, [], ["train"]),
        ({"train/in": [Other(), ModelDequantizer()], "validate/in": [Other()]}, ["train"], ["train", "validate"]),
        ({"a/b/in": [FlareLike.ModelDequantizer()]}, ["a/b"], ["a/b"]),
        ({"train/in": [], "validate/out": [Other()]}, [], []),
    ],
)
def test_a_site_tells_what_it_decodes(at, teller, filters, decoded, filtered):
    ctx = at("client in", Other(), runner=tables(task_data_filters=filters))
    teller().handle_event(EventType.START_RUN, ctx)
    assert ctx.get_prop(DECODED) == decoded
    assert ctx.get_prop(FILTERED) == filtered
    assert {DECODED, FILTERED} <= set(ctx.get_all_public_props())


def test_a_sites_own_dequantizer_is_for_all_tasks_and_a_server_tells_nothing(at):
    scope = SimpleNamespace(task_data_filters={FilterKey.IN: [ModelDequantizer()]}, task_result_filters={})
    for runner, decoded in ((tables(), ["*"]), (server(), None)):
        ctx = at("client in", Other(), runner=runner)
        ctx.set_prop(FLContextKey.SCOPE_OBJECT, scope, private=True, sticky=False)
        ModelDequantizer().handle_event(EventType.START_RUN, ctx)
        assert ctx.get_prop(DECODED) == decoded


@pytest.mark.parametrize(
    ("point", "runner", "where"),
    [
        ("server out", server, "task_data_filters of config_fed_server.json"),
        ("client out", tables, "task_result_filters of config_fed_client.json"),
    ],
)
def test_a_quantizer_that_had_no_model_says_so_once_at_the_end_of_the_run(point, runner, where, at, warnings_logged):
    quantizer, busy = ModelQuantizer("float16"), ModelQuantizer("float16", one_way=True)
    section = where.split()[0]
    there = runner(**{section: {"a/x/out": [Other(), quantizer], "tarin/out": [quantizer], "train/out": [busy]}})
    for each in (quantizer, busy):
        ctx = at(point, each, runner=there)
        each.handle_event(EventType.START_RUN, ctx)
    busy.process(weights(), ctx)
    for each in (quantizer, busy):
        for _ in range(2):
            each.handle_event(EventType.END_RUN, at(point, each, runner=there))
    (line,) = [line for line in warnings_logged if "has quantized nothing" in line]
    assert f"ModelQuantizer in {where} has quantized nothing in this run: it is for task 'a/x', 'tarin'" in line


@pytest.mark.parametrize("point", ["server out", "server in", "client out", "client in"])
def test_filters_for_some_sites_leave_those_of_others_alone(point, at):
    """On a client the list means nothing: a site that has the filter is one of them."""
    made = ModelQuantizer(one_way=True, clients=["site-1"]) if "out" in point else ModelDequantizer(clients=["site-1"])
    ctx, peer = at(point, made), FLContext()
    peer.set_prop(ReservedKey.IDENTITY_NAME, "site-2", private=False, sticky=False)
    ctx.set_peer_context(peer)
    message = weights()
    if "server" in point:
        assert made.process(message, ctx) is message
    elif "out" in point:
        assert made.process(message, ctx) is not message
    else:
        with pytest.raises(ConfigError):
            made.process(message, ctx)
    peer.set_prop(ReservedKey.IDENTITY_NAME, "site-1", private=False, sticky=False)
    if "out" in point:
        assert made.process(message, ctx) is not message
    else:
        with pytest.raises(ConfigError, match="came without quantization metadata"):
            made.process(message, ctx)


RECEIVING = {
    "server in": ("the results of task 'train' from site-1", "task_result_filters", "server", "client"),
    "client in": ("the data of task 'train'", "task_data_filters", "client", "server"),
}


@pytest.mark.parametrize("point", RECEIVING)
def test_a_message_without_codes_is_refused(point, at):
    what, section, own, other = RECEIVING[point]
    dequantizer = ModelDequantizer()
    ctx = at(point, dequantizer)
    peer = FLContext()
    peer.set_prop("__identity_name__", "site-1", private=False, sticky=False)
    ctx.set_peer_context(peer)
    with pytest.raises(ConfigError) as error:
        dequantizer.process(weights(), ctx)
    message = str(error.value)
    assert what in message
    assert f"ModelQuantizer to {section} of config_fed_{other}.json" in message
    assert f"remove ModelDequantizer from {section} of config_fed_{own}.json" in message


def test_outside_a_job_the_message_still_says_what_is_missing():
    with pytest.raises(ConfigError, match="ModelQuantizer"):
        ModelDequantizer().process(weights(), FLContext())


@pytest.mark.parametrize("point", ["server in", "client in"])
def test_only_the_server_ends_the_job_itself(point, at):
    dequantizer, engine = ModelDequantizer(), Engine()
    ctx = at(point, dequantizer)
    ctx.set_prop(FLContextKey.FILTER_DIRECTION, "in", private=True, sticky=False)
    ctx.get_engine = lambda *args, **kwargs: engine
    with pytest.raises(ConfigError) as error:
        dequantizer.process(weights(), ctx)
    panics = [reason for event, reason in engine.events if event == "_fatal_system_error"]
    assert panics == ([str(error.value)] if point == "server in" else [])
