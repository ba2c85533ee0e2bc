"""ModelDequantizer with metadata that a peer damaged or forged."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_context import FLContext

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.errors import CodecError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.filters.metadata import from_message
from nvflare_rdma.filters.quant_filter import OURS


def message(name, params=None):
    params = params or {"layer.w": torch.randn(60, 65)}
    if name == "mixed":
        dxo = message("int8", params)
        dxo.meta[MetaKey.PROCESSED_ALGORITHM] = name
        return dxo
    return from_shareable(ModelQuantizer(name).process(DXO(DataKind.WEIGHTS, data=params).to_shareable(), FLContext()))


def set_state(**changes):
    def damage(dxo):
        dxo.meta["quant_state"]["layer.w"].update(changes)

    return damage


def set_codes(codes):
    def damage(dxo):
        dxo.data["layer.w"] = codes

    return damage


def set_meta(key, value):
    def damage(dxo):
        dxo.meta[key] = value

    return damage


def set_empty(**changes):
    def damage(dxo):
        set_codes(torch.zeros(0, dtype=torch.uint8))(dxo)
        set_state(**changes)(dxo)

    return damage


def set_source(value):
    return set_meta("source_datatype", {"layer.w": value})


BLOCKS = -(-60 * 65 // 64)
DAMAGE = {
    "absmax too short": ("normfloat4", set_state(absmax=torch.ones(BLOCKS - 1)), "absmax"),
    "absmax too long": ("normfloat4", set_state(absmax=torch.ones(BLOCKS + 1)), "absmax"),
    "absmax is a list": ("normfloat4", set_state(absmax=[1.0] * BLOCKS), "absmax"),
    "absmax is missing": ("normfloat4", lambda d: d.meta["quant_state"]["layer.w"].pop("absmax"), "absmax"),
    "absmax is float64": ("normfloat4", set_state(absmax=torch.ones(BLOCKS).double()), "absmax"),
    "absmax is NaN": ("normfloat4", set_state(absmax=torch.full((BLOCKS,), torch.nan)), "NaN"),
    "absmax is Inf": ("normfloat4", set_state(absmax=torch.full((BLOCKS,), torch.inf)), "NaN or Inf"),
    "absmax is negative": ("normfloat4", set_state(absmax=-torch.ones(BLOCKS)), "negative"),
    "codes too short": ("normfloat4", set_codes(torch.zeros(10, 1, dtype=torch.uint8)), "shape"),
    "codes of wrong dtype": ("normfloat4", set_codes(torch.zeros(1950, 1, dtype=torch.int8)), "int8"),
    "codes are bytes": ("normfloat4", set_codes(b"123"), "bytes"),
    "hostile shape": ("normfloat4", set_state(shape=[2**40]), "shape"),
    "shape that wraps to the right size": ("normfloat4", set_state(shape=[2**62, 4, 3900]), "shape"),
    "negative shape": ("normfloat4", set_state(shape=[-60, -65]), "shape"),
    "shape of floats": ("normfloat4", set_state(shape=[60.0, 65]), "shape"),
    "shape is a number": ("normfloat4", set_state(shape=3900), "shape"),
    "no shape": ("normfloat4", set_state(shape=None), "shape"),
    "other blocksize": ("normfloat4", set_state(blocksize=128), "blocksize"),
    "other quant_type": ("normfloat4", set_state(quant_type="fp4"), "quant_type"),
    "other dtype": ("normfloat4", set_state(dtype="float16"), "dtype"),
    "nested scales": ("normfloat4", set_state(nested_absmax=torch.ones(3)), "scales"),
    "other quant_map": ("normfloat4", set_state(quant_map=torch.ones(16)), "quant_map"),
    "short quant_map": ("normfloat4", set_state(quant_map=torch.ones(15)), "quant_map"),
    "short code table": ("blockwise8", set_state(code=torch.ones(255)), "code"),
    "code table outside the range": ("blockwise8", set_state(code=torch.linspace(-2, 2, 256)), "outside"),
    "blockwise8 absmax too short": ("blockwise8", set_state(absmax=torch.ones(0)), "absmax"),
    "blockwise8 codes of wrong dtype": ("blockwise8", set_codes(torch.zeros(60, 65)), "float32"),
    "float16 codes of wrong dtype": ("float16", set_codes(torch.zeros(60, 65, dtype=torch.int16)), "int16"),
    "bfloat16 codes of wrong dtype": ("bfloat16", set_codes(torch.zeros(60, 65, dtype=torch.int16)), "int16"),
    "unknown source": ("normfloat4", set_source("float8"), "float8"),
    "integer source": ("normfloat4", set_source("int64"), "int64"),
    "no source": ("normfloat4", set_meta("source_datatype", {}), "None"),
    "source is unhashable": ("normfloat4", set_source(["float32"]), "float32"),
    "source is an array": ("normfloat4", set_source(np.zeros(2)), "source_datatype"),
    "dtype is an array": ("normfloat4", set_state(dtype=np.zeros(2)), "dtype"),
    "blocksize is an array": ("normfloat4", set_state(blocksize=np.zeros(2)), "blocksize"),
    "quant_type is an array": ("normfloat4", set_state(quant_type=np.zeros(2)), "quant_type"),
    "codec is unhashable": ("mixed", set_state(codec=["int8"]), "codec"),
    "more dimensions than numpy has": ("int8", set_state(shape=[3900] + [1] * 70), "shape"),
    "endless dimensions": ("int8", set_state(shape=[2**62] * 100000), "shape"),
    "no values of a size beyond all memory": ("int8", set_empty(shape=[0, 2**62]), "shape"),
    "a sum beyond float64": ("adaquant", set_state(offset=10**400), "offset"),
    "compressed codes of an unhashable dtype": (
        "adaquant",
        set_state(compressed_tensor=torch.zeros(9, dtype=torch.uint8), new_dtype=["u1"]),
        "new_dtype",
    ),
    "delta is an array": ("normfloat4", set_state(delta=np.zeros(2)), "delta"),
    "no state of this tensor": ("normfloat4", set_meta("quant_state", {}), "quant_state"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_and_names_the_tensor(case):
    name, damage, expected = DAMAGE[case]
    dxo = message(name)
    damage(dxo)
    shareable = dxo.to_shareable()
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match=expected) as error:
            ModelDequantizer().process(shareable, FLContext())
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert "'layer.w'" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (MetaKey.PROCESSED_ALGORITHM, "int3"),
        (MetaKey.PROCESSED_ALGORITHM, "nonsense"),
        (MetaKey.PROCESSED_ALGORITHM, None),
        (MetaKey.PROCESSED_ALGORITHM, 4),
        (MetaKey.PROCESSED_ALGORITHM, np.zeros(2)),
        ("quant_state", [1]),
        ("source_datatype", None),
    ],
)
def test_damage_of_the_whole_message_is_refused(key, value):
    dxo = message("normfloat4")
    dxo.meta[key] = value
    with pytest.raises(CodecError) as error:
        ModelDequantizer().process(dxo.to_shareable(), FLContext())
    assert repr(value) in str(error.value) or str(value) in str(error.value) or key in str(error.value)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [(np.zeros(2), "nvflare_rdma"), ({"tied": np.zeros(2)}, "tied"), ({"base": np.zeros(2)}, "that isn't here")],
)
def test_what_refuses_to_be_compared_is_refused(ours, expected):
    dxo = message("normfloat4")
    dxo.meta[OURS] = ours
    with pytest.raises(CodecError, match=expected):
        ModelDequantizer().process(dxo.to_shareable(), FLContext())


def test_a_digest_that_refuses_to_be_compared_is_another_one(caplog):
    dxo = message("normfloat4")
    dxo.meta[OURS] = {"leaves": np.zeros(2)}
    ModelDequantizer().process(dxo.to_shareable(), FLContext())
    assert "decoded to other bits than at the server" in caplog.text


def test_a_table_of_other_last_bits_is_used_as_it_came():
    dxo = message("blockwise8", {"w": np.linspace(-1, 1, 5000, dtype=np.float32)})
    theirs = dxo.meta["quant_state"]["w"]["code"] * np.float32(0.5)
    plain = from_shareable(ModelDequantizer().process(dxo.to_shareable(), FLContext())).data["w"]
    dxo.meta["quant_state"]["w"]["code"] = theirs
    got = from_shareable(ModelDequantizer().process(dxo.to_shareable(), FLContext())).data["w"]
    np.testing.assert_allclose(got, plain * 0.5, rtol=1e-6)


def test_a_numpy_tensor_cannot_claim_bfloat16():
    dxo = message("normfloat4", {"layer.w": np.ones(100, np.float32)})
    dxo.meta["source_datatype"]["layer.w"] = dxo.meta["quant_state"]["layer.w"]["dtype"] = "bfloat16"
    with pytest.raises(CodecError, match=r"'layer\.w'.*bfloat16"):
        ModelDequantizer().process(dxo.to_shareable(), FLContext())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["int8", "float8_e4m3", "float4_dq", "normfloat4_dq", "normfloat4_e4m3", "int2", "ternary"]
)
def test_scales_that_are_not_finite_are_refused(name, value):
    dxo = message(name)
    dxo.data["layer.w"][:4] = torch.tensor([value]).view(torch.uint8)
    with pytest.raises(CodecError, match=r"'layer\.w'.*NaN or Inf"):
        ModelDequantizer().process(dxo.to_shareable(), FLContext())


@pytest.mark.parametrize(("name", "nbytes"), [("topk2", 118), ("topk2_128", 230)])
def test_a_few_chosen_values_stand_for_no_more_than_they_were_chosen_from(name, nbytes):
    codec, codes = get_codec(name), np.zeros(nbytes, np.uint8)
    state = {"dtype": "float32", "shape": [4096]}
    assert from_message("w", codec, codes, state, "float32", 0).shape == (4096,)
    for shape in ([4097], [4096, 1000], [1 << 50], [64]):
        with pytest.raises(CodecError, match=f"'w': {nbytes} bytes of {name} don't make shape"):
            from_message("w", codec, codes, state | {"shape": shape}, "float32", 1 << 60)
    for bad in (np.nan, np.inf):
        codes[:4] = np.array([bad], np.float32).view(np.uint8)
        with pytest.raises(CodecError, match="'high' holds NaN or Inf"):
            from_message("w", codec, codes, state, "float32", 0)
