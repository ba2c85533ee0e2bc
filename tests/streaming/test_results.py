"""Results that a server has no memory for wait on disk, whatever comes, and are added from there."""

from __future__ import annotations

import gc
import math
import os
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_rdma.accumulate import is_encoded_tensor
from nvflare_rdma.codecs import get_codec
from nvflare_rdma.runtime import Shared
from nvflare_rdma.streaming.results import Results
from nvflare_rdma.transfer import Item, store_chunk
from nvflare_rdma.transfer.pieces import PieceLayout

SHAPE = (300, 700)  # 840,000 bytes of float32, and 118,125 in 4 bits; those of int8 are 210,000
MIB = 1024 * 1024


def message(codec="", dtype="float32", seed=0, shape=SHAPE):
    """A tensor, as it is described, as it is sent, and as it has to arrive."""
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
    values = values.to(getattr(torch, dtype))
    if not codec:
        raw = values.reshape(-1).view(torch.uint8).numpy().tobytes()
        return Item("w", True, dtype, shape), raw, values
    layout = PieceLayout.choose(get_codec(codec), math.prod(shape))
    flat, arrived, sent = values.numpy().reshape(-1), np.empty(values.numel(), np.float32), bytearray()
    for start in range(0, layout.n, layout.values):
        part = flat[start : start + layout.values]
        piece = np.empty(layout.codec.encoded_nbytes(part.size), np.uint8)
        layout.codec.encode_into(part, piece)
        layout.codec.decode_into(piece, arrived[start : start + layout.values])
        sent += piece.tobytes()
    return Item("w", True, dtype, shape, cut=layout), bytes(sent), torch.from_numpy(arrived).reshape(shape)


def arrive(results, item, sent, order=None):
    """Land it in chunks of a unit or 64 KiB, in any order and by several threads, as a transfer does."""
    place = results.land(item)
    step = max(item.unit, 65536) // item.unit * item.unit
    starts = list(range(0, len(sent), step))
    random.Random(order).shuffle(starts)
    with ThreadPoolExecutor(3) as pool:
        for done in [
            pool.submit(store_chunk, item, place, start, memoryview(sent)[start : start + step]) for start in starts
        ]:
            done.result()
    return place.finish()


def new(budget=MIB):
    shared = Shared()
    shared.holdings.start(budget)
    return Results(shared, "site-1.job"), shared


@pytest.mark.parametrize("codec", ["", "int8"])
def test_what_memory_has_room_for_is_there_and_the_rest_on_disk(codec):
    results, shared = new()
    sent = [message(codec, seed=i) for i in range(9)]
    tensors = [arrive(results, item, chunks) for item, chunks, _ in sent]
    size = len(sent[0][1])
    fits = MIB // shared.tensor_memory.cost(size)
    assert 1 <= fits < 9
    assert shared.tensor_memory.used_bytes <= MIB
    assert shared.holdings.on_disk == (9 - fits) * size
    assert [is_encoded_tensor(tensor) for tensor in tensors] == [bool(codec) or i >= fits for i in range(9)]
    total, wanted = torch.zeros(SHAPE), torch.zeros(SHAPE)
    for tensor, (_, _, arrived) in zip(tensors, sent, strict=True):
        total.add_(tensor, alpha=3)
        wanted.add_(arrived, alpha=3)
    assert torch.allclose(total, wanted, rtol=1e-6, atol=1e-6)
    assert shared.holdings.take()["results_decoded_bytes"] == 0
    del tensors, tensor
    gc.collect()
    assert shared.holdings.held == shared.holdings.on_disk == shared.tensor_memory.used_bytes == 0


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from([("", "float32"), ("", "float16"), ("", "bfloat16"), ("normfloat4", "float32")]),
    shape=st.sampled_from([(131, 1009), (262_145,), (70_000, 9), (1, 512, 513)]),
    weight=st.integers(1, 9),
)
def test_what_was_on_disk_has_the_bits_that_came(seed, kind, shape, weight):
    results, shared = new(budget=0)
    item, sent, arrived = message(*kind, seed=seed, shape=shape)
    tensor = arrive(results, item, sent, seed)
    assert (len(sent) < 131_072) == (shared.holdings.on_disk == 0)  # the smallest are in memory
    product, wanted = tensor.mul(weight), arrived.mul(weight)
    assert torch.equal(product, wanted)
    total = torch.ones(shape, dtype=arrived.dtype)
    torch.testing.assert_close(total.clone().add_(tensor, alpha=weight), total.add_(arrived, alpha=weight))
    assert torch.equal(tensor.clone(), arrived)
    assert torch.equal(tensor + 0, arrived)  # whatever else is done makes a tensor of it
    assert shared.holdings.on_disk == 0


@pytest.mark.parametrize(
    "item",
    [
        Item("i", True, "int64", (100_000,)),
        Item("n", False, "float32", (100_000,)),
        Item("s", True, "float32", (1000,)),
    ],
    ids=["integers", "numpy", "small"],
)
def test_what_nobody_adds_in_runs_is_a_tensor_in_memory(item):
    results, shared = new(budget=0)
    tensor = arrive(results, item, bytes(item.nbytes))
    assert not is_encoded_tensor(tensor)
    assert tensor.shape == item.shape
    assert shared.holdings.on_disk == 0


@pytest.mark.parametrize("codec", ["", "int8"])
def test_where_the_disk_takes_nothing_they_are_in_memory_and_the_log_says_so_once(codec, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    results, shared = new(budget=0)
    for seed in (1, 2):
        item, sent, arrived = message(codec, seed=seed)
        tensor = arrive(results, item, sent)
        assert is_encoded_tensor(tensor) == bool(codec)
        assert torch.equal(tensor + 0, arrived)
    assert shared.holdings.on_disk == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert f"{len(sent)} bytes can't be on disk in {tmp_path / 'gone'}: " in warnings[0]
    assert "free disk space there, or set TMPDIR" in warnings[0]


def open_spools():
    """The files without a name that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if name.startswith(tempfile.gettempdir()) and name.endswith("(deleted)"):
            found.append(name)
    return found


def test_a_message_that_does_not_come_whole_leaves_nothing():
    before = open_spools()
    results, _ = new(budget=0)
    item, sent, _ = message()
    place = results.land(item)
    assert open_spools() == before  # a description takes no room
    place.write(0, memoryview(sent)[:65536])
    assert len(open_spools()) == len(before) + 1
    del place, results
    gc.collect()
    assert open_spools() == before


def test_a_result_that_its_disk_has_lost_is_an_error_and_no_other_values():
    results, _ = new(budget=0)
    item, sent, _ = message()
    tensor = arrive(results, item, sent)
    (fd,) = [fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_spool(fd)]
    os.truncate(f"/proc/self/fd/{fd}", len(sent) // 2)
    total = torch.zeros(SHAPE)
    with pytest.raises(OSError, match="ends before the result does"):
        total.add_(tensor)
    assert not total.any()  # nor is a part of it added


def test_a_result_that_breaks_off_while_it_is_added_leaves_no_sum_to_be_taken_for_one(monkeypatch):
    results, _ = new(budget=0)
    item, sent, _ = message()
    tensor = arrive(results, item, sent)
    monkeypatch.setattr(type(tensor.state.encoded), "check", lambda self: None)  # it breaks after it was looked at
    (fd,) = [fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_spool(fd)]
    os.truncate(f"/proc/self/fd/{fd}", len(sent) // 2)
    total = torch.zeros(SHAPE)
    with pytest.raises(OSError, match="ends before the result does"):
        total.add_(tensor)
    assert total.isnan().all()


def _is_spool(fd):
    try:
        return "(deleted)" in os.readlink(f"/proc/self/fd/{fd}") and os.fstat(fd).st_size == math.prod(SHAPE) * 4
    except OSError:
        return False
