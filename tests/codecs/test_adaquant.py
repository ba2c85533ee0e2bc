"""adaquant against FLARE's AdaQuantizer: the same offset, norm, level and codes."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.errors import CodecError, UnrepresentableError

torch = pytest.importorskip("torch")
ada_quant = pytest.importorskip("nvflare.app_opt.pt.quantization.ada_quant")

RNG = np.random.default_rng(5)
CASES = {
    "weights": RNG.standard_normal(70_001) * 0.02,
    "normal": RNG.standard_normal(5000),
    "two bytes": RNG.standard_normal(5000) * 100,
    "nearly too wide": RNG.uniform(-4.8e5, 4.8e5, 5000),
    "positive": RNG.uniform(3, 4, 1000),
    "negative": -RNG.uniform(3, 4, 1000),
    "outlier": np.append(np.zeros(999), 30.0),
    "far from zero": RNG.uniform(1000, 1000.5, 1000),
    "narrow": RNG.uniform(0, 6e-4, 1000),
    "one": np.array([0.7]),
}


def encode(x):
    codec = get_codec("adaquant")
    out = np.empty(codec.encoded_nbytes(x.size), np.uint8)
    return codec, out[: codec.encode_into(x, out)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_adaquant_equals_flare(case, dtype):
    x = np.clip(CASES[case], -60000, 60000).astype(dtype)
    flare = ada_quant.AdaQuantizer(compression=False)
    wanted, state = flare.quantize(torch.from_numpy(x))
    if not state:  # as many bits as the source
        with pytest.raises(UnrepresentableError, match="adaquant would take"):
            encode(x)
        return
    codec, encoded = encode(x)
    parts = codec.parts(encoded, x.size)
    offset, norm, level = parts["header"]
    assert offset == state["offset"]
    if x.size == 1:
        assert norm == 0
        assert parts["codes"].size == 0
    else:
        assert (norm, level) == (state["norm"], state["quantization_level"])
        np.testing.assert_array_equal(parts["codes"], wanted)
        assert parts["codes"].dtype == wanted.dtype
    out = np.empty_like(x)
    codec.decode_into(encoded, out)
    decoded = flare.dequantized(torch.from_numpy(wanted.astype(np.int32)) if x.size > 1 else wanted, state)
    np.testing.assert_array_equal(out, decoded.numpy().astype(np.float32).astype(dtype))


def test_a_range_for_which_flare_takes_zero_levels():
    x = RNG.uniform(0, 2e-4, 1000).astype(np.float32)
    flare = ada_quant.AdaQuantizer(compression=False)
    wanted, state = flare.quantize(torch.from_numpy(x))
    assert state["quantization_level"] == 0
    assert flare.dequantized(torch.from_numpy(wanted.astype(np.int32)), state).isnan().all()
    codec, encoded = encode(x)
    out = np.empty_like(x)
    codec.decode_into(encoded, out)
    assert np.abs(out - x).max() <= 1e-4


def test_a_range_of_more_than_16_bits_is_refused():
    with pytest.raises(UnrepresentableError, match="17 bits"):
        encode(np.array([-1e6, 1e6], np.float32))


def test_damaged_headers_are_refused():
    codec, encoded = encode(CASES["normal"].astype(np.float32))
    out = np.empty(5000, np.float32)
    header = list(struct.unpack("3d", encoded[:24].tobytes()))
    ends = [(0, np.nan), (0, np.inf), (0, 3.5e38), (0, -1e39), (1, 3.5e38), (1, np.inf), (1, -1), (1, np.nan), (1, 0)]
    for place, bad in [*ends, (2, 0), (2, 0.5), (2, 1e9), (2, 65535)]:
        damaged = encoded.copy()
        damaged[:24].view(np.float64)[:] = [*header[:place], bad, *header[place + 1 :]]
        with pytest.raises(CodecError, match="adaquant"):
            codec.decode_into(damaged, out)
    for size in (0, 23, 24, encoded.size - 1):
        with pytest.raises(CodecError, match="adaquant"):
            codec.decode_into(encoded[:size], out)
