"""Every codec: sizes, pieces, bounds, bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, get_codec
from nvflare_rdma.codecs.runs import TILE, read_run, write_run
from nvflare_rdma.errors import CodecError, ConfigError, UnrepresentableError

SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
NEAR_BLOCKS = [0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 8193, TILE - 1, TILE, TILE + 1]
lengths = st.one_of(st.sampled_from(NEAR_BLOCKS), st.integers(0, 9000))


def make_values(seed: int, n: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n)
    if kind == "outliers":
        x[rng.random(n) < 0.01] *= 1000
    elif kind == "sparse":
        x[rng.random(n) < 0.9] = 0
    elif kind == "constant":
        x = np.full(n, -1.75)
    elif kind == "small":
        x *= 1e-6
    elif kind == "zero":
        x *= 0
    elif kind == "denormal":
        x *= 1e-41
    return x.astype(np.float32)


kinds = st.sampled_from(["normal", "outliers", "sparse", "constant", "small", "zero", "denormal"])


def encode(codec, x):
    out = np.full(codec.encoded_nbytes(x.size), 0xAA, np.uint8)
    used = codec.encode_into(x, out)
    assert used == out.size if isinstance(codec, FixedSizeCodec) else used <= out.size
    assert (out[used:] == 0xAA).all()
    return out[:used]


def decode(codec, encoded, n, dtype=np.float32):
    out = np.full(n, 77, dtype)
    codec.decode_into(encoded, out)
    return out


@pytest.mark.parametrize("name", CODEC_NAMES)
@SETTINGS
@given(seed=st.integers(0, 2**32), n=lengths, kind=kinds)
def test_round_trip_stays_within_the_stated_bound(name, seed, n, kind):
    codec = get_codec(name)
    x = make_values(seed, n, kind)
    before = x.copy()
    x.flags.writeable = False
    encoded = encode(codec, x)
    error = np.abs(decode(codec, encoded, n) - x)
    assert (error <= codec.max_abs_error(x, encoded)).all()
    np.testing.assert_array_equal(x, before)


# What the bound of a few thousand normally distributed values has to be below.
LIMITS = {
    "float16": 3e-3,
    "bfloat16": 2e-2,
    "blockwise8": 4e-2,
    "float4": 0.9,
    "normfloat4": 0.8,
    "float4_dq": 0.95,
    "normfloat4_dq": 0.85,
    "normfloat4_e4m3": 0.8,
    "float8_e4m3": 0.3,
    "int8": 2e-2,
    "int2": 5,
    "ternary": 5,
    "topk2": 5,
    "topk2_128": 5,
    "adaquant": 2e-2,
    "lossless": 1e-9,
    "exact_delta": 1e-9,
}


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_the_bound_is_worth_something(name):
    codec = get_codec(name)
    x = make_values(3, 4096 * 3 + 5, "normal")
    encoded = encode(codec, x)
    limit = LIMITS[name]
    assert codec.max_abs_error(x, encoded).max() < limit


@pytest.mark.parametrize("name", CODEC_NAMES)
@SETTINGS
@given(seed=st.integers(0, 2**32), n=st.integers(1, 30000), data=st.data())
def test_block_aligned_pieces_equal_the_whole(name, seed, n, data):
    codec = get_codec(name)
    x = make_values(seed, n, "outliers")
    encoded = encode(codec, x)
    cuts = data.draw(st.lists(st.integers(0, n // codec.block_size), max_size=4))
    edges = list(itertools.pairwise(sorted({0, n, *(c * codec.block_size for c in cuts)})))
    pieces = [encode(codec, x[a:b]) for a, b in edges]
    for part, whole in codec.parts(encoded, n).items() if codec.splits else ():
        side_by_side = [codec.parts(p, b - a)[part] for p, (a, b) in zip(pieces, edges, strict=True)]
        np.testing.assert_array_equal(np.concatenate(side_by_side), whole)
    if not codec.splits:
        return
    decoded = [decode(codec, p, b - a) for p, (a, b) in zip(pieces, edges, strict=True)]
    np.testing.assert_array_equal(np.concatenate(decoded), decode(codec, encoded, n))


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("spread", ["normal", "even", "constant", "one outlier", "a tenth zeros"])
def test_huge_values_stay_finite_or_are_refused(name, spread):
    rng, largest = np.random.default_rng(8), 3.3895e38  # bfloat16's largest, nearly
    x = {
        "normal": np.clip(rng.standard_normal(40_000) * 1.5e38, -largest, largest),
        "even": rng.uniform(-largest, largest, 40_000),
        "constant": np.full(40_000, largest),
        "one outlier": np.append(np.zeros(40_000), largest),
        # The scales' mean and their largest distance from it are such that the scale is rounded up to infinity.
        "a tenth zeros": np.repeat(largest * (np.arange(625) >= 65), 64),
    }[spread].astype(np.float32)
    codec = get_codec(name)
    try:
        encoded = encode(codec, x)
    except UnrepresentableError:
        assert name in ("float16", "adaquant", "float4_dq", "normfloat4_dq")
        return
    got = decode(codec, encoded, x.size)
    assert np.isfinite(got).all()
    with np.errstate(over="ignore"):
        assert (np.abs(got.astype(float) - x) <= codec.max_abs_error(x, encoded)).all()


CARRIES_ANY = ["float16", "bfloat16", "lossless", "exact_delta"]
FIXED_SIZE = [name for name in CODEC_NAMES if isinstance(get_codec(name), FixedSizeCodec)]


@pytest.mark.parametrize("name", FIXED_SIZE)
@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_sixteen_bit_sources_encode_like_their_float32_values(name, dtype):
    codec = get_codec(name)
    half = make_values(5, TILE + 4097, "normal").astype(np.float16)
    if dtype is np.float16:
        source, wide = half, half.astype(np.float32)
    else:
        source = (half.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        wide = (source.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(encode(codec, source), encode(codec, wide))


@pytest.mark.parametrize("name", [*FIXED_SIZE, "adaquant"])
def test_decoding_to_sixteen_bits_rounds_the_float32_result(name):
    torch = pytest.importorskip("torch")
    codec = get_codec(name)
    x = make_values(6, TILE + 100, "normal")
    encoded = encode(codec, x)
    full = torch.from_numpy(decode(codec, encoded, x.size))
    np.testing.assert_array_equal(decode(codec, encoded, x.size, np.float16), full.half().numpy())
    bits = decode(codec, encoded, x.size, np.uint16)
    np.testing.assert_array_equal(bits, full.bfloat16().view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("name", [c for c in CODEC_NAMES if c not in CARRIES_ANY])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 70, 4099, TILE + 3])
def test_block_scaled_codecs_refuse_values_that_are_not_finite(name, bad, where):
    x = make_values(1, TILE + 100, "normal")
    x[where] = bad
    with pytest.raises(UnrepresentableError, match=name):
        encode(get_codec(name), x)


@pytest.mark.parametrize("name", CARRIES_ANY)
def test_codecs_without_scales_carry_nan_and_inf(name):
    codec = get_codec(name)
    x = np.array([1, np.nan, np.inf, -np.inf, -0.0, 2.5, -np.nan], np.float32)
    x = np.concatenate([x, np.array([0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)])
    got = decode(codec, encode(codec, x), x.size)
    np.testing.assert_array_equal(got, x)
    np.testing.assert_array_equal(np.signbit(got[4]), True)


@pytest.mark.parametrize(("name", "fits", "too_big"), [("float16", 65519.0, 65520.0), ("bfloat16", 3.3895e38, 3.4e38)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_finite_value_is_never_turned_into_infinity(name, fits, too_big, sign):
    codec = get_codec(name)
    x = np.array([1, np.inf, sign * fits, np.nan], np.float32)
    assert np.isfinite(decode(codec, encode(codec, x), 4)[2])
    x[2] = sign * too_big
    with pytest.raises(UnrepresentableError, match="infinite"):
        encode(codec, x)


def test_bfloat16_rounds_like_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x00008000, 1], np.uint32).view(np.float32)])
    x = x[np.abs(x) < 3.38e38]  # also drops NaN
    wanted = torch.from_numpy(x).bfloat16()
    codes = encode(get_codec("bfloat16"), x).view(np.uint16)
    np.testing.assert_array_equal(codes, wanted.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(decode(get_codec("bfloat16"), codes, x.size), wanted.float().numpy())


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_bad_calls_are_refused_before_anything_is_written(name):
    codec = get_codec(name)
    x, size = np.zeros(128, np.float32), codec.encoded_nbytes(128)
    read_only = np.zeros(size, np.uint8)
    read_only.flags.writeable = False
    good = np.full(size, 7, np.uint8)
    for values in (x.astype(np.float64), x.astype(np.int32), x.astype(">f4"), x.astype(np.complex64), x.tolist(), None):
        with pytest.raises(CodecError, match=name):
            codec.encode_into(values, good)
        with pytest.raises(CodecError, match=name):
            codec.decode_into(good, values)
    for buffer in (good[:-1], np.zeros(size + 1, np.uint8), np.zeros(2 * size, np.uint8)[::2], "text", None, b""):
        with pytest.raises(CodecError, match=name):
            codec.encode_into(x, buffer)
        with pytest.raises(CodecError, match=name):
            codec.decode_into(buffer, x)
    for buffer in (bytes(size), read_only):
        with pytest.raises(CodecError, match="read-only"):
            codec.encode_into(x, buffer)
    x.flags.writeable = False
    with pytest.raises(CodecError, match="read-only"):
        codec.decode_into(good, x)
    assert (good == 7).all()
    assert not x.any()


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_parts_that_do_not_fit_are_refused(name):
    codec = get_codec(name)
    out, encoded = np.full(4097, 7, np.float32), encode(codec, make_values(0, 4097, "normal"))
    for part, view in codec.parts(encoded, out.size).items():
        for bad in (view[:-1], np.append(view, view[:1]), view.astype(np.int64), view.reshape(1, -1), None):
            parts = codec.parts(encoded, out.size) | {part: bad}
            if bad is None:
                del parts[part]
            with pytest.raises(CodecError, match=f"{name}: {part}"):
                codec.decode_parts_into(parts, out)
    assert (out == 7).all()
    codec.decode_parts_into(codec.parts(encoded, out.size), out)
    np.testing.assert_array_equal(out, decode(codec, encoded, out.size))


@pytest.mark.parametrize("name", FIXED_SIZE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_any_bytes_of_the_right_size_decode_to_something(name, dtype):
    codec, rng = get_codec(name), np.random.default_rng(9)
    for n in (0, 1, 255, 4097, TILE + 3):
        encoded = rng.integers(0, 256, codec.encoded_nbytes(n), np.uint8)
        guarded = np.full(n + 128, 77, dtype)
        codec.decode_into(encoded, guarded[64 : 64 + n])
        assert (guarded[:64] == 77).all()
        assert (guarded[64 + n :] == 77).all()


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("kind", [bytearray, memoryview, "odd address"])
def test_any_buffer_at_any_address_will_do(name, kind):
    codec, x = get_codec(name), make_values(4, 5001, "normal")
    wanted = encode(codec, x)
    size = codec.encoded_nbytes(x.size)
    out = np.empty(size + 1, np.uint8)[1:] if kind == "odd address" else bytearray(size)
    out = memoryview(out) if kind is memoryview else out
    used = codec.encode_into(x, out)
    assert bytes(out[:used]) == wanted.tobytes()
    np.testing.assert_array_equal(decode(codec, out[:used], x.size), decode(codec, wanted, x.size))


def views(n):
    """Arrays of n x 3 x 5 values that are not C-contiguous, by name; each call gives new memory."""
    values = make_values(n, n * 15, "normal")
    return {
        "transposed": values.reshape(5, 3, n).T,
        "every other": np.repeat(values, 2).reshape(n, 3, 10)[..., ::2],
        "backwards": values.reshape(n, 3, 5)[::-1, :, ::-1],
        "columns of a wider one": np.repeat(values.reshape(n, 15), 2, axis=0).reshape(n, 2, 15)[:, 1].reshape(n, 3, 5),
        "a slice": np.concatenate([values, values]).reshape(2, n, 3, 5)[:, :, :, 1:4],
    }


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_tensors_that_are_not_contiguous(name, dtype):
    codec = get_codec(name)
    for n in (1, 700, 9000):
        for case, x in views(n).items():
            x = x.astype(np.float16).view(dtype) if dtype == np.uint16 else x.astype(dtype, order="K")
            if dtype == np.uint16:
                x = x & 0xBFFF  # small bfloat16 numbers instead of any bits
            flat = np.ascontiguousarray(x).reshape(-1)
            encoded = encode(codec, x)
            np.testing.assert_array_equal(encoded, encode(codec, flat), err_msg=case)
            out = np.full_like(x, 77)
            codec.decode_into(encoded, out)
            np.testing.assert_array_equal(out.reshape(-1), decode(codec, encoded, x.size, dtype), err_msg=case)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), shape=st.lists(st.integers(1, 6), max_size=4).map(tuple), seed=st.integers(0, 99))
def test_runs_of_strided_tensors(data, shape, seed):
    rng = np.random.default_rng(seed)
    tensor = rng.permutation(int(np.prod(shape)) * 2).astype(np.float32)[::2].reshape(shape)
    tensor = tensor.transpose(rng.permutation(len(shape)))
    flat = tensor.flatten()
    start = data.draw(st.integers(0, flat.size))
    stop = data.draw(st.integers(start, flat.size))
    out = np.empty(stop - start, np.float32)
    read_run(tensor, start, out)
    np.testing.assert_array_equal(out, flat[start:stop])
    write_run(tensor, start, -out)
    wanted = flat.copy()
    wanted[start:stop] *= -1
    np.testing.assert_array_equal(tensor.reshape(-1), wanted)


@pytest.mark.parametrize("name", ["int7", "", None, "normfloat"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ConfigError) as error:
        get_codec(name)
    assert repr(name) in str(error.value)
    assert "normfloat4" in str(error.value)


def test_names_are_case_insensitive_and_shared():
    assert get_codec("NormFloat4") is get_codec("normfloat4")


def test_sizes_of_the_published_4_bit_message():
    """14.0625 % of float32: 4 bits a value and one float32 per 64."""
    codec = get_codec("normfloat4")
    assert codec.encoded_nbytes(64 * 1000) / (4 * 64 * 1000) == 0.140625
    assert codec.estimate_ratio() == 0.140625


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
@pytest.mark.parametrize("name", [n for n in CODEC_NAMES if n not in ("float16", "bfloat16")])
def test_finite_values_of_16_bits_stay_finite_or_are_refused(name, dtype):
    largest = 65504 if dtype is np.float16 else 0x7F7F
    rng = np.random.default_rng(0)
    codec, infinity = get_codec(name), 0x7C00 if dtype is np.float16 else 0x7F80
    for _ in range(20):
        x = np.zeros((256, 64), dtype)
        x[:, 0] = rng.choice([largest, largest * 127 // 128, largest // 2, 1, 0], 256)
        out, back = np.empty(codec.encoded_nbytes(x.size), np.uint8), np.empty_like(x)
        try:
            used = codec.encode_into(x, out)
        except UnrepresentableError:
            continue
        codec.decode_into(out[:used], back)
        assert ((back.view(np.uint16) & 0x7FFF) < infinity).all()
