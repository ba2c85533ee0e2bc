"""Quantize and dequantize a message: values, dtypes, frameworks, exact tensors, and nothing changed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_copy, make_reply
from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict
from nvflare.fuel.utils import fobs
from safetensors.torch import save_file

from nvflare_rdma.codecs import CODEC_NAMES, get_codec
from nvflare_rdma.codecs.tensors import to_flat
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.filters.options import with_needed

#: Types that need no other option.
ALONE = [name for name in CODEC_NAMES if not with_needed(name, [], {})]

SETTINGS = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def send(params, name, kind=DataKind.WEIGHTS, meta=None):
    """Through both filters; returns (encoded DXO, decoded DXO)."""
    encoded = ModelQuantizer(name).process(DXO(kind, data=params, meta=meta).to_shareable(), FLContext())
    decoded = ModelDequantizer().process(encoded, FLContext())
    return from_shareable(encoded), from_shareable(decoded)


def float32(value):
    if isinstance(value, torch.Tensor):
        return value.detach().float().numpy().reshape(-1)
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(np.float32).reshape(-1)


def encode_alone(codec, x):
    encoded = np.empty(codec.encoded_nbytes(x.size), np.uint8)
    return encoded[: codec.encode_into(x, encoded)]


def assert_within_bound(codec, sent, got):
    x = float32(sent)
    bound = codec.max_abs_error(x, encode_alone(codec, to_flat(sent)))
    if str(sent.dtype).endswith("bfloat16"):
        bound = bound * 1.01 + (np.abs(x) + bound) * 2.0**-8
    elif str(sent.dtype).endswith("float16"):
        bound = bound * 1.01 + (np.abs(x) + bound) * 2.0**-11 + 2.0**-25
    assert (np.abs(float32(got) - x) <= bound).all()


def assert_same_kind(sent, got):
    assert isinstance(got, torch.Tensor) == isinstance(sent, torch.Tensor)
    assert got.dtype == sent.dtype
    assert got.shape == sent.shape


def assert_identical(sent, got):
    assert_same_kind(sent, got)
    if isinstance(sent, torch.Tensor):
        assert torch.equal(got.nan_to_num(7.5), sent.nan_to_num(7.5))
    else:
        np.testing.assert_array_equal(got, sent)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_all_float_dtypes_come_back(name, kind):
    torch.manual_seed(0)
    params = {
        "t32": torch.randn(130, 67),
        "t16": torch.randn(4097).half(),
        "tb16": torch.randn(3, 5, 77).bfloat16(),
        "n32": np.random.default_rng(0).standard_normal((65, 129)).astype(np.float32),
        "n16": np.random.default_rng(1).standard_normal(9001).astype(np.float16),
    }
    encoded, decoded = send(params, name, kind)
    assert decoded.data_kind == kind
    assert list(decoded.data) == list(params)
    codec = get_codec(name)
    for key, sent in params.items():
        assert_same_kind(sent, decoded.data[key])
        if codec.bits < sent.dtype.itemsize * 8 or (codec.name == "lossless" and encoded.data[key] is not sent):
            assert encoded.data[key].nbytes < sent.nbytes
            assert_within_bound(codec, sent, decoded.data[key])
        else:
            assert encoded.data[key] is sent
            assert decoded.data[key] is sent


shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=20)


@pytest.mark.parametrize("name", ALONE)
@SETTINGS
@given(
    arrays=st.lists(
        shapes.flatmap(
            lambda s: hnp.arrays(
                st.sampled_from([np.float32, np.float16, np.float64, np.int64, np.int8, np.bool_, np.complex64]), s
            )
        ),
        max_size=4,
    ),
    as_torch=st.booleans(),
)
def test_any_shape_dtype_and_value_comes_back(name, arrays, as_torch):
    params = {f"p{i}": torch.from_numpy(a.copy()) if as_torch else a for i, a in enumerate(arrays)}
    before = copy.deepcopy(params)
    if not params:
        return
    encoded, decoded = send(params, name)
    for key, sent in before.items():
        assert_identical(sent, params[key])
        got = decoded.data[key]
        assert_same_kind(sent, got)
        x = float32(sent) if "complex" not in str(sent.dtype) else np.array([np.nan], "f4")
        if encoded.data[key] is params[key]:
            assert got is params[key]
        else:
            finite = np.isfinite(x)
            np.testing.assert_array_equal(float32(got)[~finite], x[~finite])
            if finite.all():
                assert_within_bound(get_codec(name), sent, got)


@pytest.mark.parametrize("name", ALONE)
def test_awkward_torch_tensors(name):
    base = torch.randn(64, 90)
    tied = torch.randn(40, 50)
    params = {
        "transposed": base.t(),
        "strided": base[::3, 1::2],
        "grad": torch.randn(30, 30, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.randn(33, 3)),
        "scalar": torch.tensor(2.5),
        "expanded": torch.randn(1, 5).expand(40, 5),
        "tied.a": tied,
        "tied.b": tied.detach(),
        "tied.view": tied.t(),
    }
    encoded, decoded = send(params, name)
    for key, sent in params.items():
        assert_same_kind(sent, decoded.data[key])
        assert_within_bound(get_codec(name), sent, decoded.data[key])
    assert encoded.data["tied.a"] is encoded.data["tied.b"]
    assert encoded.data["tied.view"] is not encoded.data["tied.a"]
    assert decoded.data["tied.a"] is decoded.data["tied.b"]
    assert decoded.data["tied.view"].data_ptr() != decoded.data["tied.a"].data_ptr()


def test_one_table_object_serves_all_tensors():
    for params in ({k: torch.randn(999) for k in "abc"}, {k: np.ones(999, np.float32) for k in "abc"}):
        for name, key in (("normfloat4", "quant_map"), ("blockwise8", "code")):
            encoded, _ = send(params, name)
            assert len({id(s[key]) for s in encoded.meta["quant_state"].values()}) == 1


@pytest.mark.parametrize("name", ["normfloat4", "blockwise8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("as_torch", [True, False])
def test_tensors_that_are_not_finite_travel_exact_with_one_warning(name, bad, as_torch, warnings_logged):
    good, broken = np.ones(500, np.float32), np.ones(5000, np.float32)
    broken[4999] = bad
    params = {"good": good, "broken": broken, "also.broken": broken * 2}
    if as_torch:
        params = {k: torch.from_numpy(v) for k, v in params.items()}
    encoded, decoded = send(params, name)
    assert_identical(params["broken"], decoded.data["broken"])
    assert encoded.data["broken"] is params["broken"]
    assert encoded.data["good"] is not params["good"]
    assert encoded.meta["source_datatype"] == {
        "good": "float32",
        "broken": "bool",
        "also.broken": "bool",
    }
    assert len(warnings_logged) == 1
    assert "broken" in warnings_logged[0]
    assert "also.broken" in warnings_logged[0]
    assert "NaN or Inf" in warnings_logged[0]
    assert "good" not in warnings_logged[0]


def test_float16_keeps_nan_and_inf_and_sends_what_overflows_exact(warnings_logged):
    params = {
        "special": torch.tensor([1, np.nan, np.inf, -np.inf] * 4),
        "large": torch.tensor([1, 70000.0] * 8),
    }
    encoded, decoded = send(params, "float16")
    assert encoded.data["special"].dtype == torch.float16
    assert torch.equal(decoded.data["special"].nan_to_num(5), params["special"].nan_to_num(5))
    assert decoded.data["large"] is params["large"]
    assert len(warnings_logged) == 1
    assert "large" in warnings_logged[0]


def test_integers_and_values_that_are_not_tensors_pass_without_a_warning(warnings_logged):
    params = {
        "w": torch.randn(100),
        "num_batches_tracked": torch.tensor(7),
        "mask": np.array([True, False] * 50),
        "empty": torch.zeros(0, 4),
        "scale": 0.5,
        "name": "resnet",
        "none": None,
        "np_scalar": np.float64(2.0),
    }
    encoded, decoded = send(params, "normfloat4")
    for key in params.keys() - {"w"}:
        assert decoded.data[key] is params[key]
        assert encoded.meta["source_datatype"][key] == "bool"
    assert warnings_logged == []


def test_unusual_values_pass_with_a_warning(warnings_logged):
    class Wrapped(np.ndarray):
        pass

    params = {
        "double": torch.randn(100).double(),
        "complex": np.ones(100, np.complex64),
        "swapped": np.ones(100, ">f4"),
        "subclass": np.ones(100, np.float32).view(Wrapped),
        "sparse": torch.eye(30).to_sparse(),
        "list": [torch.randn(100)],
    }
    _, decoded = send(params, "normfloat4")
    for key in params:
        assert decoded.data[key] is params[key]
    assert len(warnings_logged) == 1
    for key in params:
        assert key in warnings_logged[0]


def test_nothing_that_was_given_is_changed():
    shared = {"w": torch.randn(70, 70), "n": np.ones(500, np.float32)}
    history = ["Earlier"]
    meta = {MetaKey.FILTER_HISTORY: history, "round": 3}
    inner = DXO(DataKind.WEIGHTS, data=shared, meta=meta)
    original = DXO(DataKind.COLLECTION, data={"a": inner, "b": DXO(DataKind.METRICS, data={"x": 1})}).to_shareable()
    original.set_header("h", {"deep": 1})
    values = copy.deepcopy(shared)
    task_data = original
    results = [ModelQuantizer("normfloat4").process(make_copy(task_data), FLContext()) for _ in range(2)]
    assert task_data is original
    assert from_shareable(original).data["a"] is inner
    assert inner.data is shared
    assert list(shared) == ["w", "n"]
    assert torch.equal(shared["w"], values["w"])
    assert inner.meta is meta
    assert meta == {MetaKey.FILTER_HISTORY: ["Earlier"], "round": 3}
    assert meta[MetaKey.FILTER_HISTORY] is history
    for result in results:
        part = from_shareable(result).data["a"]
        assert part.meta[MetaKey.FILTER_HISTORY] == ["Earlier", "ModelQuantizer"]
        kept = copy.copy(part.data)
        decoded = from_shareable(ModelDequantizer().process(result, FLContext())).data
        assert part.data == kept
        assert "quant_state" in part.meta
        assert decoded["a"].meta == {
            "round": 3,
            MetaKey.FILTER_HISTORY: ["Earlier", "ModelQuantizer", "ModelDequantizer"],
        }
        assert decoded["b"].data == {"x": 1}
        assert torch.allclose(decoded["a"].data["w"], values["w"], atol=1)


def test_messages_that_are_not_models_pass_untouched():
    for shareable in (
        Shareable(),
        make_reply(ReturnCode.EXECUTION_EXCEPTION),
        DXO(DataKind.METRICS, data={"loss": 1.0}).to_shareable(),
        DXO(DataKind.WEIGHTS, data={}).to_shareable(),
        DXO(DataKind.COLLECTION, data={"a": DXO(DataKind.METRICS, data={"x": 1})}).to_shareable(),
    ):
        assert ModelQuantizer("blockwise8").process(shareable, FLContext()) is shareable
        assert ModelDequantizer().process(shareable, FLContext()) is shareable


def test_quantizing_twice_changes_nothing_more():
    first = ModelQuantizer("normfloat4").process(
        DXO(DataKind.WEIGHTS, data={"w": torch.randn(99)}).to_shareable(), FLContext()
    )
    second = ModelQuantizer("float16").process(first, FLContext())
    assert from_shareable(second).data["w"] is from_shareable(first).data["w"]
    assert from_shareable(second).meta[MetaKey.PROCESSED_ALGORITHM] == "normfloat4"


@pytest.mark.parametrize("bad", ["int3", "", 8, None, "exact"])
def test_bad_types_are_refused_when_made(bad):
    with pytest.raises(ConfigError, match="normfloat4"):
        ModelQuantizer(quantization_type=bad)


@pytest.mark.parametrize("as_torch", [True, False])
@pytest.mark.parametrize("name", ALONE)
def test_survives_flare_serialization_with_little_overhead(name, as_torch):
    from nvflare.app_common.decomposers import numpy_decomposers
    from nvflare.app_opt.pt.decomposers import TensorDecomposer

    fobs.register(TensorDecomposer)
    numpy_decomposers.register()
    rng = np.random.default_rng(0)
    params = {f"layers.{i}.weight": rng.standard_normal((64, 65)).astype(np.float32) for i in range(20)}
    if as_torch:
        params = {k: torch.from_numpy(v) for k, v in params.items()}
    encoded = ModelQuantizer(name).process(DXO(DataKind.WEIGHTS, data=params).to_shareable(), FLContext())
    wire = fobs.dumps(encoded)
    floor = sum(len(encode_alone(get_codec(name), float32(value))) for value in params.values())
    # Repeated only when nothing is downloaded by reference.
    table = {"blockwise8": 1024, "float4": 64, "normfloat4": 64}.get(name, 0)
    assert len(wire) - floor < 20 * (table + (1100 if table else 400)) + 600
    decoded = from_shareable(ModelDequantizer().process(fobs.loads(wire), FLContext()))
    for key, sent in params.items():
        assert_same_kind(sent, decoded.data[key])
        assert_within_bound(get_codec(name), sent, decoded.data[key])


@pytest.mark.parametrize("as_torch", [True, False])
@pytest.mark.parametrize("name", ["float16", "blockwise8", "float4", "normfloat4", "adaquant", "int8"])
def test_flares_methods_work_apart_from_messages(name, as_torch):
    """What FLARE's filters do to a dict of params has these names and arguments there."""
    params = {"w": torch.randn(30, 40), "b": torch.zeros(40), "steps": torch.tensor(3)}
    params = params if as_torch else {key: value.numpy() for key, value in params.items()}
    given = dict(params)
    codes, quant_state, source_datatype = ModelQuantizer(name).quantization(params, FLContext())
    assert codes.keys() == quant_state.keys() == source_datatype.keys() == params.keys()
    assert source_datatype == {"w": "float32", "b": "float32", "steps": "bool"}
    assert codes["w"].nbytes < params["w"].nbytes
    got = ModelDequantizer().dequantization(
        params=codes,
        quant_state=quant_state,
        quantization_type=name,
        source_datatype=source_datatype,
        fl_ctx=FLContext(),
    )
    assert all(params[key] is value for key, value in given.items())
    assert got["steps"] is params["steps"]
    for key in ("w", "b"):
        assert_same_kind(params[key], got[key])
        assert_within_bound(get_codec(name), params[key], got[key])


def test_flares_methods_take_no_params_at_all_and_dicts_in_dicts():
    assert ModelQuantizer().quantization({}, FLContext()) == ({}, {}, {})
    assert ModelDequantizer().dequantization({}, {}, "float16", {}, FLContext()) == {}
    codes, states, sources = ModelQuantizer("int8").quantization({"a": {"w": torch.ones(2048)}}, FLContext())
    got = ModelDequantizer().dequantization(codes, states, "int8", sources, FLContext())
    assert torch.equal(got["a"]["w"], torch.ones(2048))


def test_tensors_in_the_metadata_travel_exact_and_are_told_of_once(warnings_logged):
    """SCAFFOLD's control variates: as large as the model, and in none of its places."""
    control = {"w": torch.randn(512, 256)}
    meta = {"scaffold_c_global": control, "more": [{"x": (np.ones(1 << 17, np.float64),)}], "round": 3}
    quantizer = ModelQuantizer("normfloat4")
    for _ in range(2):
        sent = DXO(DataKind.WEIGHTS, data={"w": torch.randn(99, 99)}, meta=meta).to_shareable()
        got = from_shareable(ModelDequantizer().process(quantizer.process(sent, FLContext()), FLContext()))
        assert got.meta["scaffold_c_global"] is control
    (warning,) = warnings_logged
    assert "1.50 MB of tensors in the message's metadata (more, scaffold_c_global) travel exact" in warning


def test_names_may_be_numbers():
    sent = DXO(DataKind.WEIGHTS, data={0: np.ones((64, 64), np.float32), 1: np.ones(64, np.float32)}).to_shareable()
    encoded = ModelQuantizer("int8", policy=[]).process(sent, FLContext())
    got = from_shareable(ModelDequantizer().process(encoded, FLContext())).data
    assert got.keys() == {0, 1}
    np.testing.assert_allclose(got[0], 1, rtol=1e-6)


def test_so_they_may_where_tensors_are_tied_or_in_the_metadata(warnings_logged):
    w = np.ones((64, 64), np.float32)
    meta = {7: np.ones(1 << 18, np.float32), "control": np.ones(1 << 18, np.float32)}
    encoded = ModelQuantizer("int8").process(DXO(DataKind.WEIGHTS, {0: w, 1: w}, meta).to_shareable(), FLContext())
    got = from_shareable(ModelDequantizer().process(encoded, FLContext())).data
    assert got[0] is got[1]
    assert "2.00 MB of tensors in the message's metadata (7, control)" in "".join(warnings_logged)


def on_disk(values, folder, name):
    """Put tensors where FLARE puts them on their way to a workflow with `enable_tensor_disk_offload`."""
    tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    (folder / name).mkdir()  # goes with the last reference to what is in it
    file = str(folder / name / "tensors")
    save_file({key: value.clone() for key, value in tensors.items()}, file)
    files = LazyTensorDict({key: (file, key) for key in tensors}, str(folder / name))
    return {key: files.make_lazy_ref(key) if key in tensors else value for key, value in values.items()}


@pytest.mark.parametrize("name", ["blockwise8", "normfloat4", "float16", "int8", "lossless", "adaquant"])
def test_codes_and_metadata_that_flare_has_put_on_disk(name, tmp_path):
    sent = {"w": torch.randn(40, 50), "steps": torch.arange(3), "tied": None}
    sent["tied"] = sent["w"]
    encoded, decoded = send(sent, name)
    lazy = DXO(encoded.data_kind, on_disk(encoded.data, tmp_path, "codes"), dict(encoded.meta))
    states = encoded.meta["quant_state"]
    lazy.meta["quant_state"] = {key: on_disk(state, tmp_path, f"{key}.state") for key, state in states.items()}
    got = from_shareable(ModelDequantizer().process(lazy.to_shareable(), FLContext())).data
    assert_identical(decoded.data["w"], got["w"])
    assert got["tied"] is got["w"]
    assert got["steps"] is lazy.data["steps"], "what is not decoded stays on disk"
    assert type(lazy.data["w"]).__name__ == "_LazyRef"
