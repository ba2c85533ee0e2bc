"""Marked tensors are encoded piece by piece on their way, and nowhere as a whole."""

from __future__ import annotations

import math
import queue
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.channel import MAX_UNIT_BYTES, MIN_CHUNK_BYTES
from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, get_codec
from nvflare_rdma.codecs.marks import codec_of, marked, was_decoded
from nvflare_rdma.codecs.tensors import to_flat
from nvflare_rdma.errors import ProtocolError, UnrepresentableError
from nvflare_rdma.streaming.relay import RelayConsumer, produce
from nvflare_rdma.transfer import manifest, sender
from nvflare_rdma.transfer.encoding import EncodedChunkCache, Encoding, PieceEncoder, SharedSource, decode_pieces
from nvflare_rdma.transfer.pieces import PieceLayout
from nvflare_rdma.transfer.places import OnDisk, in_memory
from tests.support.direct_transfers import assert_equal
from tests.support.encoded import as_encoded
from tests.support.tcp_pair import DEADLINE, in_parallel
from tests.support.waiting import eventually

FIXED = [name for name in CODEC_NAMES if isinstance(get_codec(name), FixedSizeCodec)]
SHAPE = (700, 701)


def weights(dtype=torch.float32, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def new(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


@pytest.mark.parametrize("codec", FIXED)
def test_a_marked_tensor_arrives_as_its_codec_leaves_it(direct, cell, codec):
    sent = weights()
    it = direct({"x": marked(sent, get_codec(codec)), "exact": sent})
    got = it.pull(cell("site-1"))
    assert np.array_equal(to_flat(got["x"]), as_encoded(sent, codec))
    assert (got["x"].dtype, tuple(got["x"].shape)) == (torch.float32, SHAPE)
    assert_equal({"exact": got["exact"]}, {"exact": sent})
    eventually(lambda: it.moved)
    assert it.moved[0][1] < sent.nbytes


@pytest.mark.parametrize("codec", ["normfloat4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_16_bits(direct, cell, codec, dtype):
    sent = weights(dtype)
    got = direct({"x": marked(sent, get_codec(codec))}).pull(cell("site-1"))["x"]
    assert got.dtype == dtype
    assert np.array_equal(to_flat(got), as_encoded(sent, codec))


def test_arrays_and_tensors_that_are_not_contiguous(direct, cell):
    array, tensor = weights().numpy(), weights().t()
    codec = get_codec("blockwise8")
    got = direct({"array": marked(array, codec), "tensor": marked(tensor, codec)}).pull(cell("site-1"))
    assert isinstance(got["array"], np.ndarray)
    assert np.array_equal(to_flat(got["array"]), as_encoded(array, "blockwise8"))
    assert np.array_equal(to_flat(got["tensor"]), as_encoded(tensor, "blockwise8"))


def test_what_the_codec_can_not_carry_travels_exact_and_the_rest_encoded(direct, cell, caplog):
    broken = weights()
    broken[600, 7] = math.nan
    codec = get_codec("normfloat4")
    it = direct({"a": marked(weights(), codec), "b": marked(broken, codec), "c": marked(weights(), codec)})
    for site in ("site-1", "site-2"):  # the second is told at once
        got = it.pull(cell(site))
        assert_equal({"b": got["b"]}, {"b": broken})
        assert [was_decoded(got[name]) for name in "abc"] == [True, False, True]
        for name in "ac":
            assert np.array_equal(to_flat(got[name]), as_encoded(weights(), "normfloat4"))
    assert caplog.text.count("is sent exact: normfloat4 can't carry NaN or Inf") == 1


def test_a_receiver_that_asks_again_before_the_sender_knows_why(direct, cell, monkeypatch):
    broken, here = weights(), threading.Event()
    broken[600, 7] = math.nan
    wait = sender.OfferThread._wait_for_one
    monkeypatch.setattr(sender.OfferThread, "_wait_for_one", lambda self: (here.wait(DEADLINE), wait(self)))
    it = direct({"b": marked(broken, get_codec("normfloat4"))})
    assert_equal(it.pull(cell("site-1")), {"b": broken})
    here.set()


def test_it_lands_in_files_as_well(direct, cell, tmp_path):
    from safetensors import safe_open

    sent = {"x": marked(weights(), get_codec("normfloat4")), "y": weights(torch.bfloat16), "small": torch.arange(3)}
    got = direct(sent).pull(cell("site-1"), land=lambda item: OnDisk(item, str(tmp_path / item.name)))
    loaded = {}
    for name, (path, key) in got.items():
        with safe_open(path, framework="pt") as file:
            loaded[name] = file.get_tensor(key)
    assert np.array_equal(to_flat(loaded["x"]), as_encoded(weights(), "normfloat4"))
    assert_equal({name: loaded[name] for name in ("y", "small")}, {name: sent[name] for name in ("y", "small")})


def test_many_receivers_of_one_tensor_at_once(direct, cell):
    sent = {f"t{i}": marked(weights(), get_codec("normfloat4")) for i in range(8)}
    it = direct(sent)
    expected = as_encoded(weights(), "normfloat4")

    def receive(site: str) -> None:
        for tensor in it.pull(cell(site)).values():
            assert np.array_equal(to_flat(tensor), expected)

    in_parallel(*(lambda site=site: receive(site) for site in ("site-1", "site-2", "site-3")))
    eventually(lambda: not it.service._content._cache._chunks)  # when no receiver waits for them


def test_chunks_in_shared_memory_are_not_too_long_for_other_receivers(direct, cell, monkeypatch):
    """Raw ones are longer, and one that is longer than `EncodedChunkCache` takes would be encoded for each."""
    lengths, read = [], Encoding.read
    monkeypatch.setattr(Encoding, "read", lambda self, *what: (lengths.append(what[1]), read(self, *what))[1])
    kinds = {"fabrics": ("shm", "tcp"), "budget": 4 << 20}
    values = torch.ones(10 << 20)
    it, site = direct({"t": marked(values, get_codec("normfloat4"))}, **kinds), cell("site-1", **kinds)
    it.pull(site)
    assert site.find("server").fabric == "shm"
    assert sum(lengths) > values.numel() // 2
    assert max(lengths) <= kinds["budget"] // 16  # what `transfer.install` leaves it


def test_a_chunk_that_two_receivers_want_is_encoded_once():
    tensor, codec, cache = weights(), get_codec("normfloat4"), EncodedChunkCache()
    view, cut = marked(tensor, codec), PieceLayout.choose(codec, tensor.numel())
    encoding = cache.encoding(view, cut)
    one = SharedSource(encoding)
    first = bytes(one.read(0, cut.unit, new))
    tensor.zero_()  # so that it shows who encodes again
    assert bytes(one.read(0, cut.unit, new)) != first, "kept, though nobody else wants it"
    other = SharedSource(cache.encoding(view, cut))
    assert other.chunks is encoding
    zeros = bytes(other.read(0, cut.unit, new))
    tensor.fill_(1.0)
    assert bytes(one.read(0, cut.unit, new)) == zeros
    del one, other, encoding
    assert not cache._chunks
    assert cache._held == 0


def test_who_wants_a_chunk_that_is_being_encoded_waits_for_it(monkeypatch):
    tensor, codec, cache = weights(), get_codec("normfloat4"), EncodedChunkCache()
    cut = PieceLayout.choose(codec, tensor.numel())
    sources = [SharedSource(cache.encoding(tensor, cut)) for _ in range(2)]
    encode, begun, go_on, calls = PieceEncoder._encode, threading.Event(), threading.Event(), []

    def slowly(self, first, last, out):
        calls.append(first)
        begun.set()
        assert go_on.wait(DEADLINE)
        encode(self, first, last, out)

    monkeypatch.setattr(PieceEncoder, "_encode", slowly)
    found, taken = queue.SimpleQueue(), threading.Event()

    def take(nbytes):
        taken.set()
        return new(nbytes)

    threads = [
        threading.Thread(target=lambda take=take, source=source: found.put(bytes(source.read(0, cut.unit, take))))
        for source, take in zip(sources, (new, take), strict=True)
    ]
    threads[0].start()
    assert begun.wait(DEADLINE)
    threads[1].start()
    assert taken.wait(DEADLINE)  # it has looked, and found nothing
    go_on.set()
    assert found.get(timeout=DEADLINE) == found.get(timeout=DEADLINE)
    assert calls == [0]
    for thread in threads:
        thread.join(DEADLINE)


def test_hot_chunks_stay_within_their_limit():
    cache = EncodedChunkCache(100)
    for i in range(10):
        cache.put((1, i, 30), memoryview(bytes([i]) * 30))
    assert [cache.get((1, i, 30)) is not None for i in range(10)] == [False] * 7 + [True] * 3
    cache.put((1, 0, 101), memoryview(bytes(101)))
    assert cache.get((1, 0, 101)) is None
    cache.forget(1)
    assert cache._held == 0


@settings(deadline=None, max_examples=60)
@given(
    codec=st.sampled_from(FIXED),
    n=st.one_of(st.integers(1, 5000), st.integers(1, 1 << 19)),
    per_chunk=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_chunks_of_whole_units_make_the_tensor(codec, n, per_chunk, seed):
    values = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    cut = PieceLayout.choose(get_codec(codec), n)
    assert MIN_CHUNK_BYTES <= cut.unit <= MAX_UNIT_BYTES
    encoding, out = Encoding(values, cut, EncodedChunkCache()), np.empty_like(values)
    offsets = list(range(0, cut.nbytes, per_chunk * cut.unit))
    for offset in reversed(offsets):
        length = min(per_chunk * cut.unit, cut.nbytes - offset)
        chunk = encoding.read(offset, length, new)
        assert len(chunk) == length
        memory = out.data.cast("B")
        for start, decoded in decode_pieces(cut, "float32", offset, chunk, memory):
            assert bytes(memory[start : start + len(decoded)]) == bytes(decoded)
    assert np.array_equal(out, as_encoded(values, codec))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_can_not_be_carried_shows_where_it_is(value):
    values = weights()
    codec = get_codec("normfloat4")
    cut = PieceLayout.choose(codec, values.numel())
    values[699, 700] = value
    Encoding(values, cut, EncodedChunkCache()).read(0, cut.unit, new)
    with pytest.raises(UnrepresentableError):
        Encoding(values, cut, EncodedChunkCache()).read(cut.nbytes - cut.nbytes % cut.unit, cut.nbytes % cut.unit, new)


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("zip", 1 << 17, "unknown codec"),
        ("lossless", 1 << 17, "can't be cut"),
        ("normfloat4", 0, "pieces of 0 values"),
        ("normfloat4", 63, "pieces of 63 values"),
        ("normfloat4", 1 << 60, "pieces of"),
        ("normfloat4", 64, "no unit of a message"),
        ("float16", 1 << 22, "no unit of a message"),
    ],
)
def test_a_cut_that_can_not_be_is_refused(name, values, why):
    with pytest.raises(ProtocolError, match=why):
        PieceLayout.from_peer(name, 1000, values)


def test_a_mark_is_of_one_object_and_goes_with_it():
    for tensor in (weights(), weights().numpy(), torch.nn.Parameter(weights())):
        codec = get_codec("int8")
        view = marked(tensor, codec)
        assert codec_of(view) is codec
        assert codec_of(tensor) is None
        key = id(view)
        del view
        from nvflare_rdma.codecs.marks import _marks

        assert key not in _marks._entries


def test_what_can_not_be_carried_is_relayed_exact_from_there(direct, cell):
    """Piece by piece on FLARE's own path nothing can be asked for again."""
    broken = weights(shape=(3000, 1000))
    broken[2900, 7] = math.inf  # in its last pieces
    codec = get_codec("normfloat4")
    sent = {"a": marked(weights(), codec), "b": marked(broken, codec), "c": marked(weights(), codec)}
    it = direct(sent)
    items = manifest.unpack(it.ask("site-1")({"do": "relay"})["manifest"])
    consumer, state = RelayConsumer(items, in_memory(new)), None
    while True:
        code, data, state = produce(it.service.relayed("site-1"), state)
        if code == "eof":
            break
        assert produce(it.service.relayed("site-1"), state) is not None  # asked again after a lost answer
        state = consumer.consume("ref", state, data)
    consumer.download_completed("ref")
    assert consumer.error is None
    assert_equal({"b": consumer.result["b"]}, {"b": broken})
    for name in "ac":
        assert np.array_equal(to_flat(consumer.result[name]), as_encoded(weights(), "normfloat4"))
    it.ask("site-1")({"do": "give up"})
    assert it.service.relayed("site-1") is None
