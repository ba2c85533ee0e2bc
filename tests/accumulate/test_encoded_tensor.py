"""A tensor that came in few bits: what adds it has the bits of decoding and adding, all else sees a plain tensor."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from safetensors.torch import load, save

from nvflare_rdma.accumulate import EncodedParts, Holdings, InMemory, Pieces, encoded_tensor, is_encoded_tensor, plain
from nvflare_rdma.accumulate.torch_tensor import EncodedTensor
from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, get_codec, is_tensor, to_array

FIXED = [name for name in CODEC_NAMES if isinstance(get_codec(name), FixedSizeCodec)]
SETTINGS = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDS_ONCE = torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def make(name="normfloat4", shape=(40, 33), dtype="float32", seed=0, pieces=4096, whole=False):
    """An encoded tensor, the plain one that it has to be like, and what counts it."""
    codec, holdings = get_codec(name), Holdings()
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).to(DTYPES[dtype])
    flat, decoded = to_array(values).reshape(-1), torch.empty_like(values)
    out, n = to_array(decoded).reshape(-1), values.numel()
    if whole:
        encoded = np.empty(codec.encoded_nbytes(n), np.uint8)
        codec.encode_into(flat, encoded)
        codec.decode_into(encoded, out)
        made = EncodedParts(codec, codec.parts(encoded, n), n, dtype)
    else:
        memory = bytearray()
        for start in range(0, n, pieces):
            stop = min(start + pieces, n)
            encoded = np.empty(codec.encoded_nbytes(stop - start), np.uint8)
            codec.encode_into(flat[start:stop], encoded)
            codec.decode_into(encoded, out[start:stop])
            memory += encoded.tobytes()
        made = Pieces(codec, pieces, n, dtype, InMemory(memoryview(bytes(memory))))
    return encoded_tensor(made, tuple(shape), holdings), decoded, holdings


def same_bits(a, b):
    alike = type(a) is type(b) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("whole", [False, True], ids=["pieces", "whole"])
@pytest.mark.parametrize("name", FIXED)
@SETTINGS
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(1,), (7,), (3, 5, 1), (64, 64), (4096 + 1,), (100, 173), (2, 0)]),
    dtype=st.sampled_from(list(DTYPES)),
    weight=st.one_of(st.integers(1, 10_000), st.floats(-100, 100, width=32)),
)
def test_flares_aggregation_gets_the_same_bits(name, whole, seed, shape, dtype, weight):
    results = [make(name, shape, dtype, seed + i, whole=whole) for i in range(3)]
    for weigh in (True, False):
        ours, wanted = WeightedAggregationHelper(weigh_by_local_iter=weigh), WeightedAggregationHelper()
        wanted.weigh_by_local_iter = weigh
        for i, (encoded, decoded, _) in enumerate(results):
            ours.add({"w": encoded}, weight + i, f"site-{i}", 0)
            wanted.add({"w": decoded.clone()}, weight + i, f"site-{i}", 0)
        got, expected = ours.get_result()["w"], wanted.get_result()["w"]
        assert type(got) is torch.Tensor
        if dtype == "float32" and ROUNDS_ONCE:
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        else:  # torch rounds the ends of its vectors otherwise than the rest, and cuts tensors for its threads
            torch.testing.assert_close(got, expected, equal_nan=True, rtol=2e-2, atol=2e-2 * (abs(weight) + 1))
    for _, decoded, holdings in results:
        figures = holdings.take()
        assert holdings.held > 0 or decoded.numel() == 0  # it is still as it came
        assert figures["results_added_bytes"] >= decoded.nbytes


@pytest.mark.parametrize("number", [3, 2.5, np.float64(2.5)], ids=["int", "float", "numpy"])
def test_a_weight_of_either_kind_leaves_it_encoded(number):
    encoded, decoded, holdings = make()
    assert torch.equal(encoded.mul(number), decoded.mul(number))
    total = torch.ones(40, 33).add_(encoded, alpha=number)
    torch.testing.assert_close(total, torch.ones(40, 33).add_(decoded, alpha=number))
    assert holdings.take()["results_decoded_bytes"] == 0
    assert holdings.held > 0


def test_what_is_asked_of_a_tensor_leaves_it_encoded():
    encoded, decoded, holdings = make()
    for value in (encoded, encoded.detach(), encoded.cpu(), encoded.contiguous()):
        assert isinstance(value, torch.Tensor)
        assert is_encoded_tensor(value)
        assert is_tensor(value)
        assert (value.shape, value.dtype, value.device) == (decoded.shape, decoded.dtype, decoded.device)
        assert (value.requires_grad, value.layout, value.ndim) == (False, torch.strided, 2)
        assert (value.numel(), value.size(1), value.dim(), value.element_size()) == (decoded.numel(), 33, 2, 4)
        assert (value.nbytes, value.itemsize, len(value)) == (decoded.nbytes, 4, 40)
        assert value.stride() == decoded.stride()
        assert value.is_contiguous()
        assert value.is_floating_point()
        assert hasattr(value, "add_")
        assert not hasattr(value, "materialize")  # FLARE would call it
    assert holdings.take()["results_decoded_bytes"] == 0
    assert holdings.held > 0


USES = {
    "numpy": lambda t: t.numpy(),
    "array": lambda t: np.asarray(t),
    "array of a dtype": lambda t: np.array(t, dtype=np.float64),
    "list": lambda t: t.tolist(),
    "sum": lambda t: t.sum(),
    "index": lambda t: t[3, 4],
    "slice": lambda t: t[2:9],
    "compare": lambda t: t > 0,
    "plus": lambda t: t + torch.ones(33),
    "minus from": lambda t: 1 - t,
    "divide": lambda t: t / 3,
    "times": lambda t: t * 2.5,
    "times from the left": lambda t: 3 * t,
    "torch.mul": lambda t: torch.mul(t, 0.25),
    "times a tensor": lambda t: torch.ones(33) * t,
    "times a numpy number": lambda t: t * np.float64(1.25),
    "times more than a float32": lambda t: t.mul(1e39),
    "norm": lambda t: torch.linalg.vector_norm(t),
    "stack": lambda t: torch.stack([t, torch.zeros(40, 33)]),
    "cat in a tuple": lambda t: torch.cat((t, t)),
    "where": lambda t: torch.where(t > 0, t, torch.zeros(())),
    "to": lambda t: t.to(torch.float64),
    "half": lambda t: t.half(),
    "reshape": lambda t: t.reshape(-1),
    "transpose": lambda t: t.T,
    "data": lambda t: t.data,
    "clone": lambda t: t.clone(),
    "clone in a format": lambda t: t.clone(memory_format=torch.contiguous_format),
    "deep copy": copy.deepcopy,
    "deep copy in a dict": lambda t: copy.deepcopy({"a": t})["a"],
    "copy": copy.copy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "copy_": lambda t: torch.zeros(40, 33).copy_(t),
    "add_ to other dtype": lambda t: torch.zeros(40, 33, dtype=torch.float64).add_(t, alpha=2),
    "add_ to strided": lambda t: torch.zeros(33, 40).T.add_(t, alpha=2),
    "add_ broadcast": lambda t: torch.zeros(2, 40, 33).add_(t, alpha=2),
    "add_": lambda t: torch.ones(40, 33).add_(t, alpha=3),
    "sub_": lambda t: torch.ones(40, 33).sub_(t),
    "addcmul": lambda t: torch.addcmul(torch.zeros(40, 33), t, t, value=2),
    "state dict": lambda t: loaded_into_a_layer(t),
    "parameter": lambda t: torch.nn.Parameter(t).data,
    "as_tensor": lambda t: torch.as_tensor(t) + 0,
    "safetensors": lambda t: load(save({"t": t}))["t"],
    "torch.save": lambda t: saved(t),
    "shares memory": lambda t: torch.from_numpy(t.numpy()),
    "repr": repr,
}


def loaded_into_a_layer(tensor):
    layer = torch.nn.Linear(33, 40, bias=False)
    layer.load_state_dict({"weight": tensor})
    return layer.weight.data


def saved(tensor):
    out = io.BytesIO()
    torch.save({"t": tensor}, out)
    out.seek(0)
    return torch.load(out, weights_only=True)["t"]


@pytest.mark.parametrize("use", USES)
def test_whatever_else_is_done_gives_what_a_plain_tensor_gives(use):
    encoded, decoded, _ = make()
    for _ in range(2):  # the second time it may be decoded
        got, wanted = USES[use](encoded), USES[use](decoded)
        if isinstance(wanted, torch.Tensor):
            got = plain(got)
            assert same_bits(got, wanted), use
        elif isinstance(wanted, np.ndarray):
            np.testing.assert_array_equal(got, wanted)
            assert type(got) is type(wanted)
            assert got.dtype == wanted.dtype
        else:
            assert got == wanted


def test_what_is_done_in_place_stays():
    encoded, decoded, holdings = make()
    other = encoded.detach()
    encoded.mul_(2)
    encoded += 1
    wanted = decoded.mul(2).add(1)
    assert torch.equal(encoded, wanted)
    assert torch.equal(other, wanted)  # the same memory
    assert torch.equal(torch.zeros_like(wanted).add_(other, alpha=1), wanted)
    assert holdings.held == 0  # the codes are gone
    view = other.numpy()
    view[0, 0] = 77
    assert other[0, 0] == 77


def test_gradients_are_those_of_a_plain_tensor():
    encoded, decoded, _ = make()
    weight, wanted = torch.nn.Parameter(encoded), torch.nn.Parameter(decoded.clone())
    optimizer, other = torch.optim.SGD([weight], lr=0.5), torch.optim.SGD([wanted], lr=0.5)
    for parameter, step in ((weight, optimizer), (wanted, other)):
        (parameter * parameter).sum().backward()
        step.step()
    assert torch.equal(weight, wanted)
    assert not encoded.requires_grad


def test_it_is_freed_and_counted():
    encoded, decoded, holdings = make()
    held = holdings.held
    assert 0 < held < decoded.nbytes / 6
    assert holdings.take() == {
        "results_held_peak_bytes": held,
        "results_on_disk_peak_bytes": 0,
        "results_added_bytes": 0,
        "results_decoded_bytes": 0,
    }
    torch.zeros(40, 33).add_(encoded)
    encoded.sum()
    figures = holdings.take()
    assert figures["results_added_bytes"] == figures["results_decoded_bytes"] == decoded.nbytes
    assert holdings.held == 0
    again, _, holdings = make()
    del again
    gc.collect()
    assert holdings.held == 0


def test_threads_decode_it_once():
    encoded, decoded, holdings = make(shape=(1000, 1000), pieces=1 << 17)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(plain(encoded))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(tensor) for tensor in seen}) == 1
    assert torch.equal(seen[0], decoded)
    assert holdings.take()["results_decoded_bytes"] == decoded.nbytes


@pytest.mark.parametrize("whole", [False, True])
def test_large_ones_are_added_by_several_threads(whole):
    encoded, decoded, _ = make(shape=(3, 1 << 20), pieces=1 << 17, whole=whole)
    total, wanted = torch.ones(3, 1 << 20), torch.ones(3, 1 << 20)
    total.add_(encoded, alpha=0.7)
    wanted.add_(decoded, alpha=0.7)
    torch.testing.assert_close(total, wanted, rtol=0 if ROUNDS_ONCE else 1e-6, atol=0 if ROUNDS_ONCE else 1e-6)
    assert torch.equal(encoded.mul(0.3), decoded.mul(0.3))


def test_flares_serializer_takes_it_for_a_tensor():
    fobs.register(TensorDecomposer)
    encoded, decoded, _ = make()
    assert type(encoded) is EncodedTensor
    got = fobs.loads(fobs.dumps({"w": encoded, "again": [encoded]}))
    assert same_bits(got["w"], decoded)
    assert same_bits(got["again"][0], decoded)


def test_an_error_of_another_operation_is_torchs():
    encoded, decoded, _ = make()
    for use in (lambda t: t.view(7), lambda t: t @ t, lambda t: t.add_("x"), lambda t: torch.zeros(3).add_(t)):
        with pytest.raises(Exception) as wanted:  # noqa: PT011 - whatever torch raises
            use(decoded.clone())
        with pytest.raises(wanted.type):
            use(encoded)


def test_torchs_other_ways_to_call_are_understood():
    encoded, decoded, _ = make()
    out = torch.empty(40, 33)
    assert torch.mul(encoded, 2.0, out=out) is out
    assert torch.equal(out, decoded * 2)
    assert torch.equal(torch.mul(input=encoded, other=2), decoded * 2)
    assert torch.equal(torch.clone(input=encoded), decoded)
    assert torch.equal(torch.zeros(40, 33).add_(other=encoded, alpha=2), decoded * 2)


def test_a_damaged_piece_is_no_reason_to_crash():
    codec = get_codec("normfloat4")
    memory = memoryview(np.random.default_rng(0).integers(0, 256, codec.encoded_nbytes(1000), np.uint8))
    encoded = encoded_tensor(Pieces(codec, 4096, 1000, "float32", InMemory(memory)), (1000,), Holdings())
    total = torch.zeros(1000).add_(encoded, alpha=2)
    torch.testing.assert_close(total, torch.zeros(1000).add_(plain(encoded), alpha=2), rtol=0, atol=0, equal_nan=True)
