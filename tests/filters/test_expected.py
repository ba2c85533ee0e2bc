"""A few bytes may stand for many values: as many as the receiver expects, and no more."""

from __future__ import annotations

import bz2
import logging
import tracemalloc

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import make_copy

from nvflare_rdma.accumulate import is_encoded_tensor
from nvflare_rdma.errors import CodecError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.filters.expected import Expected, expected_of
from tests.support.flares_filters import flares_quantizer
from tests.support.waiting_results import on_disk

LARGE = 17 << 20  # values: more than come without being expected, and never taken as memory by these tests


def constant(shape, value=0.0, as_torch=False):
    one = np.full(1, value, np.float32)
    return torch.from_numpy(one).expand(shape) if as_torch else np.broadcast_to(one, shape)


def from_flare(shape, value=0.0, **state):
    """What FLARE's quantizer makes of a constant."""
    meta = {
        MetaKey.PROCESSED_ALGORITHM: "adaquant",
        "quant_state": {"w": {"offset": -value, "tensor_shape": list(shape), **state}},
        "source_datatype": {"w": "float32"},
        "quantized_flag": True,
    }
    return DXO(DataKind.WEIGHT_DIFF, data={"w": torch.tensor([0], dtype=torch.bool)}, meta=meta)


def ours(shape, value=0.0):
    params = {"w": constant(shape, value)}
    made = ModelQuantizer("adaquant").process(DXO(DataKind.WEIGHT_DIFF, data=params).to_shareable(), FLContext())
    return from_shareable(made)


def named(ctx, site):
    peer = FLContext()
    peer.set_prop("__identity_name__", site, private=False, sticky=False)
    ctx.set_peer_context(peer)
    return ctx


def after_sending(at, model, site="site-1", kind=DataKind.WEIGHTS):
    """A server's dequantizer, and a context of the result of a site to which FLARE has sent `model`."""
    dequantizer = ModelDequantizer()
    ctx = named(at("server in", dequantizer), site)
    ctx.set_prop(FLContextKey.TASK_DATA, DXO(kind, data=model).to_shareable(), private=True, sticky=False)
    dequantizer.handle_event(EventType.BEFORE_TASK_DATA_FILTER, ctx)
    return dequantizer, ctx


def received(dequantizer, dxo, ctx):
    return from_shareable(dequantizer.process(dxo.to_shareable(), ctx)).data["w"]


def test_a_result_that_was_sent_on_while_it_waited_is_expected_back(at):
    shape = (3, 1000)
    model = {"w": on_disk(torch.ones(shape))}
    dequantizer, ctx = after_sending(at, model)
    assert expected_of(ctx).of("train", "site-1", "") == {"w": 3000}
    assert is_encoded_tensor(model["w"])
    assert received(dequantizer, ours(shape), ctx).shape == shape


@pytest.mark.parametrize("message", [ours, from_flare])
@pytest.mark.parametrize("as_torch", [True, False])
def test_a_site_that_trained_nothing(at, message, as_torch):
    """The update is all zero, and as large as the model that the server has sent."""
    shape = (5, LARGE // 5)
    dequantizer, ctx = after_sending(at, {"w": constant(shape, 1.5, as_torch)})
    got = received(dequantizer, message(shape), ctx)
    assert got.shape == shape
    assert got[3, 7] == 0
    got[3, 7] = 4  # memory of its own, as with any other


@pytest.mark.parametrize("message", [ours, from_flare])
@pytest.mark.parametrize("sent", [{}, {"other": constant((LARGE,))}, {"w": constant((LARGE - 1,))}, {"w": "no tensor"}])
def test_a_server_refuses_what_it_has_not_sent(at, message, sent):
    dequantizer, ctx = after_sending(at, sent)
    with pytest.raises(CodecError, match=f"'w': it stands for {LARGE} values, but is not expected to have as many"):
        received(dequantizer, message((LARGE,)), ctx)


def test_what_was_sent_to_another_site_or_for_another_task_does_not_count(at):
    dequantizer, ctx = after_sending(at, {"w": constant((LARGE,))})
    for other in (named(at("server in", dequantizer), "site-2"), at("server in", dequantizer, task="other")):
        other.set_prop("nvflare_rdma.expected", ctx.get_prop("nvflare_rdma.expected"), private=True, sticky=True)
        with pytest.raises(CodecError, match="'w'"):
            received(dequantizer, ours((LARGE,)), other)


def test_a_compressed_update_that_is_nearly_all_zero(at):
    """FLARE compresses codes; these take a few bytes for millions of values."""
    codes = np.zeros(LARGE, np.uint8)
    packed = np.frombuffer(bz2.compress(codes.tobytes(), 9), np.uint8)
    dxo = from_flare((LARGE,), norm=0.1, quantization_level=15, new_dtype="u1", compressed_tensor=packed)
    dequantizer, ctx = after_sending(at, {"w": constant((LARGE,))})
    assert received(dequantizer, dxo, ctx).shape == (LARGE,)
    dequantizer, ctx = after_sending(at, {"w": constant((LARGE - 1,))})
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="'w': it stands for"):
            received(dequantizer, dxo, ctx)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("message", [ours, from_flare])
def test_a_site_gets_large_constants_as_views(at, message):
    """It knows nothing of the model that comes first, and memory is taken when somebody needs it."""
    dequantizer = ModelDequantizer()
    ctx = at("client in", dequantizer)
    for _ in range(2):  # what was only a view is not expected the next time either
        tracemalloc.start()
        try:
            dxo = message((400,), 2.5)
            dxo.meta["quant_state"]["w"]["tensor_shape"] = [50, 1 << 40]
            got = received(dequantizer, dxo, ctx)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()
        assert got.shape == (50, 1 << 40)
        assert got[49, -1] == 2.5
        got = got[:2, :3] * 2
        assert got[1, 2] == 5


def test_many_constants_add_up(at):
    params = {f"w{i}": constant((2 << 20,)) for i in range(10)}
    made = ModelQuantizer("adaquant").process(DXO(DataKind.WEIGHTS, data=params).to_shareable(), FLContext())
    dequantizer, ctx = after_sending(at, {})
    with pytest.raises(CodecError, match="is not expected to have as many"):
        dequantizer.process(made, ctx)
    dequantizer, ctx = after_sending(at, params)
    assert len(from_shareable(dequantizer.process(made, ctx)).data) == 10


@pytest.mark.parametrize(("models", "taken"), [(1, True), (2, True), (3, False), (40, False)])
def test_a_collection_is_one_message(at, models, taken):
    """Each of its models alone would be taken: by the size of the model that was sent, or as one of a few values."""
    dequantizer, ctx = after_sending(at, {"w": constant((1 << 20,))})
    parts = {f"part-{i}": from_flare((1 << 20,)) for i in range(models)}
    for part in parts.values():
        part.data["other"], part.meta["source_datatype"]["other"] = part.data["w"], "float32"
        part.meta["quant_state"]["other"] = {"offset": 0.0, "tensor_shape": [6 << 20]}
    message = DXO(DataKind.COLLECTION, data=parts).to_shareable()
    if taken:
        got = from_shareable(dequantizer.process(message, ctx)).data
        assert {part.data["other"].shape for part in got.values()} == {(6 << 20,)}
    else:
        with pytest.raises(CodecError, match=r"it stands for \d+ values, but is not expected"):
            dequantizer.process(message, ctx)


def test_a_difference_from_a_base_may_have_its_size(at):
    """Nothing was sent that the server remembers, but it holds the base."""
    from nvflare_rdma.filters.decoding import Metadata, decode_params
    from nvflare_rdma.filters.delta_base import Base

    base = Base("digest", {"w": np.arange(LARGE, dtype=np.float32)})
    dxo = ours((LARGE,), 2.0)
    dxo.meta["quant_state"]["w"]["delta"] = True
    meta = Metadata("adaquant", dxo.meta["quant_state"], dxo.meta["source_datatype"])
    got = decode_params(dxo.data, meta, base, strict=True).values["w"]
    np.testing.assert_array_equal(got[[0, 1, 1000]], [2, 3, 1002])
    dxo.meta["quant_state"]["w"]["tensor_shape"] = [LARGE + 1]
    with pytest.raises(CodecError, match=r"'w'.*isn't here"):
        decode_params(dxo.data, meta, base, strict=True)


def test_collections_are_expected_by_place_and_results_may_have_another_form():
    expected = Expected()
    parts = {"a": DXO(DataKind.WEIGHTS, data={"w": np.zeros(3)}), "b": DXO(DataKind.WEIGHTS, data={"w": np.zeros(5)})}
    expected.note_sent("train", "site-1", DXO(DataKind.COLLECTION, data=parts).to_shareable())
    expected.note_sent("train", "site-1", DXO(DataKind.METRICS, data={"x": 1}).to_shareable())
    expected.note_sent("train", "site-1", None)
    assert expected.of("train", "site-1", "/a") == {"w": 3}
    assert expected.of("train", "site-1", "") == {"w": 5}
    assert expected.of("train", "site-1", "/c", count=2) == {"w": 5}
    assert expected.of("train", "site-1", "/c", count=3) == {}
    many = {f"{i}": DXO(DataKind.WEIGHTS, data={"w": np.zeros(i)}) for i in range(1, 5)}
    expected.note_sent("many", "site-1", DXO(DataKind.COLLECTION, data=many).to_shareable())
    assert expected.of("many", "site-1", "/3", count=4) == {"w": 3}
    assert expected.of("many", "site-1", "/new", count=4) == {}, "each of four would have room for the largest"
    assert expected.of("train", "site-2", "/a") == {}
    nested = DXO(DataKind.WEIGHTS, data={"x": {"w": np.zeros((2, 2))}, "steps": 3})
    expected.note_sent("train", "site-2", nested.to_shareable())
    assert expected.of("train", "site-2", "") == {"x/w": 4}


def test_flares_quantizer_leaves_a_wide_tensor_as_it_is():
    """It has found no fewer bits for it, and says so with an empty state."""
    wide = torch.linspace(-1e5, 1e5, 1000).half()
    dxo = from_flare((1000,))
    dxo.data["w"], dxo.meta["quant_state"]["w"], dxo.meta["source_datatype"]["w"] = wide, {}, "float16"
    got = received(ModelDequantizer(), dxo, FLContext())
    assert got is wide


def compressed(n):
    """What FLARE's quantizer makes of values whose codes it compresses."""
    codes = np.random.default_rng(0).integers(0, 2, n, np.uint8)
    packed = np.frombuffer(bz2.compress(codes.tobytes(), 1), np.uint8)
    return from_flare((n,), norm=0.1, quantization_level=255, new_dtype="u1", compressed_tensor=packed)


@pytest.mark.parametrize("point", ["client in", "server in"])
def test_flares_compressed_codes_count_where_they_lie(at, point):
    """Nothing is known of the model, and the codes are in the state; the tensor beside it has but one value."""
    dequantizer = ModelDequantizer()
    dxo = compressed(LARGE)
    assert dxo.meta["quant_state"]["w"]["compressed_tensor"].nbytes > LARGE // 16
    assert received(dequantizer, dxo, at(point, dequantizer)).shape == (LARGE,)


@pytest.mark.parametrize("sent", [{}, {"w": constant((9,))}])
def test_what_travels_exact_beside_it_gives_a_tensor_no_room(at, sent):
    """Few bytes would be many times as much memory as the whole message takes."""
    dequantizer, ctx = after_sending(at, sent)
    dxo = ours((LARGE,))
    dxo.data["padding"], dxo.meta["source_datatype"]["padding"] = np.zeros(LARGE, np.uint8), "bool"
    with pytest.raises(CodecError, match=f"'w': it stands for {LARGE} values"):
        received(dequantizer, dxo, ctx)


def test_the_first_model_of_a_site_may_be_nearly_all_zero(at):
    """`lossless` has more values for each byte than the server would take unasked."""
    sparse = np.zeros(LARGE, np.float32)
    sparse[np.random.default_rng(0).integers(0, LARGE, LARGE >> 10)] = 1.5
    dxo = DXO(DataKind.WEIGHTS, data={"w": sparse})
    made = from_shareable(ModelQuantizer("lossless").process(dxo.to_shareable(), FLContext()))
    assert made.data["w"].nbytes < LARGE // 64
    dequantizer = ModelDequantizer()
    np.testing.assert_array_equal(received(dequantizer, made, at("client in", dequantizer)), sparse)
    with pytest.raises(CodecError, match=f"'w': it stands for {LARGE} values"):
        received(dequantizer, made, at("server in", dequantizer))


@pytest.mark.parametrize("on_the_way", [0, 1])
def test_the_log_tells_of_views(at, caplog, on_the_way):
    dequantizer = ModelDequantizer()
    dxo = from_flare((1 << 40,))
    dxo.data["exact"], dxo.meta["source_datatype"]["exact"] = torch.zeros(3), "bool"
    if on_the_way:
        dxo.meta["nvflare_rdma"] = {"on_the_way": on_the_way}
    with caplog.at_level(logging.INFO):
        received(dequantizer, dxo, at("client in", dequantizer))
    (line,) = [line for line in caplog.messages if "Dequantized from" in line]
    assert "1/2 params" in line
    assert "0.00 MB, and 1 constants are views of one value each." in line
    assert "None were decoded here" not in line


class _Data:
    """What FLARE's controller has for all sites: one DXO, whose data and metadata they share."""

    def __init__(self, **model):
        self.message = DXO(DataKind.WEIGHTS, data=model).to_shareable()

    def send(self, dequantizer, ctx, quantizer=None):
        shared = make_copy(self.message)
        ctx.set_prop(FLContextKey.TASK_DATA, shared, private=True, sticky=False)
        dequantizer.handle_event(EventType.BEFORE_TASK_DATA_FILTER, ctx)
        if quantizer is not None:
            quantizer.process(shared, ctx)


@pytest.mark.parametrize("first_is_known", [True, False])
def test_flares_quantizer_at_the_server_changes_what_the_next_site_is_sent(at, first_is_known):
    """It puts codes into the data of all sites: the constant is one value there."""
    data, dequantizer = _Data(w=torch.zeros(LARGE)), ModelDequantizer()
    quantizer = flares_quantizer("adaquant")
    first = named(at("server in", dequantizer), "site-1")
    if first_is_known:
        data.send(dequantizer, first, quantizer)
    else:
        quantizer.process(make_copy(data.message), first)
    assert from_shareable(data.message).data["w"].shape == (1,)
    second = named(at("server in", dequantizer), "site-2")
    if first_is_known:
        second.set_prop("nvflare_rdma.expected", first.get_prop("nvflare_rdma.expected"), private=True, sticky=True)
    data.send(dequantizer, second)
    assert received(dequantizer, ours((LARGE,)), second).shape == (LARGE,)


def test_codes_that_say_nothing_of_themselves_are_expected_in_the_size_that_others_got():
    """FLARE's quantizer changes the data before it changes the metadata."""
    expected, data = Expected(), {"w": np.zeros(9), "x": np.zeros(2)}
    expected.note_sent("train", "site-1", DXO(DataKind.WEIGHTS, data=data).to_shareable())
    data["w"] = np.zeros(1, np.bool_)
    expected.note_sent("train", "site-2", DXO(DataKind.WEIGHTS, data=data).to_shareable())
    expected.note_sent("other", "site-2", DXO(DataKind.WEIGHTS, data=data).to_shareable())
    assert expected.of("train", "site-2", "") == {"w": 9, "x": 2}
    assert expected.of("other", "site-2", "") == {"w": 1, "x": 2}
