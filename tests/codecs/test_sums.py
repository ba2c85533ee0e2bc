"""Adding what a codec decodes to a sum: the bits are those of decoding first, and of torch's `add_` then."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, add_scaled, get_codec
from nvflare_rdma.codecs.runs import TILE
from nvflare_rdma.errors import CodecError

torch = pytest.importorskip("torch")

FIXED = [name for name in CODEC_NAMES if isinstance(get_codec(name), FixedSizeCodec)]
SETTINGS = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
NEAR_BLOCKS = [0, 1, 2, 3, 63, 64, 65, 1023, 1024, 1025, 4095, 4097, 8193, TILE - 1, TILE, TILE + 1, 16 * TILE + 65]
lengths = st.one_of(st.sampled_from(NEAR_BLOCKS), st.integers(0, 9000))
weights = st.one_of(st.floats(-1e4, 1e4, width=32), st.integers(1, 100_000).map(float))
#: Where torch has no fused multiply-add of vectors, it rounds twice.
ROUNDS_ONCE = torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def encoded_values(codec, n, seed):
    values = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    encoded = np.empty(codec.encoded_nbytes(n), np.uint8)
    codec.encode_into(values, encoded)
    decoded = np.empty(n, np.float32)
    codec.decode_into(encoded, decoded)
    return encoded, decoded


def assert_like_torch(got, before, decoded, weight):
    wanted = torch.from_numpy(before.copy()).add_(torch.from_numpy(decoded), alpha=float(weight)).numpy()
    if ROUNDS_ONCE:
        np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))
    else:
        spacing = np.spacing(np.maximum(np.abs(before), np.abs(np.float32(weight) * decoded)))
        assert (np.abs(got - wanted) <= spacing).all()


@pytest.mark.parametrize("name", FIXED)
@SETTINGS
@given(seed=st.integers(0, 2**32), n=lengths, weight=weights)
def test_a_sum_has_the_bits_of_decoding_and_adding(name, seed, n, weight):
    codec = get_codec(name)
    encoded, decoded = encoded_values(codec, n, seed)
    before = np.random.default_rng(seed + 1).standard_normal(n).astype(np.float32)
    out = before.copy()
    codec.add_into(encoded, weight, out)
    assert_like_torch(out, before, decoded, weight)
    out = before.copy()
    codec.add_parts_into(codec.parts(encoded, n), weight, out)
    assert_like_torch(out, before, decoded, weight)
    out = before.copy()
    add_scaled(decoded, weight, out)
    assert_like_torch(out, before, decoded, weight)


@pytest.mark.parametrize("name", FIXED)
def test_runs_equal_the_whole(name):
    codec, n = get_codec(name), 3 * TILE + 77
    encoded, decoded = encoded_values(codec, n, 1)
    parts, whole, out = codec.parts(encoded, n), np.ones(n, np.float32), np.ones(n, np.float32)
    values = np.empty(n, np.float32)
    codec.add_into(encoded, 0.3, whole)
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        codec.add_parts_into(codec.parts_of_run(parts, start, stop), 0.3, out[start:stop])
        codec.decode_parts_into(codec.parts_of_run(parts, start, stop), values[start:stop])
    np.testing.assert_array_equal(out, whole)
    np.testing.assert_array_equal(values, decoded)


@pytest.mark.parametrize("name", FIXED)
def test_bytes_at_any_address_and_what_is_not_finite(name):
    codec, n = get_codec(name), 5000
    rng = np.random.default_rng(5)
    room = np.empty(codec.encoded_nbytes(n) + 1, np.uint8)
    room[:] = rng.integers(0, 256, room.size)  # what no encoder makes, NaN and Inf among the scales
    encoded, decoded, out = room[1:], np.empty(n, np.float32), np.full(n, 2, np.float32)
    codec.decode_into(encoded, decoded)
    codec.add_into(encoded, 1.5, out)
    with np.errstate(all="ignore"):
        wanted = torch.full((n,), 2.0).add_(torch.from_numpy(decoded), alpha=1.5).numpy()
    np.testing.assert_allclose(out, wanted, rtol=0 if ROUNDS_ONCE else 2e-7)


@pytest.mark.parametrize("name", FIXED)
def test_what_can_not_be_added_to_is_refused(name):
    codec = get_codec(name)
    encoded, _ = encoded_values(codec, 256, 0)
    read_only = np.zeros(256, np.float32)
    read_only.flags.writeable = False
    wrong = [np.zeros(256), np.zeros(256, np.float16), np.zeros(512, np.float32)[::2], read_only]
    for out in [*wrong, np.zeros((16, 16), np.float32)]:
        with pytest.raises(CodecError):
            codec.add_into(encoded, 1.0, out)
        assert not out.any()
    with pytest.raises(CodecError):
        codec.add_into(encoded[:-1], 1.0, np.zeros(256, np.float32))
    with pytest.raises(CodecError):
        codec.add_parts_into({}, 1.0, np.zeros(256, np.float32))


@pytest.mark.parametrize("name", FIXED)
def test_threads_do_not_share_scratch(name):
    codec, n = get_codec(name), 2 * TILE
    inputs = [encoded_values(codec, n, seed) for seed in range(3)]
    failures = []

    def work(encoded, decoded):
        wanted = np.zeros(n, np.float32)
        add_scaled(decoded, 2.0, wanted)
        for _ in range(3):
            out = np.zeros(n, np.float32)
            codec.add_into(encoded, 2.0, out)
            if out.tobytes() != wanted.tobytes():
                failures.append(1)

    threads = [threading.Thread(target=work, args=each) for each in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
